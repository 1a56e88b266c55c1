"""What only a GPU can show, in ten minutes: the CPU's figures, no waiting, step time, decompositions, memory, the demo.

python tests/gpu/check.py                         on the first CUDA device; also writes tests/gpu/results/CARD-DATE.json
python tests/gpu/check.py --device cpu --small    at toy size, without what needs CUDA: a test of this file

It prints one JSON, then the same as a table; it ends with 1 where a figure is outside its bound. Not run on a GPU yet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import singreg
from singreg.config import DataConfig
from singreg.data.embeddings import PassSettings
from singreg.data.splits import make_loader
from singreg.losses import TERMS
from singreg.task import FinetuneTask


@dataclass(frozen=True)
class Sizes:
    """Those that a claim about ResNet50 on ImageNet needs."""

    model: str = "resnet50"
    classes: int = 1000
    width: int = 2048
    dim: int = 768
    rows: int = 100_000
    pixels: int = 224
    batch: int = 128
    steps: int = 20
    images: int = 4000
    demo: tuple[str, ...] = ()


SCENES = '{"train": 64, "audit": 64, "bank": 64, "test": 64}'
SMALL = Sizes("test_resnet", 10, 96, 16, 600, 64, 8, 2, 48, ("--data.scenes", SCENES, "--training.epochs", "1"))


@dataclass
class Report:
    """Figures with their bounds."""

    device: torch.device
    cuda: bool
    sizes: Sizes
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, figure: str, value: float, most: float | None = None) -> None:
        """Add a figure that is to be at most `most`, if that is given."""
        self.rows.append({"figure": figure, "value": value, "most": most, "ok": most is None or value <= most})


def seconds(work: Callable[[], Any]) -> float:
    """How long a piece of work takes, the GPU's part too."""
    start = time.perf_counter()
    work()
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    return time.perf_counter() - start


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers, drawn on the CPU: the same for every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors over the length of the second."""
    return float((found.detach().cpu() - wanted.detach()).double().norm() / wanted.detach().double().norm())


def loss_of(head: nn.Module, sizes: Sizes, terms: dict[str, float] | None = None) -> singreg.SingLoss:
    """SingLoss of random features with some structure, on the CPU."""
    f = drawn(2 * sizes.width, sizes.width, seed=1) * torch.linspace(0.2, 2, sizes.width)
    z = f @ drawn(sizes.width, sizes.dim, seed=2) / sizes.width**0.5 + drawn(len(f), sizes.dim, seed=3)
    sums = singreg.RidgeStatistics(sizes.width, sizes.dim).update(f, z)
    texts = nn.functional.normalize(drawn(sizes.classes, sizes.dim, seed=4))
    return singreg.SingLoss(head, singreg.LinearTranslator.from_solution(sums.solve(0.01)), texts, sums, terms=terms)


def metrics(report: Report) -> None:
    """Every metric on the device against the CPU, in degrees (κ without a unit)."""
    sizes, labels, found = report.sizes, torch.arange(500) % report.sizes.classes, []
    z, z_eq, texts = (drawn(rows, sizes.dim, seed=rows) for rows in (500, 501, sizes.classes))
    z_eq = torch.cat([z[:250] + 1e-3 * z_eq[:250], z_eq[250:500]])  # angles that an arccos would lose, and others
    for device in (torch.device("cpu"), report.device):
        a, b, t, k = (each.to(device) for each in (z, z_eq, texts, labels))
        leakage, image = singreg.SemanticLeakage(texts).to(device), singreg.ImageScore().to(device)
        attribute = singreg.AttributeScore("absolute").to(device)
        leakage.update(a, b, k), image.update(a, b), attribute.update(a, b, t[k])
        found.append({**leakage.compute(), "ImageScore": image.compute(), "AttributeScore": attribute.compute()})
    for name in found[0]:
        report.add(f"metric {name}: device - CPU", abs(float(found[1][name]) - float(found[0][name])), 1e-3)


def losses(report: Report) -> None:
    """Value and gradients of every term, relative to the CPU's; on CUDA also that the forward never waits."""
    sizes, labels = report.sizes, torch.arange(report.sizes.batch) % report.sizes.classes
    for name in (*TERMS, "all"):
        found = []
        for device in (torch.device("cpu"), report.device):
            torch.manual_seed(0)
            head = nn.Linear(sizes.width, sizes.classes)
            sing = loss_of(head, sizes, None if name == "all" else {name: 1.0}).to(device)
            features = drawn(sizes.batch, sizes.width, seed=7).to(device).requires_grad_()
            inputs = features, labels.to(device), drawn(sizes.batch, sizes.dim, seed=8).to(device)
            head.to(device)
            loss = sing(*inputs)
            loss.backward()
            found.append((loss, features.grad, head.weight.grad))
        for what, bound, cpu, there in zip(("value", "d features", "d head"), (1e-4, 1e-3, 1e-3), *found, strict=True):
            if bool(cpu.detach().any()):  # capacity has no gradient to the features
                report.add(f"loss {name}, {what}: relative to the CPU", apart(there, cpu), bound)
    if report.cuda:
        torch.cuda.set_sync_debug_mode("error")  # a wait ends the whole check, with the line that waits
        sing(*inputs)
        torch.cuda.set_sync_debug_mode("default")
        report.add("synchronisations inside SingLoss.forward", 0, 0)


