"""How long `import singreg` and `recipes/finetune.py --help` take against importing torch, timm and open_clip, process by process.

OMP_NUM_THREADS=1 python tests/benchmarks/startup.py

Every run is a process of its own, in turn. Aim: `import singreg` at most 1.2 times the three. Because `import singreg` loads
nothing until a name is used, the import of every public name is timed as well: what it costs in the end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from paired import machine, ratio_line

ROOT = Path(__file__).parents[2]
BASE = "import torch, timm, open_clip"
OURS = {
    "import singreg": ["-c", "import singreg"],
    "every public name": ["-c", "from singreg import *"],
    "finetune.py --help": ["recipes/finetune.py", "--help"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """(clock, processor) seconds of one interpreter with these arguments; it must succeed."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    work = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, work


def main() -> None:
    """Time all in turn; the first round, which fills the disk cache, does not count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=sorted(OURS), help="one of them")
    arguments = parser.parse_args()
    chosen = {name: OURS[name] for name in ([arguments.only] if arguments.only else OURS)}
    commands = [["-c", BASE], *chosen.values()]
    print(f"start-up; {machine()}")
    for command in commands:
        seconds(command)
    rounds = [[seconds(command) for command in commands] for _ in range(arguments.pairs)]
    for place, name in enumerate(chosen, start=1):
        for kind, column in (("clock", 0), ("processor seconds", 1)):
            print(
                ratio_line(f"{name} / {BASE}, {kind}", [(times[place][column], times[0][column]) for times in rounds])
            )


if __name__ == "__main__":
    main()
