"""VisionLanguageModel against open_clip's own encoders, and every way in which weights can be missing (trap 13)."""

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from singreg.models.vlm import VisionLanguageModel, needs_quick_gelu
from tests.fakes import TINY_CONFIG, images, tiny_state, write_tiny_vlm

open_model = VisionLanguageModel.from_open_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tiny_vlm(tmp_path_factory.mktemp("vlm")).removeprefix("local-dir:"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return open_model(f"local-dir:{folder}")


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry model "tiny-test" whose tag "quick" lies in a hub cache, as a download would have left it."""
    config = tmp_path / "tiny-test.json"
    config.write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(config)
    tag = {"hf_hub": "singreg-test/tiny/", "quick_gelu": True}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["quick"])
    for module in (open_clip.pretrained, open_clip.factory):
        monkeypatch.setattr(module, "get_pretrained_cfg", lambda name, key: tag if key == "quick" else {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--singreg-test--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(tiny_state(3)[1], snapshot / "open_clip_model.safetensors")
    return tmp_path


def test_image_embeddings_are_open_clips_own_and_not_normalised(vlm: VisionLanguageModel) -> None:
    with torch.no_grad():
        expected = tiny_state(0)[0].encode_image(images())  # type: ignore[operator]
    embedded = vlm.embed_images(images())
    assert torch.equal(embedded, expected)
    assert (embedded.dtype, embedded.shape, vlm.dim) == (torch.float32, (3, 24), 24)
    assert (embedded.norm(dim=1) - 1).abs().min() > 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vlm.embed_images(images()), expected)


def test_text_rows_are_unit_and_open_clips_own(vlm: VisionLanguageModel, folder: Path) -> None:
    prompts = [f"image number {i}" for i in range(257)]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    with torch.no_grad():
        expected = F.normalize(tiny_state(0)[0].encode_text(tokens), dim=-1)  # type: ignore[operator]
    rows = vlm.embed_texts(prompts)
    assert torch.allclose(rows, expected, atol=1e-6)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_a_prompt_ensemble_is_the_normalised_mean_of_unit_rows(vlm: VisionLanguageModel) -> None:
    templates, names = ("an image of a {class}", "a {class} drawn by hand", "{class}"), ["goldfish", "owl", "apple"]
    for name, row in zip(names, vlm.embed_classes(names, templates), strict=True):
        mean = torch.stack([vlm.embed_texts([t.replace("{class}", name)])[0] for t in templates]).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
    assert torch.allclose(vlm.embed_classes(["apple"]), vlm.embed_texts(["an image of a apple"]), atol=1e-6)


def test_bad_prompts_names_and_templates_are_refused(vlm: VisionLanguageModel) -> None:
    for prompts in ([], ["a dog", " "], "a dog"):
        with pytest.raises(ValueError, match="list of prompts, none blank; got"):
            vlm.embed_texts(prompts)
    for templates in (("a {class}", "a photo"), ()):
        with pytest.raises(ValueError, match=r"must contain \{class\}"):
            vlm.embed_classes(["dog"], templates)
    for names in ([], ["dog", " \t"], "dog"):
        with pytest.raises(ValueError, match="list of class names, none blank; got"):
            vlm.embed_classes(names)
    with pytest.raises(ValueError, match=r"context of \d+ tokens has no room for the prompt"):
        vlm.embed_classes(["dog", "cat"], (f"{'a bright clear photograph ' * 40}of a {{class}}",))


def test_damaged_foreign_or_missing_weights_are_refused(tmp_path: Path) -> None:
    name, weights = write_tiny_vlm(tmp_path), tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match=f"weights of {name}"):
        open_model(name)
    state = tiny_state(0)[1]
    del state["visual.proj"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"visual\.proj"):
        open_model(name)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*open_clip_model\.safetensors"):
        open_model(name)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        open_model(name)


def test_a_pickle_that_runs_code_is_not_run(registered: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(registered / "ran"),)

    torch.save({"state_dict": Bomb()}, registered / "weights.pth")
    with pytest.raises(ValueError, match="could not be loaded"):
        open_model("tiny-test", str(registered / "weights.pth"))
    assert not (registered / "ran").exists()


def test_names_without_weights_are_refused(registered: Path, folder: Path) -> None:
    for arguments, words in {
        ("tiny-test",): r"'tiny-test' needs weights: .* quick",
        ("tiny-test", "opnai"): "neither a file nor a tag of 'tiny-test'; tags: quick",
        ("ViT-L-41", "openai"): "knows no model 'ViT-L-41'",
        (f"local-dir:{folder}", "openai"): "brings its own weights",
    }.items():
        with pytest.raises(ValueError, match=words):
            open_model(*arguments)


def test_a_folder_below_home_is_found(vlm: VisionLanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_model(f"local-dir:~/{folder.name}").tag == vlm.tag


def test_a_tag_brings_its_activation_a_file_the_plain_one(registered: Path) -> None:
    path = registered / "mine.safetensors"
    save_file(tiny_state(3)[1], path)
    quick = open_model("tiny-test", "quick")
    plain = open_model("tiny-test", str(path))
    for loaded, is_quick in ((quick, True), (plain, False)):
        with torch.no_grad():
            expected = tiny_state(3, quick_gelu=is_quick)[0].encode_image(images())  # type: ignore[operator]
        assert torch.equal(loaded.embed_images(images()), expected)
    assert (quick.weights_hash != plain.weights_hash, quick.tag) == (True, "tiny-test/quick")


def test_the_papers_clip_gets_quick_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_quick_gelu("ViT-L-14", "openai") is True
    assert needs_quick_gelu("ViT-L-14", "laion2b_s32b_b82k") is False
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda *_: {"quick_gelu": False, "url": ""})
    with pytest.raises(ValueError, match="without QuickGELU: use 'ViT-L-14'"):
        needs_quick_gelu("ViT-L-14-quickgelu", "plain")