def steps(report: Report, compile: bool = False) -> None:
    """A training step with and without the loss, in turn, in bf16 and channels-last, and the peak of memory."""
    sizes, device, cuda, arms = report.sizes, report.device, report.cuda, {}
    images = drawn(sizes.batch, 3, sizes.pixels, sizes.pixels, seed=9).to(device, memory_format=torch.channels_last)
    labels = torch.arange(sizes.batch, device=device) % sizes.classes
    embeddings = drawn(sizes.batch, sizes.dim, seed=8).to(device)

    def step(task: FinetuneTask, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task(images, labels, None, embeddings)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    name = "compiled step" if compile else "step"
    for which in ("without", "with"):
        classifier = singreg.Classifier.from_timm(sizes.model, pretrained=False, num_classes=sizes.classes).tune("all")
        sing = loss_of(classifier, sizes) if which == "with" else None
        task = FinetuneTask(classifier, sing, compile=compile).to(device, memory_format=torch.channels_last).train()
        arms[which] = task, torch.optim.AdamW(classifier.parameters(), lr=1e-4)
        for _ in range(3):
            step(*arms[which])
        if cuda:
            before = torch.cuda.memory_allocated()  # the weights, and the other arm's
            torch.cuda.reset_peak_memory_stats()
            step(*arms[which])
            used = (torch.cuda.max_memory_allocated() - before) / 1e9
            report.add(f"{name} {which} the loss: peak memory beyond weights, GB", used)
    pairs = [[seconds(lambda arm=arm: step(*arm)) for arm in arms.values()] for _ in range(sizes.steps)]
    for which, column in zip(arms, zip(*pairs, strict=True), strict=True):
        report.add(f"{name} {which} the loss, ms", 1000 * statistics.median(column))
    report.add(f"{name}: with / without the loss", statistics.median(b / a for a, b in pairs), 1.03 if cuda else None)


def decompositions(report: Report) -> None:
    """A head's null space, and a ridge regression from streamed rows: seconds here and on the CPU, and the distance."""
    sizes, nulls, matrices = report.sizes, [], []
    weight, probes = drawn(sizes.classes, sizes.width, seed=10), drawn(64, sizes.width, seed=11)
    for name, device in (("CPU", torch.device("cpu")), ("device", report.device)):
        rows, found = weight.to(device), []
        singreg.NullSpace.from_weight(rows)  # the first call loads libraries
        took = seconds(lambda rows=rows, found=found: found.append(singreg.NullSpace.from_weight(rows)))
        report.add(f"null space of {tuple(weight.shape)} on the {name}, s", took)
        nulls.append(found[0].component(probes.to(device)))
        sums, took = singreg.RidgeStatistics(sizes.width, sizes.dim, device=device), 0.0
        for start in range(0, sizes.rows, 5000):
            f = drawn(min(5000, sizes.rows - start), sizes.width, seed=start)
            pair = f.to(device), (f[:, : sizes.dim] + drawn(len(f), sizes.dim, seed=start + 1)).to(device)
            took += seconds(lambda sums=sums, pair=pair: sums.update(*pair))
        took += seconds(lambda sums=sums: matrices.append(sums.solve(0.01).matrix))
        report.add(f"ridge {sizes.rows}x{sizes.width} to {sizes.dim} on the {name}, s", took)
    report.add("null components: relative to the CPU", apart(nulls[1], nulls[0]), 1e-5)
    report.add("ridge matrix: relative to the CPU", apart(matrices[1], matrices[0]), 1e-6)


def analysis(report: Report) -> None:
    """Images per second of an auditor's fit and a whole analysis, against the bare passes they need."""
    sizes, device, cuda = report.sizes, report.device, report.cuda
    splits = singreg.load_splits(DataConfig(scenes={"train": 8, "audit": sizes.images, "test": sizes.images}))
    classifier = singreg.Classifier.from_timm(sizes.model, pretrained=False, num_classes=10, image_size=sizes.pixels)
    classifier.to(device, memory_format=torch.channels_last)
    settings = PassSettings(sizes.batch, 16 if cuda else 0, progress=False)  # at most a worker a core
    z, texts = drawn(sizes.images, 512, seed=12).numpy(), nn.functional.normalize(drawn(10, 512, seed=13)).to(device)

    @torch.no_grad()
    def bare() -> None:
        for part in (splits.audit, splits.test):
            for images, _, _ in make_loader(part, classifier.transform, sizes.batch, workers=settings.workers):
                classifier(images.to(device, non_blocking=True))

    def whole() -> None:
        fitted = singreg.fit_on_split(classifier, splits.audit, z, settings=settings)
        judges = {"auditor": fitted.translator}
        singreg.analyze_model(classifier, splits.test, z, texts, judges, mean=fitted.mean, settings=settings)

    bare()  # once, for the libraries
    pairs = [(seconds(bare), seconds(whole)) for _ in range(3)]
    for name, took in zip(("bare passes", "analysis"), zip(*pairs, strict=True), strict=True):
        report.add(f"{name}, images/s", 2 * sizes.images / statistics.median(took))
    report.add("analysis / bare passes", statistics.median(b / a for a, b in pairs), 1.05 if cuda else None)


def demo(report: Report) -> None:
    """The demo end to end: seconds, and the auditor's AS⁻ of SingLoss over that of the control."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SINGREG_CACHE": folder, "PYTHONPATH": "."}
        environment |= {} if report.cuda else {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "recipes/finetune.py", "--config", "configs/demo.yaml", "--out", f"{folder}/demo"]
        run: Any = {"check": True, "stdout": sys.stderr, "env": environment, "cwd": Path(__file__).parents[2]}
        report.add("demo, s", seconds(lambda: subprocess.run([*command, *report.sizes.demo], **run)))
        found = json.loads(Path(folder, "demo", "report.json").read_text())["measurements"]
    control, sing = (found[arm]["translators"]["auditor"]["overall"]["AS_neg"] for arm in ("control", "sing"))
    report.add("demo: AS_neg, SingLoss / control", sing / control, None if report.sizes.demo else 0.5)


def main() -> int:
    """Run everything, print JSON and table, return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    report = Report(torch.device(given.device), cuda, SMALL if given.small else Sizes())
    for check in (metrics, losses, decompositions, analysis, demo, steps):
        check(report)
    steps(report, compile=True) if cuda else None
    skipped = [] if cuda else ["no synchronisation inside SingLoss.forward", "compiled step", "peak memory"]
    facts = {
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "small": given.small,
    }
    text = json.dumps({**facts, "torch": torch.__version__, "skipped": skipped, "figures": report.rows}, indent=1)
    print(text, pd.DataFrame(report.rows).to_markdown(index=False, floatfmt=".4g"), sep="\n")
    print(f"skipped: {', '.join(skipped) or 'nothing'}")
    if cuda and not given.small:
        target = Path(__file__).parent / "results" / f"{facts['card']}-{facts['date']}.json".replace(" ", "-")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text + "\n")
    return int(not all(row["ok"] for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
