"""The configuration of a study (recipes/study.py): arms and seeds over one fine-tuning configuration."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from singreg.data.corruption import KINDS
from singreg.training.config import FinetuneConfig, check_finetune
from singreg.workbench.config import Problems, VisionLanguageConfig
from singreg.workbench.parsing import overridden, parse_config

OPEN = ("loss.", "training.", "translator.", "model.tuning", "model.batch_norm")
"""What an arm may set for itself; anything else would leave the arms nothing to be compared on."""
SHARED = ("training.accumulation", "training.mixed_precision", "training.measure_batch_size", "training.control")
"""What it may not all the same: one accelerator and one way of measuring serve all arms."""


@dataclass(frozen=True)
class ArmConfig:
    """One arm of a study. In YAML `from` stands for `weights_from`.

    Args:
        name: of the arm.
        note: what it is there for.
        role: method; baseline, which a method must beat; or placebo, which must not do what a method does.
        train: none (edit and measure), head (on stored features of the starting backbone), all (fine-tuning).
        aligned: begin with the language-aligned head (METHOD section 7), to the placebo's prompts under loss.placebo.
        constrain: keep its row space while training.
        drop_null: end by folding f → Π_p f into the head (METHOD section 9 f), which leaves no null space to measure.
        interpolate: share of the arm's own weights in the mean with the starting model's (WiSE-FT); 1: its own alone.
        weights_from: an earlier arm whose weights of the same seed this one begins with.
        control_of: the arm a placebo stands beside; null: the one that is claimed or chosen.
        seeds: how many of the study's seeds, from the first; null: all.
        overrides: dotted keys of the fine-tuning configuration, such as loss.weight: 0.1; loss.weight: 0 trains without the loss.
    """

    name: str
    note: str = ""
    role: Literal["method", "baseline", "placebo"] = "method"
    train: Literal["none", "head", "all"] = "all"
    aligned: bool = False
    constrain: bool = False
    drop_null: bool = False
    interpolate: float = 1.0
    weights_from: str | None = None
    control_of: str | None = None
    seeds: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class StudyConfig(FinetuneConfig):
    """A whole study; all fields of a fine-tuning run, which every arm begins with, and:

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings, reused by all runs.
        seed: of what all arms share; `seeds` are those of the training.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch, list the arms, stop.
        resume: go on with a study of this name; finished arms whose configuration is the same are read back.
        seeds: an arm that trains is trained once with each.
        arms: see ArmConfig; a mapping each.
        reference: the arm that all others are compared with: plain fine-tuning with the same budget.
        claim: the arm chosen beforehand to be judged; null takes the best one on the validation part, or without one the best on
            the test part, and the report says which.
        validation_per_class: labelled pictures of every class that are taken from the auditor's, for choosing an arm and nothing else.
        agreement_sizes: numbers of pictures at which two auditors on disjoint pictures are compared before anything is trained, to
            see how many an auditor needs; sizes that the parts cannot fill are left out.
        further_vlms: at most one more vision-language model, a second judge with an auditor of its own.
        halves: two more auditors on the disjoint halves of the audit part.
        mlp_auditor: one more, non-linear auditor; minutes an arm.
        corruptions: blur, noise, contrast: accuracy on test pictures so corrupted.
        ood: unlabeled takes the bank's pictures without a label as strange ones; none leaves the AUROCs out.
        ood_count: how many of them.
        attributes: report the known attributes of built-in scenes.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[dict[str, Any]] = field(default_factory=list)
    reference: str = "plain"
    claim: str | None = None
    validation_per_class: int = 0
    agreement_sizes: list[int] = field(default_factory=list)
    further_vlms: list[VisionLanguageConfig] = field(default_factory=list)
    halves: bool = True
    mlp_auditor: bool = False
    corruptions: list[str] = field(default_factory=lambda: list(KINDS))
    ood: Literal["unlabeled", "none"] = "none"
    ood_count: int = 1000
    attributes: bool = False


