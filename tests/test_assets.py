"""The packaged models: unchanged small files, opened by the public loaders, that see what the demo needs seen."""

import hashlib
import json
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from singreg.data.scenes import ATTRIBUTES, SHAPES, sample_scenes
from tests.demo import ASSETS, demo_classifier, demo_vlm, embedded, rendered

BUILDER = runpy.run_path(str(Path(__file__).parents[1] / ".github" / "build_demo.py"))
BIAS, PROMPTS = BUILDER["BIAS"], BUILDER["PROMPTS"]
COUNT = 400
FRESH = 20_240_601  # no seed of the builder's, which are 0 to 4
PROVENANCE = json.loads((ASSETS / "provenance.json").read_text(encoding="utf-8"))


@cache
def seen() -> Tensor:
    return embedded(sample_scenes(COUNT, seed=FRESH))


def test_files_are_those_the_provenance_names() -> None:
    """Ten megabytes at most."""
    models = [path for kind in ("demo_vlm", "demo_classifier") for path in (ASSETS / kind).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in models) <= 10 * 10**6
    found = {path.relative_to(ASSETS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in models}
    assert found == PROVENANCE["sha256"]


def zero_shot(attribute: str, prompts: list[str]) -> np.ndarray:
    """Whether the attribute of every fresh scene is the one whose prompt lies nearest: (N,) bool."""
    texts = demo_vlm().embed_texts(prompts).double()
    return (seen() @ texts.T).argmax(1).numpy() == sample_scenes(COUNT, seed=FRESH).codes[attribute]


@pytest.mark.parametrize("attribute", ["shape", "color", "background"])
def test_the_vision_language_model_names_what_it_sees_on_fresh_scenes(attribute: str) -> None:
    prompts = [PROMPTS[attribute][0].format(value) for value in ATTRIBUTES[attribute]]
    assert zero_shot(attribute, prompts).mean() >= 0.9
    turned = prompts[1:] + prompts[:1]  # the control: with the wrong names it is wrong
    assert zero_shot(attribute, turned).mean() < 0.1


def accuracy(bias: float) -> float:
    table = sample_scenes(COUNT, seed=FRESH, background_bias=bias)
    model = timm.create_model(f"local-dir:{ASSETS / 'demo_classifier'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = rendered(table)
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in images]))
        ours = demo_classifier()(torch.stack([demo_classifier().transform(image) for image in images[:50]]))
    torch.testing.assert_close(ours, logits[:50])
    return float((logits.argmax(1).numpy() == table.codes["shape"]).mean())


def test_the_classifier_opens_with_plain_timm_and_leans_on_the_background() -> None:
    """Far above the chance of 10 %, yet not done: the background it was trained with helps it."""
    biased, unbiased = accuracy(BIAS), accuracy(0.0)
    assert unbiased > 0.7
    assert biased > unbiased + 0.05
    assert demo_classifier().weight.shape[0] == len(SHAPES)
    assert demo_classifier().feature_dim > 2 * len(SHAPES)  # so there is a null space to speak of
