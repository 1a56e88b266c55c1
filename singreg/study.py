"""A study's arms over seeds: what each is, in which order they are made, where they are kept (METHOD 6 to 8)."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from accelerate.logging import get_logger

from singreg.analysis.arms import Images, Measured
from singreg.config import FinetuneConfig, Problems, overridden
from singreg.runs import Run
from singreg.setup import Setup
from singreg.utils import atomic_write, sha256_of_json, write_text

logger = get_logger(__name__)
OPEN = ("loss.", "training.")
"""What an arm may set for itself; anything else would leave the arms nothing to be compared on."""
PLACES = ("out", "dry_run", "resume", "log_with")  # where things go and how a run is started
WORDS = ("note", "role", "overrides")  # only said of an arm, or in its configuration already
MEASURED = ("ood", "validation_per_class", "seed")


@dataclass
class ArmConfig:
    """One arm of a study.

    Args:
        name: of the arm.
        note: what it is there for.
        role: method; baseline, which a method must beat; or placebo, which must not do what a method does.
        make: train as recipes/finetune.py does; or, without training, leave the weights as they are, align
            the head (METHOD section 7), average the weights with the starting model's (WiSE-FT), drop the null space.
        weights_from: an earlier arm that trains, whose weights of the same seed are averaged or lose their null space.
        overrides: dotted keys of the fine-tuning configuration; loss.weight 0 trains without the loss.
    """

    name: str = "sing"
    note: str = ""
    role: Literal["method", "baseline", "placebo"] = "method"
    make: Literal["train", "leave", "align", "average", "drop"] = "train"
    weights_from: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        folder = self.name.strip() and Path(self.name).name == self.name and self.name not in (".", "..")
        problems.need(bool(folder), f"name: expected a name that does for a folder, got {self.name!r}")
        fits = self.make in ("average", "drop") or self.weights_from is None
        problems.need(fits, f"weights_from: make: {self.make} begins with the starting model")
        shared = [key for key in self.overrides if not str(key).startswith(OPEN)]
        problems += [f"overrides: {key}: all arms share this; an arm may set {', '.join(OPEN)}" for key in shared]
        problems.show()


@dataclass
class StudyConfig(FinetuneConfig):
    """A run of recipes/study.py: all fields of a fine-tuning run, which every arm begins with, and these.

    Args:
        seeds: an arm that trains is trained once with each; `seed` is that of what all arms share.
        arms: see ArmConfig.
        reference: the arm that all others are compared with: plain fine-tuning with the same budget.
        claim: the arm named beforehand, about which the verdict speaks.
        validation_per_class: labelled images of every class taken from the auditor's, to choose settings on.
        ood: that many of the bank's unlabelled images count as strange ones, for AUROCs; 0 leaves those out.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[ArmConfig] = field(
        default_factory=lambda: [ArmConfig("plain", role="baseline", overrides={"loss.weight": 0}), ArmConfig("sing")]
    )
    reference: str = "plain"
    claim: str = "sing"
    validation_per_class: int = 0
    ood: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        problems, names = Problems(), [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.need(not twice, f"arms: listed twice: {', '.join(twice)}")
        wanted = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds) and min(self.seeds, default=0) >= 0
        problems.need(wanted, f"seeds: expected different whole numbers from 0, got {self.seeds}")
        for key, name in {"reference": self.reference, "claim": self.claim}.items():
            problems.need(name in names, f"{key}: there is no arm {name!r}; arms are {', '.join(names)}")
        problems.within(0, ood=self.ood, validation_per_class=self.validation_per_class)
        problems.need(not self.ood or self.data.unlabeled is not None, "ood: needs images in data.unlabeled")
        for place, arm in enumerate(self.arms):
            problems += [f"arms[{place}] ({arm.name}): {each}" for each in self._wrong_with(arm, self.arms[:place])]
        problems.show()

    def _wrong_with(self, arm: ArmConfig, earlier: Sequence[ArmConfig]) -> list[str]:
        problems, trained = Problems(), [other.name for other in earlier if other.make == "train"]
        sources = [*trained, *([] if arm.make == "average" else [None])]
        usable = f"weights_from: expected an earlier arm that trains, got {arm.weights_from!r}"
        problems.need(arm.weights_from in sources, usable)
        softmax = arm.make == "align" and self.model.invariance == "softmax"
        problems.need(not softmax, "align: empties the logits' null space of prompts; set model.invariance: logits")
        judged = arm.name != self.reference or arm.make == "train"
        problems.need(judged, f"make: the reference must train, got {arm.make}")
        try:
            arm_config(self, arm, 0)
        except ValueError as error:
            problems += [f"overrides: {line}" for line in str(error).splitlines()]
        return problems


def arm_config(config: StudyConfig, arm: ArmConfig, seed: int) -> FinetuneConfig:
    """Return the fine-tuning configuration of one arm at one seed."""
    own = {each.name: getattr(config, each.name) for each in fields(FinetuneConfig)}
    return overridden(FinetuneConfig(**{**own, "seed": seed}), arm.overrides)


@dataclass(frozen=True)
class Work:
    """One arm at one seed, to be made: its configuration, the work whose weights it begins with, hash of all inputs."""

    arm: ArmConfig
    seed: int
    config: FinetuneConfig
    source: Work | None
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
        with atomic_write(self.folder / "rows.parquet") as temporary:
            stored.pop("rows").to_parquet(temporary, index=False)
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
        return Measured(**stored, rows=pd.read_parquet(self.folder / "rows.parquet"))


def plan_study(config: StudyConfig, inputs: Mapping[str, str]) -> list[Work]:
    """List every arm at every seed, all arms of one seed before the next; `inputs` are hashes of images and models.

    An arm without randomness runs with the first seed alone.
    """
    works: dict[tuple[str | None, int], Work] = {}
    shared = [getattr(config, name) for name in MEASURED]
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
        if (self.folder / "config.yaml").is_file() and not self.config.resume:
            raise FileExistsError(
                f"{self.folder} already holds a run; use --resume true to go on with it (finished arms are read back, "
                "changed ones made again), or another --out"
            )
        return self


def hold_out(setup: Setup, per_class: int) -> tuple[Setup, Images | None]:
    """Take the first `per_class` labelled audit images of every class as validation images."""
    if not per_class:
        return setup, None
    audit, embeddings = setup.splits.audit, setup.embeddings["audit"]
    labels = pd.Series(audit.labels)
    if labels[labels >= 0].value_counts().reindex(range(len(audit.class_names)), fill_value=0).min() <= per_class:
        raise ValueError(
            f"validation_per_class is {per_class}, but a class of the audit split has no more images; lower it, "
            "or give the audit split more (data.per_class.audit, data.scenes.audit)"
        )
    chosen = (labels >= 0) & (labels.groupby(labels).cumcount() < per_class)
    taken, kept = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    splits = replace(setup.splits, audit=audit.subset(kept, "audit"))
    left = {**setup.embeddings, "audit": embeddings[kept]}
    return replace(setup, splits=splits, embeddings=left), (audit.subset(taken, "validation"), embeddings[taken])