def read_arms(config: StudyConfig, problems: list[str] | None = None) -> list[ArmConfig]:
    """The arms in order; what is wrong with their keys or types goes to `problems`, or is raised without one (no shapes).

    Raises:
        ValueError: something is wrong and no list was given.
    """
    found, wrong = [], [] if problems is None else problems
    known = {each.name: each for each in dataclasses.fields(ArmConfig)}
    for place, given in enumerate(config.arms):
        name = str(given.get("name", "")).strip() or f"number {place + 1}"
        values = {"weights_from" if key == "from" else key: value for key, value in given.items()}
        for key in sorted(values.keys() - known.keys(), key=str):
            near = difflib.get_close_matches(str(key), ["from", *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            wrong.append(f"arm {name}: {key}: no such key; {hint}")
        if not str(given.get("name", "")).strip():
            wrong.append(f"arm {name}: name: expected a name")
        good = {key: values[key] for key in values.keys() & known.keys() if not _mistyped(wrong, name, key, values[key])}
        found.append(ArmConfig(**{**good, "name": name}))
    if problems is None and wrong:
        raise ValueError("; ".join(wrong))
    return found


def _mistyped(wrong: list[str], arm: str, key: str, value: Any) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool)
    choices = {"role": ("method", "baseline", "placebo"), "train": ("none", "head", "all")}
    if key in choices:
        ok, wanted = value in choices[key], f"one of {', '.join(choices[key])}"
    elif key in ("aligned", "constrain", "drop_null"):
        ok, wanted = isinstance(value, bool), "true or false"
    elif key == "interpolate":
        ok, wanted = number or isinstance(value, float), "a number"
    elif key == "seeds":
        ok, wanted = value is None or number, "a whole number"
    elif key == "overrides":
        ok, wanted = isinstance(value, dict), "a mapping of dotted keys to values"
    else:
        ok = isinstance(value, str) or (key in ("weights_from", "control_of") and value is None)
        wanted = "a name" if key != "note" else "words"
    if not ok:
        wrong.append(f"arm {arm}: {'from' if key == 'weights_from' else key}: expected {wanted}, got {value!r}")
    return not ok


def arm_config(config: StudyConfig, arm: ArmConfig, seed: int, problems: list[str] | None = None) -> FinetuneConfig:
    """The fine-tuning configuration of one arm at one seed; what is wrong with an override goes to `problems`, or is raised.

    Raises:
        ValueError: something is wrong and no list was given.
    """
    own = {each.name: copy.deepcopy(getattr(config, each.name)) for each in dataclasses.fields(FinetuneConfig)}
    base = FinetuneConfig(**{**own, "seed": seed})
    wrong: list[str] = []
    closed = {key for key in arm.overrides if not str(key).startswith(OPEN) or key in SHARED}
    for key in sorted(closed, key=str):
        wrong.append(f"{key}: all arms share this; an arm may set {', '.join(name + '*' if name.endswith('.') else name for name in OPEN)}")
    found = overridden(base, {key: value for key, value in arm.overrides.items() if key not in closed}, wrong)
    if problems is None and wrong:
        raise ValueError("; ".join(wrong))
    if problems is not None:
        problems += [f"arm {arm.name}: {sentence}" for sentence in wrong]
    return found


def is_trained(arm: ArmConfig, arms: Sequence[ArmConfig]) -> bool:
    """True where a seed makes a difference: the arm is trained, or took its weights from one that was (no shapes)."""
    by_name = {other.name: other for other in arms}
    whole: ArmConfig | None = arm
    for _ in arms:
        if whole is None or whole.train != "none":
            break
        whole = by_name.get(whole.weights_from or "")
    return whole is not None and whole.train != "none"


def arm_seeds(config: StudyConfig, arm: ArmConfig, arms: Sequence[ArmConfig]) -> list[int]:
    """The seeds an arm runs with: the first only where nothing is random, neither in it nor in the arm it takes its weights from."""
    seeds = config.seeds[: arm.seeds] if is_trained(arm, arms) else config.seeds[:1]
    source = next((other for other in arms if other.name == arm.weights_from), None)
    if source is not None and not is_trained(source, arms):
        return seeds  # its one set of weights serves every seed
    return seeds if source is None else [seed for seed in seeds if seed in arm_seeds(config, source, arms)]


def check_study(config: StudyConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    problems = Problems()
    problems += check_finetune(config)
    arms = read_arms(config, problems)
    names = [arm.name for arm in arms]
    problems.need(bool(arms), "arms: expected at least one")
    problems.twice("arms", names)
    problems.twice("seeds", [str(seed) for seed in config.seeds])
    problems.need(bool(config.seeds), "seeds: expected at least one")
    for seed in config.seeds:
        problems.need(0 <= seed < 2**32, f"seeds: expected whole numbers from 0 to {2**32 - 1}, got {seed}")
    for key, wanted in (("reference", config.reference), ("claim", config.claim)):
        problems.need(wanted is None or wanted in names, f"{key}: there is no arm {wanted!r}; arms are {', '.join(names) or 'none'}")
    problems.need(len(config.further_vlms) <= 1, f"further_vlms: expected at most one, got {len(config.further_vlms)}")
    for place, vlm in enumerate(config.further_vlms):
        problems.vision_language(f"further_vlms[{place}]", vlm)
    for kind in sorted({*config.corruptions} - {*KINDS}):
        problems.append(f"corruptions: no such corruption: {kind}; known are {', '.join(KINDS)}")
    problems.need(config.auditor.standardize == "blocks", "auditor.standardize: a study's auditors go by blocks; leave it out")
    problems.positive(ood_count=config.ood_count)
    problems.need(config.validation_per_class >= 0, f"validation_per_class: expected at least 0, got {config.validation_per_class}")
    problems.need(min(config.agreement_sizes, default=2) >= 2, f"agreement_sizes: expected at least 2 each, got {config.agreement_sizes}")
    problems.need(config.ood == "none" or config.data.unlabeled is not None, "ood: unlabeled needs pictures in data.unlabeled")
    problems.need(not config.attributes or config.data.source == "scenes", "attributes: only built-in scenes have known ones")
    for place, arm in enumerate(arms):
        _check_arm(problems, config, arm, arms[:place])
    return problems


def _check_arm(problems: Problems, config: StudyConfig, arm: ArmConfig, earlier: Sequence[ArmConfig]) -> None:
    problems.need(Path(arm.name).name == arm.name and arm.name not in (".", ".."), f"arm {arm.name}: its name must do for a folder")
    problems.visible("arms: name", arm.name)
    problems.need(0 <= arm.interpolate <= 1, f"arm {arm.name}: interpolate: expected a share between 0 and 1, got {arm.interpolate}")
    problems.need(arm.seeds is None or arm.seeds > 0, f"arm {arm.name}: seeds: expected a number above 0, got {arm.seeds}")
    names = {other.name: other for other in earlier}
    if arm.weights_from is not None:
        source = names.get(arm.weights_from)
        problems.need(source is not None, f"arm {arm.name}: from: there is no arm {arm.weights_from!r} before it")
        problems.need(source is None or not source.drop_null, f"arm {arm.name}: from: {arm.weights_from} dropped its null space")
    every = [str(given.get("name", "")).strip() for given in config.arms]
    problems.need(
        arm.control_of is None or arm.control_of in every, f"arm {arm.name}: control_of: there is no arm {arm.control_of!r}"
    )
    problems.need(arm.control_of is None or arm.role == "placebo", f"arm {arm.name}: control_of is for an arm of role placebo")
    problems.need(
        arm.train != "head" or arm.weights_from is None,
        f"arm {arm.name}: train: head works on features of the starting backbone, so it cannot begin with another arm's weights",
    )
    problems.need(
        not arm.aligned or arm.weights_from is None,
        f"arm {arm.name}: aligned fits a head to the starting backbone, so it cannot begin with another arm's weights",
    )
    problems.need(
        not (arm.aligned and config.model.invariance == "softmax"),
        f"arm {arm.name}: aligned empties the logits' null space of prompts; in the softmax's one direction of theirs is left. Set "
        "model.invariance: logits",
    )
    problems.need(not arm.constrain or arm.aligned, f"arm {arm.name}: constrain keeps an aligned head's rows; set aligned: true")
    problems.need(
        not (arm.name == config.reference and arm.drop_null), f"arm {arm.name}: the reference must have a null space to measure"
    )
    wrong: list[str] = []
    own = arm_config(config, arm, config.seeds[0] if config.seeds else 0, wrong)
    problems += wrong
    balanced = arm.train == "head" and own.loss.balance > 0 and own.loss.weight > 0
    problems.need(not balanced, f"arm {arm.name}: loss.balance is for fine-tuning; set it to 0 where the head alone trains")
    shared = set(check_finetune(config))
    problems += [f"arm {arm.name}: {sentence}" for sentence in check_finetune(own) if sentence not in shared]


def parse_study(arguments: Sequence[str] | None = None, *, description: str = "") -> StudyConfig:
    """The configuration from `--config FILE` and overrides such as `--seeds "[0, 1]"`; see `parse_config` (no shapes)."""
    return parse_config(StudyConfig, check_study, arguments, description=description)
