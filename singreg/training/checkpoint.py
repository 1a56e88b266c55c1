"""Checkpoints of an arm in progress; a killed run leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from singreg.old_seals import read_sealed, write_sealed
from singreg.utils import seed_process

logger = get_logger(__name__)


@dataclass(frozen=True)
class Position:
    """Where an arm stands: optimiser steps done, current epoch, micro-batches of it already used.

    refresh_due: it was stopped before what follows this step (the translator's refresh, the curves) was done.
    """

    step: int
    epoch: int
    batches: int
    refresh_due: bool = False


class Checkpoints:
    """The last `keep` checkpoints of one arm, each a folder written under a temporary name and renamed when whole."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, accelerator: Accelerator, position: Position) -> None:
        """Save model, optimiser, schedule, random states and the position to a new folder (path step-00000012)."""
        target = self.folder / f"step-{position.step:08d}"
        temporary = self.folder / f".writing-{position.step:08d}"
        if accelerator.is_main_process:
            for left in self.folder.glob(".writing-*"):  # by a killed run or a full disk
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            written = sorted(path.name for path in temporary.iterdir() if path.is_file())
            place = {**asdict(position), "processes": accelerator.num_processes}
            write_sealed(temporary / "position.json", place, written)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            others = [path for path in self.all() if path != target]  # names may lie: the newest is what was written last
            for old in others[: len(others) - self.keep + 1]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first (a path each)."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "position.json").is_file())

    def load_latest(self, accelerator: Accelerator, *, seed: int = 0) -> Position | None:
        """Restore the newest whole checkpoint and say which path; a damaged one is named, set aside, and the one before is used.

        The main process chooses, or processes could go on from different ones. On another number of processes the run goes on, but
        not to the bit, which is said; a process that has no random state in it draws from (seed, its number, step).
        """
        chosen = [self._choose() if accelerator.is_main_process else None]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return None
        folder, position, processes = chosen[0]
        accelerator.load_state(str(folder))
        logger.info("resuming from %s (step %d)", folder, position.step)
        if processes != accelerator.num_processes:
            logger.warning(
                "%s was written by %d process(es), this run has %d: it goes on, but to other bits than an undisturbed one",
                folder, processes, accelerator.num_processes,
            )  # fmt: skip
            if accelerator.process_index >= processes:
                seed_process(seed, accelerator.process_index, position.step)
        return position

    def _choose(self) -> tuple[Path, Position, int] | None:
        """The newest whole checkpoint, its position and the number of processes that wrote it."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return folder, *_whole(folder)
            except (OSError, ValueError, TypeError, KeyError, RuntimeError, UnpicklingError) as error:
                logger.warning("checkpoint %s cannot be read (%s); trying the one before", folder, error)
                _set_aside(folder)
        return None


def _set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint to damaged-step-..., so that it is neither counted nor chosen again; nothing is overwritten."""
    target, number = folder.with_name(f"damaged-{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    os.rename(folder, target)


def _whole(folder: Path) -> tuple[Position, int]:
    """Position and number of processes of a checkpoint whose every file is what was written, and holds but tensors and plain values.

    Looked at before anything is loaded: a load that fails half-way would leave its weights behind, and accelerate passes over
    random states that it cannot read.
    """
    stored = read_sealed(folder / "position.json")
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):  # accelerate would unpickle these as they are
        torch.load(path, map_location="cpu", weights_only=True)
    return Position(**{field.name: stored[field.name] for field in fields(Position)}), int(stored["processes"])
