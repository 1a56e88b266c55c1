"""A study's arms: what each is, in which order they are made, and where a finished one is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from accelerate.logging import get_logger
from safetensors.torch import save_file

from singreg.analysis.study import ArmRun
from singreg.config import FinetuneConfig, Problems, VLMConfig, overridden
from singreg.models.classifier import Classifier
from singreg.runs import Run
from singreg.utils import atomic_write, sha256_of_json, write_json, write_text

logger = get_logger(__name__)
OPEN = ("loss.", "training.", "translator.", "model.tuning", "model.batch_norm")
"""What an arm may set for itself; anything else would leave the arms nothing to be compared on."""
PLACES = ("out", "dry_run", "resume", "log_with")  # where things go and how a run is started
WORDS = ("note", "role", "control_of", "seeds", "overrides")  # only said of an arm, or in its configuration already
MEASURED = ("mlp_auditor", "ood", "validation_per_class", "further_vlms", "seed")


@dataclass
class ArmConfig:
    """One arm of a study.

    Args:
        name: of the arm.
        note: what it is there for.
        role: method; baseline, which a method must beat; or placebo, which must not do what a method does.
        train: none (edit and measure), head (on stored features of the starting backbone), all (fine-tuning).
        aligned: begin with the language-aligned head (METHOD section 7), to the placebo's prompts under loss.placebo.
        constrain: keep its row space while training.
        drop_null: end by folding f → Π_p f into the head (METHOD section 9 f): no null space is left to measure.
        interpolation: share of the arm's own weights in the mean with the starting model's (WiSE-FT); 1 is its own.
        weights_from: an earlier arm whose weights of the same seed this one begins with.
        control_of: the arm a placebo stands beside; null takes the one that is claimed or chosen.
        seeds: how many of the study's seeds, from the first; null for all.
        overrides: dotted keys of the fine-tuning configuration; loss.weight 0 trains without the loss.
    """

    name: str = "sing"
    note: str = ""
    role: Literal["method", "baseline", "placebo"] = "method"
    train: Literal["none", "head", "all"] = "all"
    aligned: bool = False
    constrain: bool = False
    drop_null: bool = False
    interpolation: float = 1.0
    weights_from: str | None = None
    control_of: str | None = None
    seeds: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        folder = self.name.strip() and Path(self.name).name == self.name and self.name not in (".", "..")
        problems.need(bool(folder), f"name: expected a name that does for a folder, got {self.name!r}")
        problems.within(0, 1, interpolation=self.interpolation)
        problems.within(1, seeds=self.seeds)
        placebo = self.control_of is None or self.role == "placebo"
        problems.need(placebo, "control_of: expected role placebo beside it")
        problems.need(not self.constrain or self.aligned, "constrain: keeps an aligned head's rows; set aligned: true")
        alone = self.weights_from is None or not (self.aligned or self.train == "head")
        problems.need(alone, "weights_from: aligned and train: head stand on the starting backbone's features")
        for key in self.overrides:
            problems.need(
                str(key).startswith(OPEN), f"overrides: {key}: all arms share this; an arm may set {', '.join(OPEN)}"
            )
        problems.show()


@dataclass
class StudyConfig(FinetuneConfig):
    """A run of recipes/study.py: all fields of a fine-tuning run, which every arm begins with, and these.

    Args:
        seeds: an arm that trains is trained once with each; `seed` is that of what all arms share.
        arms: see ArmConfig.
        reference: the arm that all others are compared with: plain fine-tuning with the same budget.
        claim: the arm chosen beforehand to be judged; null takes the best one on the validation images, or without
            those the best on the test images, and the report says which.
        validation_per_class: labelled images of every class taken from the auditor's, to choose an arm on.
        agreement_sizes: numbers of images at which two auditors on disjoint images are compared before training.
        further_vlms: at most one more vision-language model, a second judge with an auditor of its own.
        mlp_auditor: one more, non-linear auditor; minutes an arm.
        ood: that many of the bank's unlabelled images count as strange ones, for AUROCs; 0 leaves those out.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[ArmConfig] = field(
        default_factory=lambda: [ArmConfig("plain", role="baseline", overrides={"loss.weight": 0}), ArmConfig("sing")]
    )
    reference: str = "plain"
    claim: str | None = None
    validation_per_class: int = 0
    agreement_sizes: list[int] = field(default_factory=list)
    further_vlms: list[VLMConfig] = field(default_factory=list)
    mlp_auditor: bool = False
    ood: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        problems, names = Problems(), [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.need(not twice, f"arms: listed twice: {', '.join(twice)}")
        wanted = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds) and min(self.seeds, default=0) >= 0
        problems.need(wanted, f"seeds: expected different whole numbers from 0, got {self.seeds}")
        for key in ("reference", "claim"):
            name = getattr(self, key)
            problems.need(name in (None, *names), f"{key}: there is no arm {name!r}; arms are {', '.join(names)}")
        problems.need(len(self.further_vlms) <= 1, f"further_vlms: expected at most one, got {len(self.further_vlms)}")
        problems.within(0, ood=self.ood, validation_per_class=self.validation_per_class)
        problems.within(2, agreement_sizes=min(self.agreement_sizes, default=2))
        problems.need(not self.ood or self.data.unlabeled is not None, "ood: needs images in data.unlabeled")
        for place, arm in enumerate(self.arms):
            problems += [f"arms[{place}] ({arm.name}): {each}" for each in self._wrong_with(arm, self.arms[:place])]
        problems.show()

    def _wrong_with(self, arm: ArmConfig, earlier: Sequence[ArmConfig]) -> list[str]:
        """What is wrong with an arm among the others."""
        problems, sources = Problems(), {other.name: other for other in earlier}
        source = sources.get(arm.weights_from or "")
        if arm.weights_from is not None:
            usable = source is not None and not source.drop_null
            problems.need(usable, f"weights_from: expected an earlier arm with a null space, got {arm.weights_from!r}")
        known = arm.control_of is None or arm.control_of in {other.name for other in self.arms}
        problems.need(known, f"control_of: there is no arm {arm.control_of!r}")
        softmax = arm.aligned and self.model.invariance == "softmax"
        problems.need(not softmax, "aligned: empties the logits' null space of prompts; set model.invariance: logits")
        problems.need(not (arm.name == self.reference and arm.drop_null), "drop_null: the reference must be measured")
        try:
            loss = arm_config(self, arm, 0).loss
            balanced = arm.train == "head" and loss.balance > 0 and loss.weight > 0
            problems.need(not balanced, "loss.balance: is for fine-tuning; set it to 0 where the head alone trains")
        except ValueError as error:
            problems += [f"overrides: {line}" for line in str(error).splitlines()]
        return problems


