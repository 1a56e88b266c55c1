"""What a study is told: its arms, each a change of the fine-tuning run that all begin with, over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from singreg.config import Checked, FinetuneConfig, Problems, VLMConfig, overridden

OPEN = ("loss.", "training.")
"""What an arm may set for itself; anything else would leave the arms nothing to be compared on."""


@dataclass
class ArmConfig(Checked):
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

    def check(self, problems: Problems) -> None:
        folder = self.name.strip() and Path(self.name).name == self.name and self.name not in (".", "..")
        problems.need(bool(folder), f"name: expected a name that does for a folder, got {self.name!r}")
        fits = self.make in ("average", "drop") or self.weights_from is None
        problems.need(fits, f"weights_from: make: {self.make} begins with the starting model")
        shared = [key for key in self.overrides if not str(key).startswith(OPEN)]
        problems += [f"overrides: {key}: all arms share this; an arm may set {', '.join(OPEN)}" for key in shared]


@dataclass
class StudyConfig(FinetuneConfig):
    """A run of recipes/study.py: all fields of a fine-tuning run, which every arm begins with, and these.

    Args:
        seeds: an arm that trains is trained once with each; `seed` is that of what all arms share.
        arms: see ArmConfig.
        reference: the arm that all others are compared with: plain fine-tuning with the same budget.
        claim: the arm named beforehand, about which the verdict speaks.
        validation_per_class: labelled images of every class taken from the auditor's, to choose settings on.
        further_vlms: vision-language models beside `vlm`, which no arm is trained with, that every arm is read by too.
        ood: that many of the bank's unlabelled images count as strange ones, for AUROCs; 0 leaves those out.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arms: list[ArmConfig] = field(
        default_factory=lambda: [ArmConfig("plain", role="baseline", overrides={"loss.weight": 0}), ArmConfig("sing")]
    )
    reference: str = "plain"
    claim: str = "sing"
    validation_per_class: int = 0
    further_vlms: list[VLMConfig] = field(default_factory=list)
    ood: int = 0

    def check(self, problems: Problems) -> None:
        super().check(problems)
        names = [arm.name for arm in self.arms]
        problems.once("arms", names)
        wanted = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds) and min(self.seeds, default=0) >= 0
        problems.need(wanted, f"seeds: expected different whole numbers from 0, got {self.seeds}")
        for key, name in {"reference": self.reference, "claim": self.claim}.items():
            problems.need(name in names, f"{key}: there is no arm {name!r}; arms are {', '.join(names)}")
        problems.need(not self.ood or self.data.unlabeled is not None, "ood: needs images in data.unlabeled")
        for place, arm in enumerate(self.arms):
            problems += [f"arms[{place}] ({arm.name}): {each}" for each in self._wrong_with(arm, self.arms[:place])]

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
            chooses = arm_config(self, arm, 0).training.best_checkpoint and arm.make == "train"
            has = not chooses or self.validation_per_class > 0
            problems.need(has, "training.best_checkpoint: needs images to choose on, validation_per_class")
        except ValueError as error:
            problems += [f"overrides: {line}" for line in str(error).splitlines()]
        return problems


def arm_config(config: StudyConfig, arm: ArmConfig, seed: int) -> FinetuneConfig:
    """Return the fine-tuning configuration of one arm at one seed."""
    own = {each.name: getattr(config, each.name) for each in fields(FinetuneConfig)}
    return overridden(FinetuneConfig(**{**own, "seed": seed}), arm.overrides)
