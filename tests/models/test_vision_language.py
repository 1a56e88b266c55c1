"""VisionLanguageModel against open_clip's own encoders, and every way in which weights can be missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from singreg.models.vlm import VisionLanguageModel, _check_source
from tests.models.tiny_vlm import TINY_CONFIG, tiny_state, write_tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vlm")
    write_tiny_vlm(path)
    return path


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.from_open_clip(f"local-dir:{folder}")


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry model "tiny-test" whose tag "quick" lies in a hub cache, as a download would have left it."""
    config = tmp_path / "configs" / "tiny-test.json"
    config.parent.mkdir()
    config.write_text(json.dumps(TINY_CONFIG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(config)
    tags = {"quick": {"hf_hub": "singreg-test/tiny/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", tags)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--singreg-test--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(tiny_state(3)[1], snapshot / "open_clip_model.safetensors")
    return tmp_path


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_image_embeddings_are_open_clips_own_and_not_normalised(vlm: VisionLanguageModel) -> None:
    reference, _ = tiny_state(0)
    with torch.no_grad():
        expected = reference.encode_image(images())
    embedded = vlm.embed_images(images())
    assert torch.equal(embedded, expected)
    assert embedded.dtype == torch.float32
    assert embedded.shape == (3, vlm.dim)
    assert vlm.dim == 24
    assert (embedded.norm(dim=1) - 1).abs().min() > 0.05


def test_it_stays_in_eval_mode_and_frozen(vlm: VisionLanguageModel) -> None:
    holder = torch.nn.ModuleList([vlm]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    assert not vlm.embed_images(images().requires_grad_()).requires_grad


def test_autocast_around_it_changes_nothing(vlm: VisionLanguageModel) -> None:
    expected = vlm.embed_images(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vlm.embed_images(images()), expected)


def test_text_rows_are_unit_and_open_clips_own(vlm: VisionLanguageModel, folder: Path) -> None:
    prompts = ["a red ball", "two dogs"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    assert tokens.shape == (2, 16)
    with torch.no_grad():
        expected = F.normalize(tiny_state(0)[0].encode_text(tokens), dim=-1)
    rows = vlm.embed_texts(prompts)
    assert torch.allclose(rows, expected, atol=1e-6)
    assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_many_prompts_in_chunks_equal_one_by_one(vlm: VisionLanguageModel) -> None:
    prompts = [f"picture number {i}" for i in range(257)]
    rows = vlm.embed_texts(prompts)
    assert rows.shape == (257, 24)
    assert torch.allclose(rows[256], vlm.embed_texts([prompts[256]])[0], atol=1e-6)


def test_prompt_ensemble_is_the_normalised_mean_of_unit_rows(vlm: VisionLanguageModel) -> None:
    templates = ("an image of a {class}", "a {class} drawn by hand", "{class}")
    rows = vlm.embed_classes(["goldfish", "owl", "apple"], templates)
    for name, row in zip(["goldfish", "owl", "apple"], rows, strict=True):
        mean = torch.stack([vlm.embed_texts([t.replace("{class}", name)])[0] for t in templates]).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
    literal = vlm.embed_classes(["apple"])
    assert torch.allclose(literal, vlm.embed_texts(["an image of a apple"]), atol=1e-6)


@pytest.mark.parametrize("prompts", [[], ["a dog", " "], "a dog"])
def test_bad_prompts_are_refused(vlm: VisionLanguageModel, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"at least one prompt|blank at positions \[1\]"):
        vlm.embed_texts(prompts)


def test_bad_templates_and_names_are_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=r"must contain \{class\}.*'a photo'"):
        vlm.embed_classes(["dog"], ("a {class}", "a photo"))
    with pytest.raises(ValueError, match="must contain"):
        vlm.embed_classes(["dog"], ())
    for names in ([], ["dog", ""], ["dog", " \t"], "dog"):
        with pytest.raises(ValueError, match="list of class names, none blank; got"):
            vlm.embed_classes(names)
    with pytest.raises(ValueError, match=r"batch of images \(B, 3, H, W\), got shape \(3, 32, 32\)"):
        vlm.embed_images(images()[0])


def test_transform_and_preprocessing_say_the_same(vlm: VisionLanguageModel) -> None:
    tensor = vlm.transform(Image.new("RGB", (50, 40), (255, 0, 0)))
    assert tensor.shape == (3, 32, 32)
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([(1 - 0.5) / 0.2, -0.4 / 0.3, -0.3 / 0.4]), atol=1e-6)
    assert json.loads(json.dumps(vlm.preprocessing)) == vlm.preprocessing
    assert vlm.preprocessing["mean"] == [0.5, 0.4, 0.3]
    assert vlm.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_weights_hash_follows_the_weights(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    same = VisionLanguageModel.from_open_clip(write_tiny_vlm(tmp_path / "same", 0))
    other = VisionLanguageModel.from_open_clip(write_tiny_vlm(tmp_path / "other", 1))
    assert same.weights_hash == vlm.weights_hash != other.weights_hash


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    name = write_tiny_vlm(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*open_clip_model\.safetensors"):
        VisionLanguageModel.from_open_clip(name)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        VisionLanguageModel.from_open_clip(name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VisionLanguageModel.from_open_clip(f"local-dir:{tmp_path}/nowhere")


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    name = write_tiny_vlm(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"weights of {name}"):
        VisionLanguageModel.from_open_clip(name)
    state = tiny_state(0)[1]
    del state["visual.proj"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"visual\.proj"):
        VisionLanguageModel.from_open_clip(name)


def test_a_pickle_that_runs_code_is_not_run(registered: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(registered / "ran"),)

    torch.save({"state_dict": Bomb()}, registered / "weights.pth")
    with pytest.raises(ValueError, match="could not be loaded"):
        VisionLanguageModel.from_open_clip("tiny-test", str(registered / "weights.pth"))
    assert not (registered / "ran").exists()


def test_names_without_weights_are_refused(registered: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'tiny-test' needs weights: .* quick"):
        VisionLanguageModel.from_open_clip("tiny-test")
    with pytest.raises(ValueError, match="neither a file nor a tag of 'tiny-test'; tags: quick"):
        VisionLanguageModel.from_open_clip("tiny-test", "opnai")
    with pytest.raises(ValueError, match="knows no model 'ViT-L-41'"):
        VisionLanguageModel.from_open_clip("ViT-L-41", "openai")
    with pytest.raises(ValueError, match="brings its own weights"):
        VisionLanguageModel.from_open_clip(f"local-dir:{folder}", "openai")


def test_a_tag_is_read_from_the_cache_with_its_own_activation(registered: Path) -> None:
    loaded = VisionLanguageModel.from_open_clip("tiny-test", "quick", cache_dir=registered / "cache")
    reference = tiny_state(3, quick_gelu=True)[0]
    plain = tiny_state(3)[0]
    with torch.no_grad():
        assert torch.equal(loaded.embed_images(images()), reference.encode_image(images()))
        assert not torch.allclose(loaded.embed_images(images()), plain.encode_image(images()), atol=1e-4)
    assert loaded.tag == "tiny-test/quick"


def test_a_weight_file_gives_the_plain_architecture_and_another_hash(registered: Path) -> None:
    path = registered / "mine.safetensors"
    save_file(tiny_state(3)[1], path)
    loaded = VisionLanguageModel.from_open_clip("tiny-test", str(path))
    with torch.no_grad():
        assert torch.equal(loaded.embed_images(images()), tiny_state(3)[0].encode_image(images()))
    quick = VisionLanguageModel.from_open_clip("tiny-test", "quick", cache_dir=registered / "cache")
    assert quick.weights_hash != loaded.weights_hash


def test_the_papers_clip_gets_quick_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _check_source("ViT-L-14", "openai") is True
    assert _check_source("ViT-L-14", "laion2b_s32b_b82k") is False
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-L-14-quickgelu", {"plain": {"quick_gelu": False}})
    with pytest.raises(ValueError, match="trained without QuickGELU: use 'ViT-L-14'"):
        _check_source("ViT-L-14-quickgelu", "plain")