def arm_config(config: StudyConfig, arm: ArmConfig, seed: int) -> FinetuneConfig:
    """Return the fine-tuning configuration of one arm at one seed.

    Raises:
        ValueError: names every override that is wrong.
    """
    own = {each.name: getattr(config, each.name) for each in dataclasses.fields(FinetuneConfig)}
    return overridden(FinetuneConfig(**{**own, "seed": seed}), arm.overrides)


class StudyRun(Run):
    """A study's folder. Its arms may change between two starts: each arm's digest says which are done."""

    def check(self) -> Run:
        """Raise now what `open` would raise later.

        Raises:
            FileExistsError: the folder holds a study and `resume` is False.
        """
        if (self.folder / "config.yaml").is_file() and not self.config.resume:
            raise FileExistsError(
                f"{self.folder} already holds a run; use --resume true to go on with it (finished arms are read back, "
                "changed ones made again), or another --out"
            )
        return self


@dataclass(frozen=True)
class Work:
    """One arm at one seed.

    Attributes:
        config: its fine-tuning configuration.
        source: the work whose weights it begins with.
        trained: a seed makes a difference: it is trained, or its source is.
        digest: hash of all that decides its figures.
        folder: weights.safetensors, rows.parquet and, written last, measurement.json.
    """

    arm: ArmConfig
    seed: int
    config: FinetuneConfig
    source: Work | None
    trained: bool
    digest: str
    folder: Path


