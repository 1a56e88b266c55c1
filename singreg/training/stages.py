"""Finished stages of a fine-tuning run: stored when they end, read back instead of repeated when the run is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from singreg.analysis.results import ModelMeasurement
from singreg.old_seals import DamagedFileError, read_rows, read_sealed, write_sealed
from singreg.training.config import FinetuneConfig
from singreg.utils import atomic_write
from singreg.workbench.run import OtherRunError, Run

logger = get_logger(__name__)
Stage = tuple[ModelMeasurement, dict[str, Tensor], dict[str, Any]]


def other_inputs(stored: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, with the beginnings of both hashes, as words for a message; empty when nothing does (no shapes).

    Example:
        >>> other_inputs({"test pictures": "a" * 64, "bank pictures": "b" * 64}, {"test pictures": "c" * 64, "bank pictures": "b" * 64})
        'other test pictures (then aaaaaaaa, now cccccccc)'
    """
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    return ", ".join(f"other {name} (then {str(stored.get(name))[:8]}, now {str(now.get(name))[:8]})" for name in names)


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
        value = {"measurement": measurement.to_json(), "extra": extra or {}}
        write_sealed(folder / "measurement.json", value, ["tensors.safetensors", "rows.npz"])

    def load(self, stage: str) -> tuple[ModelMeasurement, dict[str, Tensor], dict[str, Any]]:
        """Read a finished stage back: measurement with rows, tensors (any shape), extra values.

        Raises:
            DamagedFileError: one of its files is not what was written.
        """
        folder = self.folder / stage
        try:
            stored = read_sealed(folder / "measurement.json")
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}; remove {folder} to have this stage done again") from error
        measurement = ModelMeasurement.from_json(stored["measurement"], read_rows(folder / "rows.npz"))
        tensors = load_file(folder / "tensors.safetensors")
        # In memory of torch's own, as they were when they were computed: products round by where it begins.
        return measurement, {name: tensor.clone() for name, tensor in tensors.items()}, stored["extra"]


class FinetuneRun(Run):
    """A run that is made of stages (path `runs/NAME/checkpoints/stages`)."""

    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator, "finetune")
        self.stages = StageStore(self.folder / "checkpoints" / "stages")

    def begin(self, inputs: Mapping[str, str]) -> None:
        """Note what the run starts from (path checkpoints/inputs.json), or, when it is resumed, see that this is still the same.

        Raises:
            OtherRunError: it is not; names what differs. DamagedFileError: the note is not what was written.
        """
        path = self.folder / "checkpoints" / "inputs.json"
        if path.is_file():
            try:
                stored = read_sealed(path)
            except DamagedFileError as error:
                raise DamagedFileError(f"{error}; if data and models are as they were, remove it and resume") from error
            other = other_inputs(stored, inputs)
            if other:
                raise OtherRunError(
                    f"{path}: the run was begun with {other}, so this would not be the same run; resume where they are as they were, "
                    "or use another --name"
                )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not path.is_file():
            write_sealed(path, inputs)
        self.accelerator.wait_for_everyone()

    def stage(self, name: str, compute: Callable[[], Stage]) -> Stage:
        """The stage's result: read back when it had finished, else computed, timed and stored."""
        if self.stages.has(name):
            logger.info("stage %s is done already, read from %s", name, self.stages.folder / name)
            result = self.stages.load(name)
            self.seconds[name] = float(result[2].get("seconds", 0.0))
            return result
        start = time.monotonic()
        measurement, tensors, extra = compute()
        self.seconds[name] = time.monotonic() - start
        extra = {**extra, "seconds": self.seconds[name]}
        if self.accelerator.is_main_process:
            self.stages.save(name, measurement, tensors, extra)
        self.accelerator.wait_for_everyone()
        return measurement, tensors, extra
