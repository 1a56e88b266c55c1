"""SIGKILL a fine-tuning run at random moments, resume it, compare weights and report with those of an undisturbed run.

python -m tests.faults.kill --count 20 [--demo]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.tiny_run import arguments, differences, run

Arguments = Callable[..., list[str]]
AT_MOST = 4  # kills of one run before it is let go on to its end


@dataclass
class Counts:
    """Kills that hit a run, runs that were killed, and those that ended otherwise than the undisturbed one."""

    kills: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    stopped_at: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The result in one line."""
        same = self.runs - len(self.wrong)
        return f"kills: {self.kills} at random moments of {self.runs} runs; {same} resumed to the same bits"


def demo(out: Path, *more: str) -> list[str]:
    """Arguments of the demo as it is shipped."""
    config = Path(__file__).parents[2] / "configs" / "demo.yaml"
    return ["--config", str(config), "--out", str(out), *more]


def where(folder: Path) -> str:
    """How far a killed run had come: the last files that it finished."""
    if (folder / "report.json").is_file():
        return "report"
    done = [f"stage {path.parent.name}" for path in sorted(folder.glob("checkpoints/stages/*/stage.json"))]
    steps = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("checkpoints/*/step-*"))
    return ", ".join([*done, *steps[-1:]]) or ("begun" if folder.is_dir() else "not begun")


def kill_at_random(
    count: int, scratch: Path, *, seed: int = 0, of: Arguments = arguments, say: Callable[[str], None] = print
) -> Counts:
    """Kill `count` times at moments drawn evenly over the undisturbed run's time, each run at most AT_MOST times."""
    rng, counts, log = random.Random(seed), Counts(), scratch / "log"
    whole = run(of(scratch / "whole"), log)
    if whole.status:
        raise RuntimeError(f"the undisturbed run failed:\n{whole.said}")
    # The second start finds the embeddings, as every one after it: its time is that of the runs to be killed.
    again = run(of(scratch / "again"), log)
    if found := differences(scratch / "again", scratch / "whole"):
        raise RuntimeError(f"two undisturbed runs differ already in {found}")
    while counts.kills < count:
        folder, more, killed = scratch / f"killed-{counts.runs}", list[str](), 0
        while counts.kills < count and killed < AT_MOST:
            moment = rng.uniform(0, again.seconds)
            if run(of(folder, *more), log, signal=signal.SIGKILL, after=moment).status != -signal.SIGKILL:
                break
            killed, more, counts.kills = killed + 1, ["--resume", "true"], counts.kills + 1
            counts.stopped_at.append(where(folder))
            say(f"  kill {counts.kills} after {moment:.1f} of {again.seconds:.1f} s: {counts.stopped_at[-1]}")
        if not killed:
            continue
        ended = run(of(folder, "--resume", "true"), log)
        found = [f"exit status {ended.status}: {ended.said[-600:]}"] if ended.status else []
        found = found or differences(folder, scratch / "whole")
        counts.runs += 1
        if found:
            counts.wrong.append(f"{folder.name}: {'; '.join(found)}")
        else:
            shutil.rmtree(folder)
    return counts


def main() -> None:
    """Print the counts; exit status 1 when a run ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", action="store_true", help="the shipped demo instead of the tiny run")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
    scratch = Path(tempfile.mkdtemp(prefix="singreg-kill-"))
    os.environ["SINGREG_CACHE"] = str(scratch / "cache")
    counts = kill_at_random(given.count, scratch, seed=given.seed, of=demo if given.demo else arguments)
    print("\n".join([*counts.wrong, counts.line()]))
    if counts.wrong:
        sys.exit(f"the runs that differ are kept in {scratch}")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
