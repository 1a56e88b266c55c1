"""A training step with SingLoss against one without, in turn (A B A B ...): the ratio pair by pair.

python tests/benchmarks/step_time.py --model local-dir:FOLDER --classes 16 --pixels 128 --batch 32
python tests/benchmarks/step_time.py --model local-dir:FOLDER --classes 16 --pixels 128 --batch 32 --stream-every 20

Aim: a ratio of at most 1.03; at most 1.05 with --stream-every 20, where the translator's sums go on with every batch
and it is solved anew every 20 steps. The ratio is then of blocks of that many steps, so that each holds one solution.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from accelerate import Accelerator

from singreg.config import LoopTranslatorConfig
from singreg.data.datasets import SceneSplit
from singreg.data.scenes import sample_scenes
from singreg.loop_translator import LoopTranslator
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.task import FinetuneTask
from singreg.translator import LinearTranslator, TranslatorInfo

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
    parser.add_argument(
        "--stream-every", type=int, default=0, help="steps between two solutions of a streamed translator; 0: fixed"
    )
    return parser.parse_args()


def arm(options: argparse.Namespace, with_loss: bool) -> Arm:
    """A classifier to train, with SingLoss or without."""
    pretrained = options.model.startswith("local-dir:")
    classifier = Classifier.from_timm(
        options.model, pretrained=pretrained, head_mode="slice", class_indices=range(options.classes)
    )
    classifier = classifier.to(memory_format=torch.channels_last).tune("all")
    sing = None
    if with_loss:
        translator = LinearTranslator(torch.randn(options.dim, classifier.feature_dim), torch.zeros(options.dim))
        sing = SingLoss(
            classifier, translator, torch.nn.functional.normalize(torch.randn(options.classes, options.dim))
        )
    return FinetuneTask(classifier, sing).train(), torch.optim.AdamW(classifier.parameters(), lr=1e-4)


def streamed(model: FinetuneTask, options: argparse.Namespace) -> LoopTranslator:
    """A streamed translator whose sums hold enough images to be solved."""
    assert model.sing is not None
    config = LoopTranslatorConfig(ridge=0.1, stream_every=options.stream_every)
    bank = SceneSplit("bank", sample_scenes(options.batch, seed=0))
    first = LinearTranslator(model.sing.matrix, model.sing.offset, TranslatorInfo(ridge=0.1, by_block=True))
    found = LoopTranslator(first, bank, torch.randn(options.batch, options.dim).numpy(), config, Accelerator())
    width = model.classifier.feature_dim
    found.statistics.update(torch.randn(2 * width, width).relu(), torch.randn(2 * width, options.dim))
    return found


class Stepper:
    """Trains one arm a step at a time on the same random batch; returns seconds."""

    def __init__(self, built: Arm, options: argparse.Namespace) -> None:
        self.model, self.optimizer = built
        self.translator = (
            streamed(self.model, options) if options.stream_every and self.model.sing is not None else None
        )
        images = torch.randn(
            options.batch, 3, options.pixels, options.pixels, generator=torch.Generator().manual_seed(0)
        )
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(options.batch) % options.classes

    def __call__(self, number: int) -> float:
        start = time.perf_counter()
        self.model(self.images, self.labels)["loss"].backward()
        if self.translator is not None:
            self.translator.observe(self.model.seen_features, torch.arange(len(self.labels)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.translator is not None:
            self.translator.step_ended(number, self.model.classifier, self.model.sing)
        return time.perf_counter() - start


def main() -> None:
    """Build two equal tasks, one with the loss; time their steps in turn; print milliseconds and ratios."""
    options = parse()
    torch.manual_seed(0)
    plain, regularised = (Stepper(arm(options, with_loss), options) for with_loss in (False, True))
    block = options.stream_every or 1
    for _ in range(3):
        plain(1), regularised(1)
    times = []
    for _ in range(options.pairs):
        singles = [(plain(number), regularised(number)) for number in range(1, block + 1)]
        times.append(tuple(sum(column) / block for column in zip(*singles, strict=True)))
    ratios = sorted(after / before for before, after in times)
    without, with_loss = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {options.model}, batch {options.batch}")
    medians = f"medians of {options.pairs} blocks of {block}"
    print(f"step without the loss {without:.1f} ms, with it {with_loss:.1f} ms ({medians})")
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(f"ratio, pair by pair: median {statistics.median(ratios):.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
