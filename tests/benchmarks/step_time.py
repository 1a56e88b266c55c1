"""A training step with SingLoss against one without, in turn: the ratio pair by pair.

python tests/benchmarks/step_time.py --model local-dir:FOLDER --classes 16 --pixels 128 --batch 32

Aim: a ratio of at most 1.03.
"""

from collections.abc import Callable

import torch
from paired import compare, options

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.ridge import RidgeStatistics
from singreg.task import FinetuneTask
from singreg.translator import LinearTranslator

given = options(__doc__, model="efficientnet_lite0", classes=16, pixels=128, batch=32, dim=384, pairs=20)


def stepper(with_loss: bool) -> Callable[[], None]:
    """One training step of a classifier with SingLoss or without, always on the same random batch."""
    torch.manual_seed(0)
    classifier = Classifier.from_timm(given.model, pretrained=given.model.startswith("local-dir:"))
    classifier.slice_head(range(given.classes))
    classifier = classifier.to(memory_format=torch.channels_last).tune("all")
    width, sing = classifier.feature_dim, None
    if with_loss:
        f, z = torch.randn(2 * width, width), torch.randn(2 * width, given.dim)
        sums = RidgeStatistics(width, given.dim).update(f, z)
        texts = torch.nn.functional.normalize(torch.randn(given.classes, given.dim))
        sing = SingLoss(classifier, LinearTranslator.from_solution(sums.solve(0.1)), texts, sums)
    model = FinetuneTask(classifier, sing).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-4)
    images = torch.randn(given.batch, 3, given.pixels, given.pixels).to(memory_format=torch.channels_last)
    labels, embeddings = torch.arange(given.batch) % given.classes, torch.randn(given.batch, given.dim)

    def step() -> None:
        model(images, labels, None, embeddings)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    compare(f"step of {given.model}, batch {given.batch}", stepper(False), stepper(True), given.pairs)
