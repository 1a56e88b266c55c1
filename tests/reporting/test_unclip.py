"""Embeddings drawn by a tiny, randomly initialised UnCLIP pipeline: the real code path. Skipped, visibly, without `singreg[unclip]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from singreg.nullspace import NullSpace
from singreg.reporting.plots import save_figure
from singreg.reporting.unclip import UnclipRenderer, draw_rows, rescale_norm, shift_columns
from singreg.translator import LinearTranslator

WIDTH, SIDE = 32, 32


def embeddings(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with 512 byte tokens and no merges: the pipeline only ever tokenises the empty prompt."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}))
    made = CLIPTokenizer.from_pretrained(str(folder))
    made.model_max_length = 16
    return made


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An UnCLIPImageVariationPipeline of a few thousand weights for 32-dimensional embeddings and pictures of 32 pixels."""
    diffusers = pytest.importorskip("diffusers", reason="the extra singreg[unclip] is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra singreg[unclip] is not installed")
    # Where it lives changes with the version of diffusers; the pipeline's own module has it in all of them.
    text_projection = sys.modules[diffusers.UnCLIPImageVariationPipeline.__module__].UnCLIPTextProjModel
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, vocab_size=1000,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, image_size=32,
        patch_size=16,
    )  # fmt: skip
    decoder = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=3, out_channels=6, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
        resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    )  # fmt: skip
    larger = {
        "sample_size": SIDE, "layers_per_block": 1, "block_out_channels": (32, 64), "in_channels": 6, "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }  # fmt: skip
    return diffusers.UnCLIPImageVariationPipeline(
        decoder=decoder,
        text_encoder=transformers.CLIPTextModelWithProjection(text),
        tokenizer=tokenizer(tmp_path_factory.mktemp("tokenizer")),
        text_proj=text_projection(clip_embeddings_dim=WIDTH, time_embed_dim=32 * 4, cross_attention_dim=32),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        super_res_first=diffusers.UNet2DModel(**larger),
        super_res_last=diffusers.UNet2DModel(**larger),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon", num_train_timesteps=1000),
        super_res_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="epsilon", num_train_timesteps=1000
        ),
    )


@pytest.fixture
def renderer(pipeline: Any) -> UnclipRenderer:
    return UnclipRenderer(pipeline, decoder_steps=2, super_resolution_steps=2)


def test_every_column_is_drawn_the_same_way_every_time(renderer: UnclipRenderer) -> None:
    columns = {"T(f)": embeddings(), "T(f~)": embeddings(seed=1)}
    drawn = renderer.render(columns, embeddings(), progress=False)
    assert {name: picture.shape for name, picture in drawn.items()} == dict.fromkeys(columns, (2, SIDE, SIDE, 3))
    assert all(picture.dtype == np.float32 and 0 <= picture.min() <= picture.max() <= 1 for picture in drawn.values())
    torch.rand(5)
    again = renderer.render(columns, embeddings(), progress=False)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)
    other = renderer.render(columns, embeddings(), seed=9, progress=False)
    assert not np.array_equal(drawn["T(f)"], other["T(f)"])


def test_pictures_of_a_row_differ_by_their_embeddings_alone(renderer: UnclipRenderer) -> None:
    """The same embedding in two columns gives the same picture; the same embedding in two rows has other noise."""
    one = embeddings(1).repeat(2, 1)
    drawn = renderer.render({"a": one, "b": one, "c": embeddings(seed=2)}, one, progress=False)
    assert np.array_equal(drawn["a"], drawn["b"])
    assert not np.array_equal(drawn["a"][0], drawn["a"][1])
    assert not np.array_equal(drawn["a"][0], drawn["c"][0])


def test_the_norm_of_a_translation_does_not_matter_and_that_of_the_real_one_does(renderer: UnclipRenderer) -> None:
    z, real = embeddings(1), embeddings(1, seed=3)
    drawn, shrunk = (renderer.render({"z": scale * z}, real, progress=False)["z"] for scale in (1.0, 0.25))
    assert np.allclose(drawn, shrunk, atol=1e-4)
    assert not np.allclose(drawn, renderer.render({"z": z}, 5 * real, progress=False)["z"], atol=1e-3)


