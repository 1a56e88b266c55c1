"""Robustness to steering in feature space: every attack, every judge, success curves with areas and intervals (METHOD section 9)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, PassSettings, iterate_features
from singreg.analysis.old_steering.curves import Budgets
from singreg.analysis.old_steering.plan import PairPlan, SteeringRows, plan_pairs
from singreg.analysis.old_robustness.attacks import (
    MAXIMISER,
    SINGLE,
    Attack,
    Effort,
    Grids,
    Outsider,
    near_null_attacks,
    null_attacks,
    outsider_attacks,
)
from singreg.analysis.old_robustness.checks import feature_checks
from singreg.analysis.old_robustness.curves import Tables, curves_of, limit_success, matrices_of, reachable_share
from singreg.analysis.old_robustness.reachable import Reach
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.analysis.steering import in_its_own_dtype, outranks, own_prompt
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.steering import AnyTranslator

STEPS = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class RobustnessSettings:
    """What is attacked and how hard; steps and limit in shares of |f|, tolerances in logits, ratios in shares of σ_1.

    attacker: name of the translator that random, nearly null and outsiders' attacks are crafted on. matrix_at: step at which the
    source x target matrices are read (the nearest of the grid). limit: the largest budget, where success must be complete among what
    can be reached. logit_tolerance: how far a logit may move in a success of attacks that promise none (transfer, adaptive).
    """

    attacker: str = "fitted"
    steps: tuple[float, ...] = STEPS
    limit: float = 100.0
    matrix_at: float = 0.1
    near_ratios: tuple[float, ...] = (0.01, 0.05)
    tolerances: tuple[float, ...] = (1e-3, 1e-2, 0.1)
    logit_tolerance: float = 0.1
    drop_null: bool = True
    effort: Effort = field(default_factory=Effort)

    def grid(self) -> tuple[float, ...]:
        """The relative steps in increasing order, with 0 (no unit).

        Raises:
            ValueError: steps or a limit that make no curve, all complaints at once.
        """
        wrong = []
        if not all(np.isfinite(step) and step >= 0 for step in self.steps) or not any(step > 0 for step in self.steps):
            wrong.append(f"steps must be shares of |f|, 0 or more and one above 0, got {list(self.steps)}")
        elif not self.limit > max(self.steps):
            wrong.append(f"the limit must be above the largest step {max(self.steps):g}, got {self.limit:g}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return tuple(sorted({0.0, *self.steps}))


def measure_robustness(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, AnyTranslator],
    *,
    plan: PairPlan | None = None,
    radii: Budgets | None = None,
    outsiders: Mapping[str, Outsider] | None = None,
    attacks: Sequence[Attack] | None = None,
    invariance: Invariance = "logits",
    options: RobustnessSettings | None = None,
    settings: PassSettings | None = None,
) -> RobustnessFigures:
    """Steer a part's pictures by every attack and let every translator judge; check the sanity rules on what was found.

    Args:
        translators: by name; all of them are attacked and all judge, so each is the others' transfer and adaptive attacker.
        plan: which pictures towards which prompts; None: every class with pictures towards every other class's prompt.
        radii: budgets of `singreg.analysis.old_steering.curves`, for curves over the natural Mahalanobis radius too.
        outsiders: other models' translator and null space, the pretrained one's for a fine-tuned classifier: see `outsider_attacks`.
        attacks: in place of the usual ones.

    Shapes: embeddings (N, n), texts (C, n) unit rows of all class prompts. AS in degrees. Exact over processes, in float64.

    Raises:
        ValueError: a head without a null space, an attacker that is not among the translators, an outsider of another width,
            a target that is its own source, or steps that make no curve.
    """
    begun, options, outsiders = time.monotonic(), options or RobustnessSettings(), outsiders or {}
    weight = classifier.weight.detach()
    space = NullSpace.from_weight(weight, invariance=invariance).to(weight.device)
    _check(classifier, translators, outsiders, options)
    grids, absent = Grids(options.grid(), radii, options.limit), dict[str, str]()
    if attacks is None:
        attacks, absent = usual_attacks(translators, weight, space, grids, outsiders, options)
    plan = plan or _everything(part, texts)
    target = _Target(weight, classifier.bias, space, translators, outsiders, texts.double(), grids, options)
    tables = Tables(attacks, list(translators), weight.new_zeros(len(plan.sources), len(plan.targets)).double())
    for batch in iterate_features(classifier, part, embeddings, settings or PassSettings(), "robustness to steering"):
        target.read(batch, plan, attacks, tables)
    rows, cells = tables.gathered()
    curves = curves_of(rows, attacks, grids, list(translators), drop_null=options.drop_null)
    reached = limit_success(rows, attacks, list(translators))
    return RobustnessFigures(
        classifier=classifier.tag,
        images=len(rows["rows"]),
        rows=int(rows["rows"].sum()),
        sources=list(plan.sources),
        targets=list(plan.targets),
        nullity=space.nullity,
        features=classifier.feature_dim,
        curves=curves,
        matrices=matrices_of(cells, attacks, list(translators), target.matrix_at),
        already={judge: float(1 - rows[f"|{judge}|eligible"].sum() / rows["rows"].sum()) for judge in translators},
        limit=options.limit,
        limit_success=reached,
        reachable=reachable_share(rows, target.reach),
        logit_tolerance=options.logit_tolerance,
        natural=None if radii is None else radii.natural.marks,
        absent=absent,
        checks=feature_checks(curves, options.limit, reached, reachable_share(rows, target.reach), list(translators)),
        seconds=time.monotonic() - begun,
    )


def usual_attacks(
    translators: Mapping[str, AnyTranslator],
    weight: Tensor,
    null_space: NullSpace,
    grids: Grids,
    outsiders: Mapping[str, Outsider],
    options: RobustnessSettings,
) -> tuple[list[Attack], dict[str, str]]:
    """Single step, maximiser, random direction, nearly null, transfer and adaptive; and what cannot be, with the reason (no shapes)."""
    mine = translators[options.attacker]
    near, absent = near_null_attacks(
        mine, options.attacker, weight, null_space, grids, options.effort, ratios=options.near_ratios, tolerances=options.tolerances
    )
    usual = null_attacks(translators, null_space, grids, options.effort, random_on=options.attacker)
    return [*usual, *near, *outsider_attacks(outsiders, mine, options.attacker, grids, options.effort)], absent


def _everything(part: ImageSplit, texts: Tensor) -> PairPlan:
    labels = np.asarray(part.labels)
    present = sorted({int(label) for label in labels if label >= 0})
    return plan_pairs(labels, part.class_names, texts, present, [part.class_names[label] for label in present], texts[present])


def _check(
    classifier: Classifier, translators: Mapping[str, AnyTranslator], outsiders: Mapping[str, Outsider], options: RobustnessSettings
) -> None:
    wrong = []
    if options.attacker not in translators:
        wrong.append(f"the attacker {options.attacker!r} is not among the translators: {', '.join(translators)}")
    width = classifier.feature_dim
    wrong += [
        f"{name} has {outsider.null_space.basis.shape[0]} features and {classifier.tag} {width}: it can attack only models of its own width"
        for name, outsider in outsiders.items()
        if outsider.null_space.basis.shape[0] != width
    ]
    wrong += [f"{name} is the name of both a translator and an outsider" for name in outsiders if name in translators]
    if wrong:
        raise ValueError("; ".join(wrong))


class _Target:
    """The attacked classifier: reads what displaced features mean to every judge, and what they do to logits."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        null_space: NullSpace,
        translators: Mapping[str, AnyTranslator],
        outsiders: Mapping[str, Outsider],
        texts: Tensor,
        grids: Grids,
        options: RobustnessSettings,
    ) -> None:
        self.weight, self.space, self.texts, self.grids, self.options = weight.double(), null_space, texts, grids, options
        self.bias = self.weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        self.judges = {name: in_its_own_dtype(translator) for name, translator in translators.items()}
        self.crafters = {**self.judges, **{name: in_its_own_dtype(other.translator) for name, other in outsiders.items()}}
        self.reach = {name: Reach.of(translator, null_space) for name, translator in translators.items()}
        self.matrix_at = min(grids.steps, key=lambda step: abs(step - options.matrix_at))

    @torch.no_grad()
    def read(self, batch: FeatureBatch, plan: PairPlan, attacks: Sequence[Attack], tables: Tables) -> None:
        """Add a batch's pictures to the tables."""
        pictures = plan.select(batch)
        tables.begin(pictures.indices.numpy())
        for rows in pictures.rows(plan, len(self.texts)):
            index = pictures.indices[rows.image.cpu()].numpy()
            tables.add("rows", torch.ones_like(rows.features[:, :1]), rows.image)
            same = own_prompt(rows.text, self.texts)
            bases: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
            for defence in self._defences(None):
                for judge in self.judges:
                    before, won = self._judged(self._defended(rows.features, defence), rows, judge, same)
                    bases[defence, judge] = (before, ~won)
                    tables.add(f"{defence}|{judge}|eligible", (~won).double()[:, None], rows.image)
            reachable = self._reachable(rows, same, bases, tables)
            for attack in attacks:
                for budget in attack.budgets:
                    self._attacked(attack, budget, rows, index, same, bases, reachable, tables)
        tables.end()

    def _reachable(
        self, rows: SteeringRows, same: Tensor, bases: Mapping[tuple[str, str], tuple[Tensor, Tensor]], tables: Tables
    ) -> dict[str, Tensor]:
        """By judge, whether any null displacement at all makes the target first, (R,) bool; counted among the eligible."""
        found = {}
        for judge, reach in self.reach.items():
            found[judge] = reach.first(self.judges[judge](rows.features), rows.text, self.texts, same)
            tables.add(f"{judge}|reachable", (found[judge] & bases["", judge][1]).double()[:, None], rows.image)
        return found

    def _defences(self, attack: Attack | None) -> list[str]:
        """As is, and with the null part dropped for attacks that say where they go (None: all there are)."""
        dropped = self.options.drop_null and (attack is None or attack.tolerance is not None)
        return ["", "drop_null"] if dropped else [""]

    def _defended(self, features: Tensor, defence: str) -> Tensor:
        return self.space.remove(features) if defence == "drop_null" else features

    def _judged(self, features: Tensor, rows: SteeringRows, judge: str, same: Tensor) -> tuple[Tensor, Tensor]:
        """Angle to the target in degrees (R,), and whether its prompt outranks all others (R,)."""
        unit = torch.nn.functional.normalize(self.judges[judge](features), dim=-1)
        own = (unit * rows.text).sum(-1)
        return torch.rad2deg(torch.arccos(own.clamp(-1, 1))), outranks(own, unit @ self.texts.T, same)

    def _attacked(
        self,
        attack: Attack,
        budget: str,
        rows: SteeringRows,
        index: np.ndarray,
        same: Tensor,
        bases: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
        reachable: Mapping[str, Tensor],
        tables: Tables,
    ) -> None:
        grid = self.grids.of(budget)
        allowed = [*grid, self.options.limit] if attack.name == MAXIMISER and budget == "step" else grid
        decided = (rows.features @ self.weight.T + self.bias).argmax(1)
        key = f"{attack.name}|{attack.crafted_on}|{budget}"
        for place, d in enumerate(attack.displacements(rows, index, budget, allowed)):
            moved = rows.features + d
            change = d @ self.weight.T
            kept = (moved @ self.weight.T + self.bias).argmax(1) == decided
            if self.space.invariance == "softmax":
                change = change - change.mean(1, keepdim=True)
            change = change.abs().amax(1)
            quiet = kept if attack.tolerance is not None else kept & (change <= self.options.logit_tolerance)
            own = torch.nn.functional.cosine_similarity(self.crafters[attack.crafted_on](moved), rows.text, dim=-1)
            tables.add(f"{key}|kept|{place}", kept.double()[:, None], rows.image)
            tables.add(f"{key}|similarity|{place}", own[:, None], rows.image)
            tables.largest(f"{key}|change|{place}", change[:, None], rows.image)
            tables.largest(f"{key}|longest|{place}", self._length(budget, rows, d)[:, None], rows.image)
            for defence in self._defences(attack):
                for judge in self.judges:
                    before, eligible = bases[defence, judge]
                    after, won = self._judged(self._defended(moved, defence), rows, judge, same)
                    gained = before - after
                    counted = won & eligible if place < len(grid) else won & eligible & reachable[judge]
                    success, by_decision = (counted & quiet).double(), (counted & kept).double()
                    values = torch.stack([success, by_decision, gained, gained.abs()], dim=1)
                    tables.add(f"{key}|{defence}|{judge}|{place}", values, rows.image)
                    if not defence and budget == "step" and attack.name in (SINGLE, MAXIMISER) and allowed[place] == self.matrix_at:
                        cells = torch.stack([success, gained, eligible.double(), torch.ones_like(gained)])
                        tables.cell(f"{attack.name}|{attack.crafted_on}|{judge}", cells, rows)

    def _length(self, budget: str, rows: SteeringRows, d: Tensor) -> Tensor:
        """How much of the budget a displacement takes, in the grid's unit (R,); 0 where nothing was moved."""
        length: Tensor = torch.linalg.vector_norm(d, dim=1)
        if budget == "step":
            norm: Tensor = torch.linalg.vector_norm(rows.features, dim=1)
            return length / norm.clamp_min(torch.finfo(length.dtype).tiny)
        assert self.grids.radii is not None
        radius = self.grids.radii.gaussian.radius(rows.features + d) / self.grids.radii.natural.median
        used: Tensor = torch.where(length > 0, radius, torch.zeros_like(radius))
        return used
