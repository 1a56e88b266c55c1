"""Embeddings drawn by a tiny, randomly initialised UnCLIP pipeline; those tests need the extra `singreg[unclip]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import steer as recipe
from singreg import setup as models
from singreg import unclip
from singreg.analysis.steering import PairPlan
from singreg.plots.steering import draw_sheet
from singreg.unclip import choose_shown, open_pipeline, render, rescale_norm
from tests.test_steer import arguments, steer

WIDTH, SIDE = 32, 32
FEW = {"decoder_steps": 2, "super_resolution_steps": 2, "progress": False}


def embeddings(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with byte tokens and no merges: the pipeline only ever tokenises the empty prompt."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = CLIPTokenizer.from_pretrained(str(folder))
    made.model_max_length = 16
    return made


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of a few thousand weights for 32-dimensional embeddings and images of 32 pixels."""
    diffusers = pytest.importorskip("diffusers", reason="the extra singreg[unclip] is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra singreg[unclip] is not installed")
    _, parts = unclip.pipeline_parts()
    torch.manual_seed(0)
    both = {"hidden_size": WIDTH, "projection_dim": WIDTH, "intermediate_size": 37, "num_attention_heads": 4}
    both |= {"num_hidden_layers": 1}
    words = {"vocab_size": 1000, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    decoder = {
        "sample_size": SIDE // 2,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
    }
    larger = {
        "sample_size": SIDE,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    vision = transformers.CLIPVisionConfig(**both, image_size=32, patch_size=16)
    noise = {"variance_type": "learned_range", "prediction_type": "epsilon", "num_train_timesteps": 1000}
    return diffusers.UnCLIPImageVariationPipeline(
        decoder=parts["decoder"](**decoder),
        text_encoder=parts["text_encoder"](transformers.CLIPTextConfig(**both, **words)),
        tokenizer=tokenizer(tmp_path_factory.mktemp("tokenizer")),
        text_proj=parts["text_proj"](clip_embeddings_dim=WIDTH, time_embed_dim=32 * 4, cross_attention_dim=32),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=parts["image_encoder"](vision),
        super_res_first=parts["super_res_first"](**larger),
        super_res_last=parts["super_res_last"](**larger),
        decoder_scheduler=parts["decoder_scheduler"](**noise),
        super_res_scheduler=parts["super_res_scheduler"](**{**noise, "variance_type": "fixed_small_log"}),
    )


def test_images_of_a_row_differ_by_their_embeddings_alone(pipeline: Any) -> None:
    """The same embedding in two columns gives the same image, every time; in two rows it has other noise."""
    one = embeddings(1).repeat(2, 1)
    columns = {"a": one, "b": one, "c": embeddings(seed=2)}
    drawn = render(pipeline, columns, one, **FEW)
    assert {name: image.shape for name, image in drawn.items()} == dict.fromkeys(columns, (2, SIDE, SIDE, 3))
    assert all(image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1 for image in drawn.values())
    assert np.array_equal(drawn["a"], drawn["b"])
    assert not np.array_equal(drawn["a"][0], drawn["a"][1])
    assert not np.array_equal(drawn["a"][0], drawn["c"][0])
    torch.rand(5)
    again, other = (render(pipeline, columns, one, seed=seed, **FEW) for seed in (0, 9))
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)
    assert not np.array_equal(drawn["a"], other["a"])


def test_drawings_are_diffusers_own_of_rescaled_embeddings(pipeline: Any) -> None:
    z, real = embeddings(), embeddings(seed=3)
    drawn, shrunk = (render(pipeline, {"z": scale * z}, real, seed=4, **FEW)["z"] for scale in (1.0, 0.25))
    assert np.allclose(drawn, shrunk, atol=1e-4)  # the norm of a translation does not matter
    assert not np.allclose(drawn, render(pipeline, {"z": z}, 5 * real, seed=4, **FEW)["z"], atol=1e-3)
    for row in range(2):
        expected = pipeline(
            image_embeddings=(z[row] / z[row].norm() * real[row].norm())[None],
            generator=torch.Generator().manual_seed(4 + row),
            decoder_num_inference_steps=2,
            super_res_num_inference_steps=2,
            output_type="np",
        )
        assert np.allclose(drawn[row], expected.images[0], atol=1e-5)


def test_a_saved_pipeline_is_opened_by_its_folder(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "pipe", safe_serialization=True)
    opened, columns = open_pipeline(str(tmp_path / "pipe")), {"z": embeddings()}
    first, second = (render(each, columns, embeddings(), **FEW)["z"] for each in (pipeline, opened))
    assert np.allclose(first, second, atol=1e-5)
    with pytest.raises(OSError, match="nowhere"):
        open_pipeline(str(tmp_path / "nowhere"))


class Fake:
    """Draws an embedding as a grey image and remembers it, in place of diffusers' pipeline."""

    def __init__(self, width: int) -> None:
        self.text_proj = SimpleNamespace(config=SimpleNamespace(clip_embeddings_dim=width))
        self.decoder, self.device = torch.nn.Linear(1, 1), torch.device("cpu")
        self.seen: list[tuple[torch.Tensor, int]] = []

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, *, image_embeddings: torch.Tensor, generator: torch.Generator, **_: Any) -> Any:
        self.seen.append((image_embeddings[0], generator.initial_seed()))
        return SimpleNamespace(images=[np.full((12, 12, 3), 0.5)])


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draws 32-dimensional embeddings and 'T\(f\)' is \(2, 64\)"):
        render(Fake(WIDTH), {"T(f)": torch.ones(2, 64)}, embeddings())
    with pytest.raises(ValueError, match="'real' is"):
        render(Fake(WIDTH), {"T(f)": embeddings()}, torch.ones(2, 64))
    with pytest.raises(ValueError, match="no column"):
        render(Fake(WIDTH), {}, embeddings())


