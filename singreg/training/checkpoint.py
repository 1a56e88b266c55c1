"""Checkpoints of an arm in progress; a killed run leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from singreg.sealed import read_sealed, write_sealed

logger = get_logger(__name__)


@dataclass(frozen=True)
class Position:
    """Where an arm stands: optimiser steps done, current epoch, micro-batches of it already used."""

    step: int
    epoch: int
    batches: int


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
            write_sealed(temporary / "position.json", asdict(position), written)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first (a path each)."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "position.json").is_file())

    def load_latest(self, accelerator: Accelerator) -> Position | None:
        """Restore the newest whole checkpoint and say which path; a damaged one is named and the one before is used."""
        for folder in reversed(self.all()):
            try:
                position = _whole(folder)
            except (OSError, ValueError, TypeError, RuntimeError, UnpicklingError) as error:
                logger.warning("checkpoint %s cannot be read (%s); trying the one before", folder, error)
                continue
            accelerator.load_state(str(folder))
            logger.info("resuming from %s (step %d)", folder, position.step)
            return position
        return None


def _whole(folder: Path) -> Position:
    """The position of a checkpoint whose every file is what was written, and holds nothing but tensors and plain values.

    Looked at before anything is loaded: a load that fails half-way would leave its weights behind, and accelerate passes over
    random states that it cannot read.
    """
    position = Position(**read_sealed(folder / "position.json"))
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):  # accelerate would unpickle these as they are
        torch.load(path, map_location="cpu", weights_only=True)
    return position
