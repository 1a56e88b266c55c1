"""A whole analysis (auditor fit, then `analyze_model`) against the bare forward passes it needs, in turn.

python tests/benchmarks/analysis_speed.py
python tests/benchmarks/analysis_speed.py --model local-dir:FOLDER --data FOLDER --classes imagenet16 --pixels 128

Bare means the same images through the same loader and the same model, and nothing kept. Both read every image of the audit
and the test part once. The auditor's targets and the class texts are random unit vectors: no vision-language model runs, and it
would not on a second run either, since its embeddings are cached. Aim: at least 95 % of the bare speed on a real classifier; the
packaged one is so small (milliseconds a batch) that what does not grow with the images weighs more there.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from paired import machine, pairs, ratio_line

from singreg.analysis.fitting import fit_on_split
from singreg.analysis.scores import analyze_model
from singreg.config import DataConfig, ModelConfig
from singreg.data.datasets import ImageSplit, load_splits, make_loader
from singreg.data.embeddings import PassSettings
from singreg.models.classifier import Classifier
from singreg.setup import build_classifier


def bare(classifier: Classifier, parts: list[ImageSplit], batch: int) -> None:
    """Forward passes over all images."""
    with torch.no_grad():
        for part in parts:
            for images, _, _ in make_loader(part, classifier.transform, batch):
                classifier(images)


def unit(count: int, dim: int) -> torch.Tensor:
    """Random unit rows (count, dim)."""
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(count)), dim=1)


def spread(part: ImageSplit, count: int) -> ImageSplit:
    """At most `count` images, from all over the part: a folder keeps the classes together."""
    return part.subset(np.linspace(0, len(part) - 1, min(count, len(part))).astype(int))


def main() -> None:
    """Build, run both once, then in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="scenes", help="scenes, or a folder with train/ and validation/")
    parser.add_argument("--classes", help="of the folder: a named set; default all")
    parser.add_argument("--pixels", type=int, help="side of the model's input; default its own")
    parser.add_argument("--audit", type=int, default=1600, help="images for the auditor, in all")
    parser.add_argument("--test", type=int, default=1000, help="images measured, in all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=512, help="width of the vision-language model's space")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    scenes = {"train": 32, "audit": options.audit, "test": options.test} if options.data == "scenes" else {}
    config = DataConfig(options.data, image_size=options.pixels, scenes=scenes, classes=options.classes)
    found = load_splits(config)
    audit, test = spread(found.audit, options.audit), spread(found.test, options.test)
    classifier = build_classifier(ModelConfig(options.model), found, image_size=options.pixels)
    texts, targets = (
        unit(classifier.num_classes, options.dim),
        [unit(len(part), options.dim).numpy() for part in (audit, test)],
    )
    settings = PassSettings(options.batch, progress=False)

    def whole() -> None:
        fitted = fit_on_split(classifier, audit, targets[0], settings=settings)
        analyze_model(
            classifier, test, targets[1], texts, {"auditor": fitted.translator}, mean=fitted.mean, settings=settings
        )

    times = pairs(lambda: bare(classifier, [audit, test], options.batch), whole, options.pairs)
    size = f"{len(audit)} + {len(test)} images, batch {options.batch}, {classifier.feature_dim} features"
    print(f"analysis of {classifier.tag}, {size}; {machine()}")
    print(ratio_line("speed of the analysis / bare forward passes, clock", times.wall))
    print(ratio_line("speed of the analysis / bare forward passes, processor seconds", times.work))


if __name__ == "__main__":
    main()
