"""A study's arms over seeds: in which order they are made, where they are kept (METHOD 6 to 8)."""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.logging import get_logger

from singreg.config import FinetuneConfig
from singreg.runs import Run
from singreg.study import ArmConfig, StudyConfig, arm_config
from singreg.study.arms import Measured
from singreg.utils import atomic_write, sha256_of_json, write_text

logger = get_logger(__name__)
PLACES = ("out", "dry_run", "resume", "log_with")  # where things go and how a run is started
WORDS = ("note", "role", "overrides")  # only said of an arm, or in its configuration already
MEASURED = ("ood", "validation_per_class", "seed")


@dataclass(frozen=True)
class Work:
    """One arm at one seed, to be made: its configuration, the work whose weights it begins with, hash of all inputs."""

    arm: ArmConfig
    seed: int
    config: FinetuneConfig
    source: "Work | None"
    digest: str
    folder: Path

    @property
    def trained(self) -> bool:
        """Whether it, or the arm it is made from, depends on the seed."""
        return self.arm.make == "train" or self.source is not None

    def make_room(self) -> None:
        """Remove what another configuration left in the folder; checkpoints of this one stay."""
        note = self.folder / "digest.txt"
        if not note.is_file() or note.read_text(encoding="utf-8") != self.digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(note, self.digest)

    def keep(self, found: Measured) -> None:
        """Write the arm's rows, then the JSON that marks it as done; its checkpoints have done their work."""
        stored = {**vars(found), "digest": self.digest}
        tables = {"rows": stored.pop("rows"), **{f"further {label}": rows for label, rows in found.further.items()}}
        for name, rows in tables.items():
            with atomic_write(self.folder / f"{name}.parquet") as temporary:
                rows.to_parquet(temporary, index=False)
        stored["further"] = [*found.further]
        write_text(self.folder / "measurement.json", json.dumps(stored, indent=1))  # with NaN, unlike a report
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def read_back(self) -> Measured | None:
        """Return what was found of the arm, or None when it is not done, or was done with another configuration."""
        path = self.folder / "measurement.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.pop("digest") != self.digest:
            said = "arm %s, seed %d was made with another configuration and is made again"
            logger.info(said, self.arm.name, self.seed)
            return None
        further = {label: pd.read_parquet(self.folder / f"further {label}.parquet") for label in stored.pop("further")}
        return Measured(**stored, rows=pd.read_parquet(self.folder / "rows.parquet"), further=further)


def plan_study(config: StudyConfig, inputs: Mapping[str, str]) -> list[Work]:
    """List every arm at every seed, all arms of one seed before the next; `inputs` are hashes of images and models.

    An arm without randomness runs with the first seed alone.
    """
    works: dict[tuple[str | None, int], Work] = {}
    shared: list[Any] = [getattr(config, name) for name in MEASURED]
    shared.append([asdict(vlm) for vlm in config.further_vlms])
    for seed, arm in itertools.product(config.seeds, config.arms):
        source, own = works.get((arm.weights_from, seed)), arm_config(config, arm, seed)
        parts: list[Any] = [{key: value for key, value in asdict(own).items() if key not in PLACES}, shared]
        parts.append({key: value for key, value in asdict(arm).items() if key not in WORDS})
        digest = sha256_of_json([*parts, source and source.digest, dict(inputs)])
        work = Work(arm, seed, own, source, digest, config.folder / "arms" / arm.name / f"seed-{seed}")
        if work.trained or seed == config.seeds[0]:
            works[arm.name, seed] = work
    return list(works.values())


class StudyRun(Run):
    """A study's folder. Its arms may change between two starts: each arm's digest says which are done."""

    def check(self) -> Run:
        """Raise if the folder holds a study and `resume` is not set."""
        self.check_place()
        if (self.folder / "config.yaml").is_file() and not self.config.resume and not self.config.dry_run:
            how = "use --resume true to go on with it (changed arms are made again), or another --out"
            raise FileExistsError(f"{self.folder} already holds a run; {how}")
        return self
