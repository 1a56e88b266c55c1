"""What a run keeps to go on with: an arm's checkpoints, finished stages, and what the run was begun with."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from singreg.analysis.comparison import Measured
from singreg.models.vlm import hash_of_state
from singreg.runs import Run
from singreg.setup import Setup
from singreg.utils import atomic_write, plain, seed_process, write_json

logger = get_logger(__name__)
KEEP = 2  # checkpoints of an arm that stay
BROKEN = (OSError, ValueError, TypeError, KeyError, SafetensorError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Position:
    """Where an arm stands: optimiser steps done, the epoch, micro-batches of it already used."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    due: bool = False  # what follows this step (the translator's refresh, the curves) is still to be done


class Checkpoints:
    """The last checkpoints of one arm, each a folder that is filled under another name and then renamed."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def save(self, position: Position) -> None:
        """Save the training's state and the position."""
        target = self.folder / f"step-{position.step:08d}"
        temporary = self.folder / f".writing-{position.step:08d}"
        if self.accelerator.is_main_process:
            for left in self.folder.glob(".writing-*"):  # by a killed run or a full disk
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = sorted(path.name for path in temporary.iterdir())
            place = {**asdict(position), "processes": self.accelerator.num_processes, "files": files}
            write_json(temporary / "position.json", place)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            others = sorted(path for path in self.folder.glob("step-*") if path != target)
            for old in others[: len(others) - KEEP + 1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_latest(self, *, seed: int) -> Position:
        """Restore the newest whole checkpoint; without one, the position is the beginning.

        The main process chooses, or processes could go on from different ones. On another number of processes the run
        goes on, but not to the bit; a process without a random state in it draws from (seed, its number, step).
        """
        chosen = [self._newest() if self.accelerator.is_main_process else None]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return Position()
        folder, position, processes = chosen[0]
        self.accelerator.load_state(str(folder))
        if self.accelerator.is_main_process:
            logger.info("resuming from %s (step %d)", folder, position.step)
        now, rank = self.accelerator.num_processes, self.accelerator.process_index
        if processes != now:
            said = "%s was written by %d process(es), this run has %d: it goes on, but not to the same bits"
            logger.warning(said, folder, processes, now)
        if rank >= processes:
            seed_process(seed, rank, position.step)
        return position

    def _newest(self) -> tuple[Path, Position, int] | None:
        """Find the newest whole checkpoint; broken ones are named and renamed, or they would crowd out new ones."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return folder, *_whole(folder)
            except BROKEN as error:
                logger.warning("checkpoint %s is broken (%s); trying the one before", folder, error)
                os.replace(folder, mkdtemp(prefix=f"broken-{folder.name}-", dir=self.folder))
        return None


def _whole(folder: Path) -> tuple[Position, int]:
    """Position and number of processes of a checkpoint whose every file can be read, before anything is loaded."""
    stored = json.loads((folder / "position.json").read_text(encoding="utf-8"))
    for path in (folder / name for name in stored.pop("files")):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # or it says that the file was cut
                pass
        elif zipfile.ZipFile(path).testzip() is not None:  # what torch.save writes, with check sums
            raise ValueError(f"{path} is not what was written")
    processes = stored.pop("processes")
    return Position(**stored), processes


def stage(run: Run, name: str, compute: Callable[[], Measured]) -> Measured:
    """Return a stage's rows and figures: read back from the run's folder where it had finished, else computed and kept.

    The JSON is written last and marks the stage as done. Figures that are not defined are None, fresh or stored.
    """
    folder = run.folder / "checkpoints" / "stages" / name
    done = folder / "stage.json"
    if done.is_file():
        logger.info("stage %s is done already, read from %s", name, folder)
        stored = json.loads(done.read_text(encoding="utf-8"))
        run.seconds[name] = stored["seconds"]
        return pd.read_parquet(folder / "rows.parquet"), stored["figures"]
    with run.timed(name):
        rows, figures = compute()
    figures = plain(figures)
    if run.accelerator.is_main_process:
        with atomic_write(folder / "rows.parquet") as temporary:
            rows.to_parquet(temporary)
        write_json(done, {"figures": figures, "seconds": run.seconds[name]})
    run.accelerator.wait_for_everyone()
    return rows, figures


def fingerprints(setup: Setup) -> dict[str, str]:
    """Return hashes of all that a run starts from beside its configuration, by what they are called in messages."""
    return {
        **{f"{split.name} images": split.fingerprint for split in setup.splits},
        "starting classifier": hash_of_state(setup.classifier.model),
        "classifier's preprocessing": setup.info.classifier_preprocessing,
        "vision-language model": setup.info.vlm_weights_hash,
        "vision-language model's preprocessing": setup.info.vlm_preprocessing,
    }


def refuse_other_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Note what a run starts from; refuse to resume with other inputs, and name them."""
    path = run.folder / "checkpoints" / "inputs.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else inputs
    other = [name for name in {**stored, **inputs} if stored.get(name) != inputs.get(name)]
    if other:
        told = [f"other {name} (then {stored.get(name, '')[:8]}, now {inputs.get(name, '')[:8]})" for name in other]
        raise SystemExit(f"error: {path}: the run was begun with {', '.join(told)}; use another --out")
    run.accelerator.wait_for_everyone()  # all have looked before it is there
    if run.accelerator.is_main_process:
        write_json(path, inputs)
    run.accelerator.wait_for_everyone()
