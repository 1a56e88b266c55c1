"""Finished arms of a study, on disk: each whole or not at all, read back when its configuration is still the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file

from singreg.analysis.results import nan_for_null, nulls_for_nan
from singreg.analysis.study.arm_results import ArmFigures
from singreg.analysis.study.results import ArmRun
from singreg.models.classifier import Classifier
from singreg.old_seals import DamagedFileError, read_rows, read_sealed, write_sealed, write_sealed_text
from singreg.training.stages import other_inputs
from singreg.training.study_config import ArmConfig, StudyConfig, arm_config
from singreg.utils import atomic_write, sha256_of_json, sweep, write_text
from singreg.workbench.run import Run

logger = get_logger(__name__)
FORMAT = 2
ELSEWHERE = ("name", "runs", "cache", "dry_run", "resume")
"""Where things go and how a run is started: no part of what an arm is."""
WORDS = ("note", "role", "control_of", "seeds", "overrides")
"""What is only said of an arm, or is in its configuration already."""
MEASURED = ("halves", "mlp_auditor", "corruptions", "ood", "ood_count", "attributes", "validation_per_class")
"""How every arm is measured."""


class StudyRun(Run):
    """A study's folder (path `runs/NAME`). Its arms may be changed between two starts: each arm's own hash says which are done."""

    config: StudyConfig

    def check(self) -> StudyRun:
        """Raise now what `open` would raise later (no shapes).

        Raises:
            FileExistsError: the folder holds a study and `resume` is False.
        """
        if (self.folder / "config.yaml").is_file() and not self.config.resume:
            raise FileExistsError(
                f"{self.folder} already holds a run; use --resume true to go on with it (finished arms are read back, changed ones "
                "are made again), or another --name for a new one"
            )
        return self

    def open(self) -> StudyRun:
        """Create the folder, or go on in it, and write the resolved configuration (path config.yaml)."""
        self.check()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            sweep(self.folder)
            write_sealed_text(self.folder / "config.yaml", self._resolved())
        self.accelerator.wait_for_everyone()
        return self


def arm_hash(config: StudyConfig, arm: ArmConfig, seed: int, source: str | None, inputs: Mapping[str, str]) -> str:
    """SHA-256 of all that decides an arm's figures: its resolved configuration, seed, how it is measured, the hashes of pictures and
    models (`inputs`), and `source`, the hash of the arm whose weights it takes (no shapes)."""
    own = dataclasses.asdict(arm_config(config, arm, seed))
    measured = {name: getattr(config, name) for name in MEASURED}
    value = {
        "config": {key: item for key, item in own.items() if key not in ELSEWHERE},
        "arm": {key: item for key, item in dataclasses.asdict(arm).items() if key not in WORDS},
        "measured": {**measured, "shared_seed": config.seed, "vlms": [dataclasses.asdict(vlm) for vlm in config.further_vlms]},
        "source": source,
        "inputs": dict(inputs),
    }
    return sha256_of_json(value)


class ArmStore:
    """One arm at one seed (path arms/ARM/seed-K): weights.safetensors, rows.npz and, written last, measurement.json."""

    def __init__(
        self, folder: Path, arm: ArmConfig, seed: int, digest: str, *, trained: bool = True, inputs: Mapping[str, str] | None = None
    ) -> None:
        self.arm, self.seed, self.digest, self.trained, self.inputs = arm, seed, digest, trained, dict(inputs or {})
        self.folder = folder / "arms" / arm.name / f"seed-{seed}"

    @property
    def checkpoints(self) -> Path:
        """Where its training keeps checkpoints until it is measured (a path)."""
        return self.folder / "checkpoints"

    @property
    def weights(self) -> Path:
        """All tensors of its model (a path)."""
        return self.folder / "weights.safetensors"

    def load(self) -> ArmRun | None:
        """The finished arm, or None when it is not done, or was done with another configuration, which is said (no shapes).

        Raises:
            DamagedFileError: one of its files is not what was written.
        """
        try:
            stored = read_sealed(self.folder / "measurement.json")
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}; remove {self.folder} to have this arm made again") from error
        if stored.get("format") != FORMAT or stored["hash"] != self.digest:
            why = other_inputs(stored.get("inputs", {}), self.inputs) or "another configuration"
            logger.info("arm %s, seed %d was made with %s and is made again", self.arm.name, self.seed, why)
            return None
        rows = read_rows(self.folder / "rows.npz")
        figures = None if stored["figures"] is None else ArmFigures.from_json(stored["figures"], rows)
        return self._run(figures, stored["extra"], stored["seconds"], nan_for_null(stored["validation"]))

    def begin(self) -> None:
        """Make room for work on this arm: what another configuration left is removed, checkpoints of this one stay (a path)."""
        note = self.folder / "hash.txt"
        if not note.is_file() or note.read_text(encoding="utf-8") != self.digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(note, self.digest)

    def save_weights(self, classifier: Classifier) -> None:
        """Write all tensors of the model (any shapes)."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in classifier.model.state_dict().items()}
        with atomic_write(self.weights) as temporary:
            save_file(state, temporary)

    def load_weights(self, classifier: Classifier) -> None:
        """Put the stored tensors into a classifier of the same architecture, in place (any shapes)."""
        classifier.model.load_state_dict(load_file(self.weights))

    def save(self, figures: ArmFigures | None, extra: dict[str, Any], seconds: float, validation: dict[str, float]) -> None:
        """Write rows (N,), then the JSON that marks the arm as done; its checkpoints have done their work."""
        with atomic_write(self.folder / "rows.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **({} if figures is None else figures.rows))  # type: ignore[arg-type]
        value = {
            "format": FORMAT,
            "hash": self.digest,
            "inputs": self.inputs,
            "figures": None if figures is None else figures.to_json(),
            "extra": nulls_for_nan(extra),
            "seconds": seconds,
            "validation": nulls_for_nan(validation),
        }
        write_sealed(self.folder / "measurement.json", value, ["rows.npz", self.weights.name])
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _run(self, figures: ArmFigures | None, extra: dict[str, Any], seconds: float, validation: dict[str, float]) -> ArmRun:
        arm = self.arm
        return ArmRun(
            arm=arm.name, role=arm.role, train=arm.train, note=arm.note, seed=self.seed, figures=figures, extra=extra, seconds=seconds,
            trained=self.trained, control_of=arm.control_of, validation=validation,
        )
