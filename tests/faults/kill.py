"""SIGKILL a fine-tuning run at random moments, resume it, and compare weights and report with those of an undisturbed run.

python -m tests.faults.kill --count 20 [--demo]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.processes import demo, differences, run, tiny

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
        same = self.runs - len(self.wrong)
        return f"kills: {self.kills} at random moments of {self.runs} runs; {same} of {self.runs} resumed to the same bits"


def where(folder: Path) -> str:
    """How far a killed run had come: the last file or folder that it finished."""
    done = sorted((path.parent.name for path in folder.glob("checkpoints/stages/*/measurement.json")), key=str)
    steps = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("checkpoints/*/step-*"))
    if (folder / "report.json").is_file():
        return "report"
    return ", ".join([*(f"stage {name}" for name in done), *steps[-1:]]) or ("begun" if folder.is_dir() else "not begun")


def kill_at_random(
    count: int, scratch: Path, *, seed: int = 0, of: Arguments = tiny, at_most: int = AT_MOST, say: Callable[[str], None] = print
) -> Counts:
    """Kill `count` times at moments drawn evenly over the undisturbed run's time; every run is killed up to `at_most` times."""
    rng, cache, counts = random.Random(seed), scratch / "cache", Counts()
    whole = run(of(scratch / "whole", cache), scratch / "whole.log")
    if whole.status:
        raise RuntimeError(f"the undisturbed run failed:\n{whole.said}")
    # The second start finds the embeddings, as every one after it: its time is that of the runs to be killed.
    again = run(of(scratch / "again", cache), scratch / "again.log")
    if found := differences(scratch / "again" / "run", scratch / "whole" / "run"):
        raise RuntimeError(f"two undisturbed runs differ already in {found}")
    shutil.rmtree(scratch / "again")
    while counts.kills < count:
        folder, more, killed = scratch / f"killed-{counts.runs}", [], 0
        while counts.kills < count and killed < at_most:
            moment = rng.uniform(0, again.seconds)
            ended = run(of(folder, cache, *more), scratch / f"killed-{counts.runs}.log", signal=signal.SIGKILL, after=moment)
            if ended.status != -signal.SIGKILL:
                break
            killed, more = killed + 1, ["--resume", "true"]
            counts.kills += 1
            counts.stopped_at.append(where(folder / "run"))
            say(f"  kill {counts.kills} after {moment:.1f} s of {again.seconds:.1f} s: {counts.stopped_at[-1]}")
        if not killed:
            continue
        ended = run(of(folder, cache, "--resume", "true"), scratch / f"killed-{counts.runs}.log")
        if ended.status:
            found = [f"exit status {ended.status}: {ended.said[-600:]}"]
        else:
            found = differences(folder / "run", scratch / "whole" / "run")
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
    parser.add_argument("--at-most", type=int, default=AT_MOST, help="kills of one run")
    parser.add_argument("--demo", action="store_true", help="the shipped demo instead of the tiny run")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="singreg-kill-"))
    counts = kill_at_random(given.count, scratch, seed=given.seed, of=demo if given.demo else tiny, at_most=given.at_most)
    print("\n".join([*counts.wrong, counts.line()]))
    if counts.wrong:
        sys.exit(f"the runs that differ are kept in {scratch}")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
