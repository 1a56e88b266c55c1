"""The packaged demo models and what they see of rendered scenes, loaded once for all tests; nothing here asserts."""

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import singreg.assets
from singreg.data.scenes import SceneTable, render_scene
from singreg.models.classifier import Classifier
from singreg.models.vlm import VisionLanguageModel

ASSETS = Path(singreg.assets.__file__).parent


@cache
def demo_vlm() -> VisionLanguageModel:
    return VisionLanguageModel.from_open_clip(f"local-dir:{ASSETS / 'demo_vlm'}")


@cache
def demo_classifier() -> Classifier:
    return Classifier.from_timm(f"local-dir:{ASSETS / 'demo_classifier'}")


def rendered(table: SceneTable) -> list[Image.Image]:
    return [Image.fromarray(render_scene(table, index)) for index in range(len(table))]


def embedded(table: SceneTable) -> Tensor:
    """Embeddings of all scenes by the packaged model, (N, 64) float64."""
    vlm = demo_vlm()
    images = torch.stack([vlm.transform(image) for image in rendered(table)])
    return torch.cat([vlm.embed_images(chunk) for chunk in images.split(200)]).double()