def test_rows_get_the_norm_of_their_own_image() -> None:
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


def test_every_source_shows_its_first_image_and_targets_take_turns() -> None:
    wanted, chosen = torch.tensor([[True, True], [False, False], [True, True]]), [False, True, True, True, False, True]
    plan = PairPlan(("a", "b", "c"), ("x", "y"), torch.tensor([4, 2, 7]), torch.eye(2), wanted, np.array(chosen))
    labels = np.array([4, 7, 4, 2, 4, 7])
    assert choose_shown(plan, labels, 5) == [(2, 0, 0), (1, 2, 1)]  # b has no target
    assert choose_shown(plan, labels, 1) == [(2, 0, 0)]


def test_the_sheet_has_a_row_an_image_and_a_column_a_drawing(tmp_path: Path) -> None:
    drawn = {name: np.random.default_rng(0).random((2, 8, 8, 3)) for name in ("T(f)", "T(f~)")}
    assert Image.open(draw_sheet(drawn, ["猫", "dog $5"], tmp_path / "sheet.png")).size == (484, 561)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A pipeline of the demo's width that the recipe opens."""
    made = Fake(models.open_vlm(models.VLMConfig(), SimpleNamespace(device="cpu")).embed_texts(["a"]).shape[1])
    monkeypatch.setattr(unclip, "pipeline_parts", lambda: None)
    monkeypatch.setattr(unclip, "open_pipeline", lambda *_, **__: made)
    return made


def test_the_recipe_draws_a_row_a_source_into_the_report(fake: Fake, tmp_path: Path) -> None:
    report = steer(tmp_path / "drawn", "--unclip", "some/pipeline", "--seed", "5")
    shown = report["shown"]
    assert [(s["source"], s["target"]) for s in shown] == [("circle", "star"), ("star", "an image of grass")]
    assert all(s["step"] > 0 for s in shown)
    assert [seed for _, seed in fake.seen] == [5] * 4 + [6] * 4  # one noise a row: CLIP, T(f), T(f~), steered
    lengths = torch.stack([z for z, _ in fake.seen]).norm(dim=1).reshape(2, 4)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(2, 4))  # of the image's own embedding
    assert Image.open(tmp_path / "drawn" / "plots" / "unclip.png").size[0] > 500
    assert (tmp_path / "drawn" / "report.html").read_text().count("data:image/png") == 3


def test_out_of_reach_is_said_and_not_drawn(fake: Fake, tmp_path: Path) -> None:
    report = steer(tmp_path / "far", "--unclip", "x", "--image_score", "179.5")
    assert [s["step"] for s in report["shown"]] == [None, None]
    assert "2 images cannot reach the score and are not drawn" in (tmp_path / "far" / "report.md").read_text()
    assert not fake.seen


def test_what_cannot_draw_stops_the_recipe_before_any_work(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    fake.text_proj.config.clip_embeddings_dim += 1
    with pytest.raises(SystemExit, match="some/pipeline draws no embeddings of"):
        steer(tmp_path / "width", "--unclip", "some/pipeline")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(
        recipe, "prepare", lambda *_: pytest.fail("data and models were loaded although nothing can draw")
    )
    with pytest.raises(SystemExit, match=r'unclip: .*pip install "singreg\[unclip\]"'):
        recipe.main(arguments(tmp_path / "extra", "--unclip", "some/pipeline"))
    assert list(tmp_path.iterdir()) == []
