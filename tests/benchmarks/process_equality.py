"""One process, two and three: the same fine-tuning run, its counts, scores and weights side by side.

python tests/benchmarks/process_equality.py [--test 1003]

No number of processes divides the test images.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from paired import options
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
SMALL = "--data.augmentation none --training.epochs 1 --training.batch_size 24 --translator.refreshes 1"


def run(out: Path, processes: int, test: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Figures (degrees, shares, counts) and the trained weights of a run on scenes over so many processes."""
    scenes = f"{{train: 241, audit: 307, test: {test}, bank: 101}}"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [*SMALL.split(), "--translator.ridge", "1", "--data.scenes", scenes, "--out", str(out)]
    subprocess.run([sys.executable, *launch, str(RECIPE), *words], check=True, capture_output=True)
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))["measurements"]["sing"]
    auditor = found["translators"]["auditor"]
    figures = {name: found[name] for name in ("images", "top1", "null_share")}
    figures |= {"auditor images": auditor["fit_images"], **auditor["overall"]}
    return figures, load_file(out / "model" / "model.safetensors")


if __name__ == "__main__":
    given = options(__doc__, test=1003)
    with tempfile.TemporaryDirectory() as folder:
        runs = {count: run(Path(folder) / str(count), count, given.test) for count in (1, 2, 3)}
    table, first = pd.DataFrame({count: figures for count, (figures, _) in runs.items()}), runs[1][1]
    for count, (_, weights) in runs.items():
        apart = [float((weights[name].double() - first[name].double()).abs().max()) for name in first]
        table.loc["weights apart by", count] = max(apart)
    print(table.to_string(float_format="{:.8g}".format))
