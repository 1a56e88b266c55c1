"""One process, two and three: the same fine-tuning run, its counts, scores and weights side by side.

python tests/benchmarks/process_equality.py [--test 1003]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(folder: Path, processes: int, test: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """report.json and the trained weights of a run on scenes over so many processes."""
    out = folder / f"over-{processes}"
    flags = {
        "data.scenes": f"{{train: 241, audit: 307, test: {test}, bank: 101}}",
        "data.augmentation": "none",
        "training.epochs": 1,
        "training.batch_size": 24,
        "translator.refreshes": 1,
        "translator.ridge": 1,
        "out": out,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "recipes" / "finetune.py"), *words]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "SINGREG_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report, load_file(out / "model" / "model.safetensors")


def figures(report: dict[str, Any]) -> dict[str, float]:
    """What is compared, by name (degrees, shares, counts)."""
    found = report["measurements"]["sing"]
    auditor = found["translators"]["auditor"]
    named = {f"auditor {name}": auditor["overall"][name] for name in ("AS_neg", "AS_abs", "IS", "kappa")}
    counts = {"test images": found["images"], "auditor images": auditor["fit_images"]}
    return {**counts, "top-1": found["top1"], "null share": found["null_share"], **named}


def main() -> None:
    """Print the table: a row a figure, a column a number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=int, default=1003, help="test images; no number of processes divides them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {processes: run(Path(folder), processes, given.test) for processes in (1, 2, 3)}
    tables = {processes: figures(report) for processes, (report, _) in runs.items()}
    print(f"{'':18}" + "".join(f"{f'{n} process(es)':>18}" for n in tables))
    for name in tables[1]:
        print(f"{name:18}" + "".join(f"{table[name]:18.8g}" for table in tables.values()))
    first = runs[1][1]
    apart = {
        n: max(float((weights[k].double() - first[k].double()).abs().max()) for k in first)
        for n, (_, weights) in runs.items()
    }
    largest = max(float(value.double().abs().max()) for value in first.values())
    line = "".join(f"{value:18.2g}" for value in apart.values())
    print(f"{'weights apart by':18}{line}   (largest weight {largest:.3g})")


if __name__ == "__main__":
    main()
