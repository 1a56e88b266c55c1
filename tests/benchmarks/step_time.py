"""A training step with SingLoss against one without, in turn (A B A B ...): the ratio pair by pair.

python tests/benchmarks/step_time.py --model local-dir:FOLDER --classes 16 --pixels 128 --batch 32

Aim: a ratio of at most 1.03.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.ridge import RidgeStatistics
from singreg.task import FinetuneTask
from singreg.translator import LinearTranslator

Arm = tuple[FinetuneTask, torch.optim.Optimizer]


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=384, help="width of the vision-language model's space")
    parser.add_argument("--pairs", type=int, default=20)
    return parser.parse_args()


def arm(options: argparse.Namespace, with_loss: bool) -> Arm:
    """A classifier to train, with SingLoss or without."""
    pretrained = options.model.startswith("local-dir:")
    classifier = Classifier.from_timm(options.model, pretrained=pretrained)
    classifier.slice_head(range(options.classes))
    classifier = classifier.to(memory_format=torch.channels_last).tune("all")
    sing = None
    if with_loss:
        width, texts = classifier.feature_dim, torch.randn(options.classes, options.dim)
        sums = RidgeStatistics(width, options.dim).update(
            torch.randn(2 * width, width), torch.randn(2 * width, options.dim)
        )
        translator = LinearTranslator.from_solution(sums.solve(0.1))
        sing = SingLoss(classifier, translator, torch.nn.functional.normalize(texts), sums)
    return FinetuneTask(classifier, sing).train(), torch.optim.AdamW(classifier.parameters(), lr=1e-4)


class Stepper:
    """Trains one arm a step at a time on the same random batch; returns seconds."""

    def __init__(self, built: Arm, options: argparse.Namespace) -> None:
        self.model, self.optimizer = built
        images = torch.randn(
            options.batch, 3, options.pixels, options.pixels, generator=torch.Generator().manual_seed(0)
        )
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(options.batch) % options.classes
        self.embeddings = torch.randn(options.batch, options.dim)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.model(self.images, self.labels, None, self.embeddings)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def main() -> None:
    """Build two equal tasks, one with the loss; time their steps in turn; print milliseconds and ratios."""
    options = parse()
    torch.manual_seed(0)
    plain, regularised = (Stepper(arm(options, with_loss), options) for with_loss in (False, True))
    for _ in range(3):
        plain(), regularised()
    times = [(plain(), regularised()) for _ in range(options.pairs)]
    ratios = sorted(after / before for before, after in times)
    without, with_loss = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {options.model}, batch {options.batch}")
    print(f"step without the loss {without:.1f} ms, with it {with_loss:.1f} ms (medians of {options.pairs})")
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(f"ratio, pair by pair: median {statistics.median(ratios):.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
