"""Checkpoints of an arm in progress, and results of stages that are done; a killed run leaves the old or the new, never half."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from singreg.analysis.results import ModelMeasurement
from singreg.files import atomic_write, write_json

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
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / "position.json", asdict(position))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first (a path each)."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "position.json").is_file())

    def load_latest(self, accelerator: Accelerator) -> Position | None:
        """Restore the newest readable checkpoint and say which path; a damaged one is named and the one before is used."""
        for folder in reversed(self.all()):
            try:
                position = Position(**json.loads((folder / "position.json").read_text()))
                accelerator.load_state(str(folder))
            except Exception as error:  # a truncated file fails in many ways; all of them mean: not this one
                logger.warning("checkpoint %s cannot be read (%s); trying the one before", folder, error)
                continue
            logger.info("resuming from %s (step %d)", folder, position.step)
            return position
        return None


class StageStore:
    """Finished stages of a run ("before", "control", "sing"): measurement as JSON, per-image rows as npz, tensors as safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, stage: str) -> bool:
        """True when the stage finished: its JSON, written last, is there (path STAGE/measurement.json)."""
        return (self.folder / stage / "measurement.json").is_file()

    def save(
        self, stage: str, measurement: ModelMeasurement, tensors: dict[str, Tensor], extra: dict[str, Any] | None = None
    ) -> None:
        """Write a stage; the JSON comes last and marks it as done. Tensors may have any shape."""
        folder = self.folder / stage
        with atomic_write(folder / "tensors.safetensors") as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        with atomic_write(folder / "rows.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **measurement.rows)  # type: ignore[arg-type]
        write_json(folder / "measurement.json", {"measurement": measurement.to_json(), "extra": extra or {}})

    def load(self, stage: str) -> tuple[ModelMeasurement, dict[str, Tensor], dict[str, Any]]:
        """Read a finished stage back: measurement with rows, tensors, extra values."""
        folder = self.folder / stage
        stored = json.loads((folder / "measurement.json").read_text())
        with np.load(folder / "rows.npz", allow_pickle=False) as file:
            rows = {name: file[name] for name in file.files}
        measurement = ModelMeasurement.from_json(stored["measurement"], rows)
        return measurement, load_file(folder / "tensors.safetensors"), stored["extra"]