def test_the_drawing_is_diffusers_own_of_the_rescaled_embedding(renderer: UnclipRenderer, pipeline: Any) -> None:
    z, real = embeddings(), embeddings(seed=3)
    drawn = renderer.render({"z": z}, real, seed=4, progress=False)["z"]
    for row in range(2):
        expected = pipeline(
            image_embeddings=(z[row] / z[row].norm() * real[row].norm())[None], generator=torch.Generator().manual_seed(4 + row),
            decoder_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np",
        ).images[0]  # fmt: skip
        assert np.allclose(drawn[row], expected, atol=1e-5)


def test_another_width_is_refused_by_name(renderer: UnclipRenderer) -> None:
    assert renderer.width == WIDTH
    with pytest.raises(ValueError, match=r"draws 32-dimensional embeddings; 'T\(f\)' is \(2, 64\)\. Translate into the CLIP"):
        renderer.render({"T(f)": torch.ones(2, 64)}, embeddings(), progress=False)
    with pytest.raises(ValueError, match="'real' is"):
        renderer.render({"T(f)": embeddings()}, torch.ones(2, 64), progress=False)
    with pytest.raises(ValueError, match="no column"):
        renderer.render({}, embeddings(), progress=False)


def test_a_saved_pipeline_is_opened_by_its_folder(pipeline: Any, renderer: UnclipRenderer, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "pipe", safe_serialization=True)
    opened = UnclipRenderer.from_pretrained(str(tmp_path / "pipe"), decoder_steps=2, super_resolution_steps=2)
    columns = {"z": embeddings()}
    first, second = (r.render(columns, embeddings(), progress=False)["z"] for r in (renderer, opened))
    assert np.allclose(first, second, atol=1e-5)
    with pytest.raises(OSError, match="nowhere"):
        UnclipRenderer.from_pretrained(str(tmp_path / "nowhere"))


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install \"singreg\[unclip\]\""):
        UnclipRenderer.from_pretrained("nowhere")


def test_rows_get_the_norm_of_their_own_picture() -> None:
    z, real = embeddings(5), 7 * embeddings(5, seed=1)
    scaled = rescale_norm(z, real)
    torch.testing.assert_close(scaled.norm(dim=1), real.norm(dim=1))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(scaled, z), torch.ones(5))
    with pytest.raises(ValueError, match=r"\(5, 32\), \(4, 32\)"):
        rescale_norm(z, real[:4])
    z[3] = 0
    z[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        rescale_norm(z, real)


def test_the_columns_are_the_translations_before_after_and_steered() -> None:
    torch.manual_seed(0)
    space = NullSpace.from_weight(torch.randn(2, 6))
    translator = LinearTranslator(torch.randn(4, 6), torch.randn(4))
    f, real, steered = torch.randn(3, 6), torch.randn(3, 4), torch.randn(3, 6)
    columns = shift_columns(f, translator, space, real, steered=steered)
    assert list(columns) == ["CLIP", "T(f)", "T(f~)", "steered"]
    torch.testing.assert_close(columns["T(f~)"], translator(f - space.component(f)))
    torch.testing.assert_close(columns["steered"], translator(steered))
    assert list(shift_columns(f, translator, space, real)) == ["CLIP", "T(f)", "T(f~)"]


def test_the_sheet_has_a_row_a_picture_and_a_column_an_embedding(tmp_path: Path) -> None:
    drawn = {name: np.random.default_rng(0).random((2, 8, 8, 3)) for name in ("T(f)", "T(f~)")}
    figure = draw_rows(drawn, ["猫", "dog $5"], pictures=np.zeros((2, 6, 6, 3)))
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:3]] == ["picture", "T(f)", "T(f~)"]
    assert [figure.axes[place].get_ylabel() for place in (0, 3)] == ["\\u732b", "dog \\$5"]
    save_figure(figure, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"expected 3 pictures .* \{'T\(f\)': 2"):
        draw_rows(drawn, ["a", "b", "c"])
