"""A whole analysis (auditor fit, then `analyze_model`) against the bare forward passes it needs, in turn.

python tests/benchmarks/analysis_speed.py
python tests/benchmarks/analysis_speed.py --model local-dir:FOLDER --data FOLDER --classes imagenet16 --pixels 128

Bare means the same images through the same loader and model, and nothing kept. The auditor's targets and the class texts are
random unit vectors, as embeddings are cached. Aim: a ratio of at most 1.05 on a real classifier; the packaged one is so small
that what does not grow with the images weighs more there.
"""

import numpy as np
import torch
from paired import compare, options

from singreg.analysis.features import fit_on_split
from singreg.analysis.scores import analyze_model
from singreg.config import DataConfig, ModelConfig
from singreg.data.datasets import load_splits
from singreg.data.embeddings import PassSettings
from singreg.data.splits import ImageSplit, make_loader
from singreg.setup import build_classifier

SIZES = {"pixels": 0, "audit": 1600, "test": 1000, "batch": 64, "dim": 512, "pairs": 5}
given = options(__doc__, model="demo", data="scenes", classes="", **SIZES)
scenes = {"train": 32, "audit": given.audit, "test": given.test} if given.data == "scenes" else {}
pixels = given.pixels or None
found = load_splits(DataConfig(given.data, image_size=pixels, scenes=scenes, classes=given.classes or None))
classifier = build_classifier(ModelConfig(given.model), found, image_size=pixels)
settings = PassSettings(given.batch, progress=False)


def unit(count: int) -> torch.Tensor:
    """Random unit rows."""
    return torch.nn.functional.normalize(torch.randn(count, given.dim), dim=1)


def spread(part: ImageSplit, count: int) -> ImageSplit:
    """At most `count` images, from all over the part: a folder keeps the classes together."""
    return part.subset(np.linspace(0, len(part) - 1, min(count, len(part))).astype(int))


parts = [spread(found.audit, given.audit), spread(found.test, given.test)]
texts, targets = unit(classifier.num_classes), [unit(len(part)).numpy() for part in parts]


def bare() -> None:
    """Forward passes over all images."""
    with torch.no_grad():
        for part in parts:
            for images, _, _ in make_loader(part, classifier.transform, given.batch):
                classifier(images)


def whole() -> None:
    """The analysis."""
    fitted = fit_on_split(classifier, parts[0], targets[0], settings=settings)
    judges = {"auditor": fitted.translator}
    analyze_model(classifier, parts[1], targets[1], texts, judges, mean=fitted.mean, settings=settings)


if __name__ == "__main__":
    compare(f"analysis of {classifier.tag}, {sum(map(len, parts))} images", bare, whole, given.pairs)
