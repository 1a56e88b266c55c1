"""A study's arms over seeds: what each is, in which order they are made, how (METHOD 6 and 7), where they are kept."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from singreg.analysis.arms import Images, Measured
from singreg.analysis.features import PassSettings, cached_features, gathered, iterate_features
from singreg.analysis.fitting import FittedTranslator, fit_on_split, reference_image_scores
from singreg.config import FinetuneConfig, Problems, overridden
from singreg.loop import Arm, own_random_numbers, train_head
from singreg.loop_translator import LoopTranslator
from singreg.models.classifier import Classifier
from singreg.models.edits import align_head_, constrain_to_rows, interpolate_weights, release_rows
from singreg.report import log, track
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.runs import Run, StopRequest
from singreg.setup import Setup
from singreg.task import make_sing
from singreg.terms import placebo_texts
from singreg.translator import LinearTranslator
from singreg.utils import atomic_write, sha256_of_json, write_text

logger = get_logger(__name__)
OPEN = ("loss.", "training.", "translator.", "model.tuning", "model.batch_norm")
"""What an arm may set for itself; anything else would leave the arms nothing to be compared on."""
PLACES = ("out", "dry_run", "resume", "log_with")  # where things go and how a run is started
WORDS = ("note", "role", "control_of", "seeds", "overrides")  # only said of an arm, or in its configuration already
MEASURED = ("ood", "validation_per_class", "seed")


@dataclass
class ArmConfig:
    """One arm of a study.

    Args:
        name: of the arm.
        note: what it is there for.
        role: method; baseline, which a method must beat; or placebo, which must not do what a method does.
        train: none (edit and measure), head (on stored features of the starting backbone), all (fine-tuning).
        aligned: begin with the language-aligned head (METHOD section 7) and keep its row space while training; aligned
            to the placebo's prompts under loss.placebo.
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
        alone = self.weights_from is None or not (self.aligned or self.train == "head")
        problems.need(alone, "weights_from: aligned and train: head stand on the starting backbone's features")
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
        claim: the arm chosen beforehand to be judged; null takes the best one on the validation images.
        validation_per_class: labelled images of every class taken from the auditor's, to choose an arm on.
        ood: that many of the bank's unlabelled images count as strange ones, for AUROCs; 0 leaves those out.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[ArmConfig] = field(
        default_factory=lambda: [ArmConfig("plain", role="baseline", overrides={"loss.weight": 0}), ArmConfig("sing")]
    )
    reference: str = "plain"
    claim: str | None = "sing"
    validation_per_class: int = 0
    ood: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        problems, names = Problems(), [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.need(not twice, f"arms: listed twice: {', '.join(twice)}")
        wanted = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds) and min(self.seeds, default=0) >= 0
        problems.need(wanted, f"seeds: expected different whole numbers from 0, got {self.seeds}")
        named = {f"arms[{i}] ({arm.name}): control_of": arm.control_of for i, arm in enumerate(self.arms)}
        for key, name in {"reference": self.reference, "claim": self.claim, **named}.items():
            problems.need(name in (None, *names), f"{key}: there is no arm {name!r}; arms are {', '.join(names)}")
        problems.within(0, ood=self.ood, validation_per_class=self.validation_per_class)
        chosen = self.claim is not None or self.validation_per_class > 0
        problems.need(chosen, "claim: name an arm, or give validation_per_class images to choose one on")
        problems.need(not self.ood or self.data.unlabeled is not None, "ood: needs images in data.unlabeled")
        for place, arm in enumerate(self.arms):
            problems += [f"arms[{place}] ({arm.name}): {each}" for each in self._wrong_with(arm, self.arms[:place])]
        problems.show()

    def _wrong_with(self, arm: ArmConfig, earlier: Sequence[ArmConfig]) -> list[str]:
        problems, sources = Problems(), [None, *(other.name for other in earlier if not other.drop_null)]
        usable = f"weights_from: expected an earlier arm with a null space, got {arm.weights_from!r}"
        problems.need(arm.weights_from in sources, usable)
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
    trained: bool
    digest: str
    folder: Path

    def make_room(self) -> None:
        """Remove what another configuration left in the folder; checkpoints of this one stay."""
        note = self.folder / "digest.txt"
        if not note.is_file() or note.read_text(encoding="utf-8") != self.digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(note, self.digest)

    def keep(self, found: Measured) -> None:
        """Write the arm's rows, then the JSON that marks it as done; its checkpoints have done their work."""
        stored = {**vars(found), "digest": self.digest}
        rows = stored.pop("rows")
        if rows is not None:
            with atomic_write(self.folder / "rows.parquet") as temporary:
                rows.to_parquet(temporary, index=False)
        write_text(self.folder / "measurement.json", json.dumps(stored, indent=1))  # with NaN, unlike a report
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def read_back(self) -> Measured | None:
        """Return what was found of the arm, or None when it is not done, or was done with another configuration."""
        path, rows = self.folder / "measurement.json", self.folder / "rows.parquet"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.pop("digest") != self.digest:
            said = "arm %s, seed %d was made with another configuration and is made again"
            logger.info(said, self.arm.name, self.seed)
            return None
        return Measured(**stored, rows=pd.read_parquet(rows) if rows.is_file() else None)


