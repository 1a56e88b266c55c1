"""How time and memory grow with the number of features: a simulated stream through statistics, scores, histograms and null share.

OMP_NUM_THREADS=1 python tests/benchmarks/growth.py --out growth.png

10⁴, 10⁵ and 10⁶ features (m = 2048), each count in a process of its own so that its peak memory is its own; chunks are drawn,
used and dropped. Everything runs that one pass over a million images would: ridge statistics, both translations, SemanticLeakage
(with its histograms), AttributeScore, ImageScore and the null share. Prints a line a count, and writes the figure
and, beside it, its numbers as JSON. Aim: peak memory at 10⁶ within 10 % of that at 10⁵, and time in proportion.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from paired import options

CHUNK, CLASSES = 4096, 100


def memory_mib(wanted: str) -> float:
    """MiB this process holds now (VmRSS), or has held at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith(wanted))
    return int(line.split()[1]) / 1024


def stream(count: int, features: int, dim: int) -> dict[str, float]:
    """Measure one count in this process: seconds, and memory in MiB at the peak and before it began."""
    from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
    from singreg.nullspace import NullSpace, null_share
    from singreg.ridge import RidgeStatistics

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, features, generator=g)
    matrix = torch.randn(dim, features, generator=g) / features**0.5
    means, texts = torch.randn(CLASSES, features, generator=g), torch.randn(CLASSES, dim, generator=g)
    before = memory_mib("VmRSS:")
    wall, work = time.perf_counter(), time.process_time()
    space, statistics = NullSpace.from_weight(weight), RidgeStatistics(features, dim)
    leakage, attribute, image = SemanticLeakage(texts), AttributeScore("negative"), ImageScore()
    share = 0.0
    for start in range(0, count, CHUNK):
        labels = torch.arange(start, min(start + CHUNK, count)) % CLASSES
        f = torch.randn(len(labels), features, generator=g).add_(means[labels]).relu_()
        null = space.component(f)
        z, z_eq = f @ matrix.T, (f - null) @ matrix.T
        statistics.update(f, z)
        leakage.update(z, z_eq, labels)
        attribute.update(z, z_eq, texts[labels])
        image.update(z, z_eq)
        share += float(null_share(f, null).double().sum())
    assert int(leakage.compute()["count"]) == int(statistics.count) == count
    seconds = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - work}
    scores = {"AS_neg": float(attribute.compute()), "IS": float(image.compute()), "null_share": share / count}
    return {"count": count, **seconds, "peak_mib": memory_mib("VmHWM:"), "before_mib": before, **scores}


def draw(rows: list[dict[str, float]], out: Path) -> None:
    """Time and peak memory against the count, on logarithmic axes, with the line of proportion."""
    from matplotlib.figure import Figure  # only here: no part of the memory that is measured

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [row["count"] for row in rows]
    left.loglog(counts, [row["processor_seconds"] for row in rows], "o-", label="measured")
    proportion = [rows[-1]["processor_seconds"] * count / counts[-1] for count in counts]
    left.loglog(counts, proportion, "--", label="in proportion")
    left.set(xlabel="features", ylabel="processor seconds")
    left.legend()
    right.semilogx(counts, [row["peak_mib"] for row in rows], "o-", label="at the peak")
    right.semilogx(counts, [row["before_mib"] for row in rows], "--", label="before the first feature")
    right.set(xlabel="features", ylabel="memory in MiB", ylim=(0, 1.3 * max(row["peak_mib"] for row in rows)))
    right.legend()
    figure.savefig(out, dpi=150)


def main() -> None:
    """One process a count, the last one `largest`; the figure, the JSON and what the aims ask for."""
    given = options(__doc__, largest=10**6, features=2048, dim=256, out="growth.png", alone=0)
    if given.alone:
        print(json.dumps(stream(given.alone, given.features, given.dim)))
        return
    rows: list[dict[str, float]] = []
    for count in (given.largest // 100, given.largest // 10, given.largest):
        sizes = ["--alone", str(count), "--features", str(given.features), "--dim", str(given.dim)]
        done = subprocess.run([sys.executable, __file__, *sizes], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    memory, work = (rows[-1][key] / rows[-2][key] for key in ("peak_mib", "processor_seconds"))
    print(f"{rows[-1]['count']} / {rows[-2]['count']} features: peak memory ratio {memory:.3f}, time ratio {work:.2f}")
    content = {"machine": platform.machine(), "features": given.features, "dim": given.dim, "rows": rows}
    Path(given.out).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, Path(given.out))


if __name__ == "__main__":
    main()
