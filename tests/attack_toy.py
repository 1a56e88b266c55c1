"""Four images of 48 pixels and a linear model of them, so that linear algebra knows what an attack can reach."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from singreg.analysis.attack import PixelModel, attack_split
from singreg.analysis.attack_judges import Judge, judge_images
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.translator import LinearTranslator

TAU = 0.1  # tight for the toy's logits, so that forgetting it shows
SMALL, LARGE = "linf 2/255", "linf 8/255"
SETTINGS: dict[str, Any] = {"tau": TAU, "linf": [2, 8], "steps": 12, "restarts": 2, "batch_size": 4, "seed": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Noise(ImageSplit):
    """Random images of 4 x 4 pixels, far enough from black and white that no budget meets an edge."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__("test", ("a", "b", "c"), labels, np.zeros((len(labels), 32), np.uint8))

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(40, 216, (4, 4, 3), dtype=np.uint8))

    def identifier(self, index: int) -> str:
        return str(index)


class Linear(nn.Module):
    """Logits that are linear in the pixels, through features that are the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=seeded(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@cache
def parts() -> tuple[PixelModel, LinearTranslator, Tensor, Tensor, pd.DataFrame]:
    """The model (3 logits, so 45 directions are free), a translator, prompts, images, and which they are."""
    classifier = Classifier.from_module(Linear()).requires_grad_(False)
    classifier.own_transform = to_tensor
    classifier.data_config = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "input_size": (3, 4, 4)}
    model, split, places = PixelModel(classifier), Noise(np.arange(8) % 3), [3, 1, 4, 7]
    x = torch.stack([model.image(split, place) for place in places])
    translator = LinearTranslator(torch.randn(5, 48, generator=seeded(1)), torch.zeros(5))
    texts = normalize(torch.randn(3, 5, generator=seeded(2)), dim=-1)
    label = model(x)[1].argmax(1)
    chosen = {"image": places, "identifier": list("abcd"), "label": label, "target": (label + 1) % 3}
    return model, translator, texts, x, pd.DataFrame(chosen)


def judged(folder: Path, **changed: Any) -> pd.DataFrame:
    """The toy through the whole chain: attack, PNG, judges."""
    model, translator, texts, _, chosen = parts()
    split = Noise(np.arange(8) % 3)
    rows = attack_split(model, translator, split, chosen, texts, folder, "toy", **(SETTINGS | changed))
    judges = [Judge(name, model, translator, texts) for name in ("fitted", "auditor")]
    return judge_images(rows.assign(model="toy"), folder, model, judges, TAU)