def plan_study(config: StudyConfig, inputs: Mapping[str, str]) -> list[Work]:
    """List every arm at every seed, all arms of one seed before the next; `inputs` are hashes of images and models.

    An arm without randomness runs with the first seed alone, and an arm made from it takes that one.
    """
    works: dict[tuple[str | None, int], Work] = {}
    shared, first = [getattr(config, name) for name in MEASURED], config.seeds[0]
    for seed, arm in itertools.product(config.seeds, config.arms):
        fixed = works.get((arm.weights_from, first))
        source = fixed if fixed is not None and not fixed.trained else works.get((arm.weights_from, seed))
        trained = arm.train != "none" or (source is not None and source.trained)
        among = config.seeds[: arm.seeds] if trained else [first]
        if seed not in among or (arm.weights_from is not None and source is None):
            continue
        own = arm_config(config, arm, seed)
        parts: list[Any] = [{key: value for key, value in asdict(own).items() if key not in PLACES}, shared]
        parts.append({key: value for key, value in asdict(arm).items() if key not in WORDS})
        digest = sha256_of_json([*parts, source and source.digest, dict(inputs)])
        folder = config.folder / "arms" / arm.name / f"seed-{seed}"
        works[arm.name, seed] = Work(arm, seed, own, source, trained, digest, folder)
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


class Study:
    """What all arms begin with, fitted on the starting classifier when it is first asked for, and how they are made."""

    def __init__(self, config: StudyConfig, run: Run, setup: Setup) -> None:
        self.config, self.run = config, run
        self.setup, self.validation = hold_out(setup, config.validation_per_class)
        self.bank = self.setup.splits.bank, self.setup.embeddings["bank"]
        self.how: dict[str, Any] = {"invariance": config.model.invariance, "settings": self.passes()}

    def passes(self, name: str = "start") -> PassSettings:
        """How images are read, with the features of a backbone kept in a folder of the run."""
        return replace(self.setup.passes, cache=str(self.run.folder / "features" / name))

    @cached_property
    def loop(self) -> FittedTranslator:
        """The loop's translator."""
        ridge, start = self.config.translator.ridge, self.setup.classifier.eval()
        return fit_on_split(start, *self.bank, ridges=DEFAULT_RIDGES if ridge is None else (ridge,), **self.how)

    @cached_property
    def image_score_ref(self) -> Tensor:
        """IS_ref (C,) in degrees."""
        return reference_image_scores(self.setup.classifier.eval(), *self.bank, self.loop, **self.how)

    @cached_property
    def statistics(self) -> RidgeStatistics:
        """Sums of the bank's features, for the language-aligned head."""
        start = self.setup.classifier.eval()
        sums = RidgeStatistics(start.feature_dim, self.bank[1].shape[1], device=start.weight.device)
        for batch in gathered(iterate_features(start, *self.bank, self.passes(), "statistics")):
            sums.update(batch.features, batch.embeddings)
        return sums.reduce()

    def make(self, work: Work) -> tuple[Classifier, dict[str, LinearTranslator], dict[str, Any]]:
        """Edit and train a copy of the starting classifier; return also the frozen and loop translators, and notes."""
        arm, config, setup = work.arm, work.config, self.setup
        classifier = copy.deepcopy(setup.classifier).tune(config.model.tuning, batch_norm=config.model.batch_norm)
        translators, notes = {"frozen": self.loop.translator}, {}
        if work.source is not None:
            classifier.model.load_state_dict(load_file(work.source.folder / "weights.safetensors"))
        if arm.aligned:
            prompts = placebo_texts(setup.texts, config.loss.placebo)
            aligned = align_head_(classifier, self.loop.translator, prompts, self.statistics)
            notes = {name: getattr(aligned, name) for name in ("rank", "free_rows", "logit_change")}
            if arm.train != "none":
                constrain_to_rows(classifier, aligned.rows)
        if arm.train != "none":
            classifier, loop = self._train(work, classifier)
            translators |= loop
            if arm.aligned:
                release_rows(classifier)
        if arm.interpolation != 1:
            classifier = interpolate_weights(setup.classifier, classifier, arm.interpolation)
        if self.run.accelerator.is_main_process:
            state = {name: value.cpu().contiguous().clone() for name, value in classifier.model.state_dict().items()}
            with atomic_write(work.folder / "weights.safetensors") as path:
                save_file(state, path)
        return classifier.eval(), translators, notes

    def _train(self, work: Work, classifier: Classifier) -> tuple[Classifier, dict[str, LinearTranslator]]:
        """Train an arm's head on stored features, or all of it from its newest checkpoint on."""
        config, accelerator, head = work.config, self.run.accelerator, work.arm.train == "head"
        name, split = f"{work.arm.name}, seed {work.seed}", self.setup.splits.train
        passes, options = self.passes() if head else self.setup.passes, (config.translator, accelerator)
        keeper = LoopTranslator(self.loop.translator, *self.bank, *options, config.model.invariance, passes)
        sing = None
        if config.loss.weight > 0:
            references = self.loop, self.setup.texts, self.image_score_ref
            sing = make_sing(config, classifier, *references, len(split), accelerator.gradient_accumulation_steps)
        if head:
            features = cached_features(self.setup.classifier, split, passes)
            if sing is not None and keeper.streams:
                keeper.refresh(classifier, sing)
            classifier = train_head(name, classifier, sing, features, split.labels, config)
            return classifier, keeper.current(sing)
        arm = Arm(name, classifier, sing, keeper, split, config, accelerator, work.folder / "checkpoints")
        track(accelerator, f"{work.arm.name}-{work.seed}", config)
        with own_random_numbers(accelerator, config.seed), StopRequest(accelerator) as stop:
            for step in arm.steps(arm.resume()):
                log(accelerator, {f"train/{figure}": value for figure, value in step.figures.items()}, step.number)
                if stop.came():
                    arm.save(replace(step.position, due=True))
                    stop.end()
                arm.follow(step)
                if step.ends_epoch or step.number % config.training.checkpoint_every == 0:
                    arm.save(step.position)
        return arm.finish(), keeper.current(sing)