def plan_study(config: StudyConfig, inputs: Mapping[str, str]) -> list[Work]:
    """List every arm at every seed, all arms of one seed before the next.

    An arm without randomness runs with the first seed alone, and an arm made from it takes that one.

    Args:
        inputs: hashes of images and models, part of what an arm is.
    """
    works: dict[tuple[str, int], Work] = {}
    settings, first = asdict(config), config.seeds[0]
    for seed in config.seeds:
        for arm in config.arms:
            source = works.get((arm.weights_from or "", seed))
            if source is None and (fixed := works.get((arm.weights_from or "", first))) and not fixed.trained:
                source = fixed
            trained = arm.train != "none" or (source is not None and source.trained)
            among = config.seeds[: arm.seeds] if trained else [first]
            if seed not in among or (arm.weights_from is not None and source is None):
                continue
            own = arm_config(config, arm, seed)
            parts = [
                {key: value for key, value in asdict(own).items() if key not in PLACES},
                {key: value for key, value in asdict(arm).items() if key not in WORDS},
                {name: settings[name] for name in MEASURED},
                source and source.digest,
                dict(inputs),
            ]
            folder = config.folder / "arms" / arm.name / f"seed-{seed}"
            works[arm.name, seed] = Work(arm, seed, own, source, trained, sha256_of_json(parts), folder)
    return list(works.values())


def make_room(work: Work) -> None:
    """Make room for work on an arm: what another configuration left is removed, checkpoints of this one stay."""
    note = work.folder / "digest.txt"
    if not note.is_file() or note.read_text(encoding="utf-8") != work.digest:
        shutil.rmtree(work.folder, ignore_errors=True)
        write_text(note, work.digest)


def save_weights(work: Work, classifier: Classifier) -> None:
    """Write all tensors of an arm's model."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in classifier.model.state_dict().items()}
    with atomic_write(work.folder / "weights.safetensors") as temporary:
        save_file(state, temporary)


def keep(work: Work, run: ArmRun) -> None:
    """Write a finished arm's rows, then the JSON that marks it as done; its checkpoints have done their work."""
    if run.rows is not None:
        with atomic_write(work.folder / "rows.parquet") as temporary:
            run.rows.to_parquet(temporary, index=False)
    stored = {name: getattr(run, name) for name in ("figures", "intervals", "extra", "validation", "seconds")}
    write_json(work.folder / "measurement.json", {"digest": work.digest, "measured": run.rows is not None, **stored})
    shutil.rmtree(work.folder / "checkpoints", ignore_errors=True)


def described(work: Work, **found: Any) -> ArmRun:
    """Return a run of an arm: what its configuration says of it, and what was found."""
    arm = work.arm
    words = {name: getattr(arm, name) for name in ("role", "train", "note", "control_of")}
    return ArmRun(arm=arm.name, seed=work.seed, trained=work.trained, **words, **found)


def read_back(work: Work) -> ArmRun | None:
    """Return a finished arm, or None when it is not done, or was done with another configuration, which is said."""
    path = work.folder / "measurement.json"
    if not path.is_file():
        return None
    stored = _numbers(json.loads(path.read_text(encoding="utf-8")))
    if stored.pop("digest") != work.digest:
        logger.info("arm %s, seed %d was made with another configuration and is made again", work.arm.name, work.seed)
        return None
    rows = pd.read_parquet(work.folder / "rows.parquet") if stored.pop("measured") else None
    return described(work, rows=rows, **stored)


def _numbers(value: Any) -> Any:
    """NaN for every figure that is not defined, which JSON has as null."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return float("nan") if value is None else value


def time_left(works: Sequence[Work], found: Sequence[ArmRun | None]) -> str:
    """Say about how long works that were not found done take, by the mean time of those of the same kind, or of any."""
    spent: dict[str, list[float]] = {}
    for run in found:
        if run is not None:
            spent.setdefault(run.train, []).append(run.seconds)
    if not spent:
        return ""
    every = [seconds for kind in spent.values() for seconds in kind]
    left = [work.arm.train for work, run in zip(works, found, strict=True) if run is None]
    total = sum(float(np.mean(spent.get(kind, every))) for kind in left)
    return f" (about {total / 60:.0f} min left)"
