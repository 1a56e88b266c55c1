"""How far features can be steered by every attacker, as every judge reads it (METHOD section 9)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.attackers import (
    EXACT,
    LIMIT,
    MAXIMISER,
    NEAR_RATIOS,
    RANDOM,
    SINGLE,
    Attack,
    Outsider,
    reach_basis,
    reachable,
    usual_attacks,
)
from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.statistics import resampled_means
from singreg.analysis.steering import (
    PairPlan,
    SelectedImages,
    SteeringRows,
    in_its_own_dtype,
    judged,
    own_prompt,
    plan_pairs,
)
from singreg.analysis.steering_curves import STEPS, Budgets, add_by_image, curve_figures
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.steering import AnyTranslator
from singreg.utils import all_reduce_max, all_reduce_sum, gather_rows, plain

FIGURES = ("success", "decision_success", "AS", "AS_abs", "kept", "similarity")
MATRIX_AT = 0.1  # relative step of the source x target matrices, the nearest of the grid
ALL_OF_THEM, FAR_BELOW, ROUNDING = 0.99, 0.5, 1e-6


def measure_robustness(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, AnyTranslator],
    *,
    plan: PairPlan | None = None,
    budgets: Budgets | None = None,
    outsiders: Mapping[str, Outsider] | None = None,
    attacks: Sequence[Attack] | None = None,
    near_ratios: Sequence[float] = NEAR_RATIOS,
    tolerances: Sequence[float] = (0.1,),
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Steer a split's images by every attack and let every translator judge, with and without the null component.

    Exact over processes, in float64. Success: the target prompt did not outrank all classes before, and does after,
    with the decision kept, and each logit within the largest tolerance where the attack promises none (transfer).

    Args:
        translators: by name; all are attacked and all judge, so each is the others' transfer and adaptive attacker.
        plan: which images towards which prompts; None takes every class towards every other class's prompt.
        budgets: relative steps, and radii where they have a Gaussian; None takes `STEPS`.
        outsiders: other models' translator and null space (see `usual_attacks`).
        attacks: in place of `usual_attacks`.
        near_ratios: shares of σ_1 below which directions count as nearly null.
        tolerances: |Δlogit| that attacks with nearly null directions may take.

    Shape: embeddings (N, n), texts (C, n) unit rows of all class prompts.

    Returns:
        One row a curve's point (see `points_of`), and a dict: classifier, images, rows, sources, targets, nullity,
        features; curves (attack, crafted_on, judge, defence "" or "drop_null", budget, grid; figures, intervals and
        area of `FIGURES`; logit_change and longest: the largest at each point; tolerance); matrices (S, K) of the
        single step and the maximiser at one step; already: share whose target is first before any attack; limit and
        limit_success of the maximiser, among the reachable; reachable: share, None of a network; logit_tolerance;
        natural percentiles; absent: attacks that could not be made; checks (name, passed, found); seconds.

    Raises:
        ValueError: a head without a null space; an outsider of another width or with a translator's name.
    """
    begun, outsiders, weight = time.monotonic(), outsiders or {}, classifier.weight.detach()
    space = NullSpace.from_weight(weight, invariance=invariance).to(weight.device)
    _check(classifier, translators, outsiders)
    budgets, absent = budgets or Budgets.over(STEPS), dict[str, str]()
    if attacks is None:
        options: dict[str, Any] = {"near_ratios": near_ratios, "tolerances": tolerances}
        attacks, absent = usual_attacks(translators, weight, space, budgets, outsiders=outsiders, **options)
    plan = plan or _everything(split, texts)
    target = _Target(classifier, space, translators, texts.double(), budgets, plan, attacks, max(tolerances))
    for batch in iterate_features(classifier, split, embeddings, settings or PassSettings(), "robustness to steering"):
        target.read(plan.select(batch))
    by_image = gather_rows(target.columns, sort_by="index")
    target.largest = {name: all_reduce_max(value) for name, value in target.largest.items()}
    curves = [
        _curve(by_image, target, attack, budget, judge, defence)
        for attack in attacks
        for budget in attack.budgets
        for defence in _defences(attack)
        for judge in translators
    ]
    total = {name: float(values.sum()) for name, values in by_image.items() if values.ndim == 1}
    possible = {judge: total[f"{judge}|reachable"] for judge in translators}
    found = {
        "classifier": classifier.tag,
        "images": len(by_image["rows"]),
        "rows": int(total["rows"]),
        "sources": plan.sources,
        "targets": plan.targets,
        "nullity": space.nullity,
        "features": classifier.feature_dim,
        "curves": curves,
        "matrices": target.matrices(),
        "already": {judge: 1 - total[f"|{judge}|eligible"] / total["rows"] for judge in translators},
        "limit": LIMIT,
        "limit_success": {
            judge: _ratio(total[f"{judge}|limit"], possible[judge])
            for judge in translators
            if f"{judge}|limit" in total
        },
        "reachable": {
            judge: _ratio(possible[judge], total[f"|{judge}|eligible"]) if target.reach[judge] is not None else None
            for judge in translators
        },
        "logit_tolerance": max(tolerances),
        "natural": budgets.marks or None,
        "absent": absent,
    }
    points = points_of(curves)
    checks = sanity_checks(points, found)
    return points, plain({**found, "checks": checks, "seconds": time.monotonic() - begun})


def _check(classifier: Classifier, translators: Mapping[str, AnyTranslator], outsiders: Mapping[str, Outsider]) -> None:
    wrong = [f"{name} is the name of both a translator and an outsider" for name in outsiders if name in translators]
    for name, outsider in outsiders.items():
        width = len(outsider.null_space.basis)
        if width != classifier.feature_dim:
            wrong.append(f"{name} has {width} features and {classifier.tag} {classifier.feature_dim}; leave it out")
    if wrong:
        raise ValueError("; ".join(wrong))


def _everything(split: ImageSplit, texts: Tensor) -> PairPlan:
    labels, names = np.asarray(split.labels), split.class_names
    present = sorted({int(label) for label in labels if label >= 0})
    return plan_pairs(labels, names, texts, present, [names[label] for label in present], texts[present])


def _defences(attack: Attack) -> list[str]:
    """As is, and with the null component dropped for attacks that say where they go."""
    return [""] if attack.tolerance is None else ["", "drop_null"]


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


@dataclass
class _Target:
    """The attacked classifier: reads what displaced features mean to every judge, and what they do to logits."""

    classifier: Classifier
    space: NullSpace
    judges: Mapping[str, AnyTranslator]
    texts: Tensor
    budgets: Budgets
    plan: PairPlan
    attacks: Sequence[Attack]
    tolerance: float

    def __post_init__(self) -> None:
        bias, shape = self.classifier.bias, (len(self.plan.sources), len(self.plan.targets))
        self.weight = self.classifier.weight.detach().double()
        self.bias = 0.0 if bias is None else bias.detach().double()
        self.reach = {name: reach_basis(translator, self.space) for name, translator in self.judges.items()}
        self.matrix_at = min(self.budgets.steps, key=lambda step: abs(step - MATRIX_AT))
        self.columns: list[dict[str, np.ndarray]] = []
        # Made at once, so that a process without images adds its zeros too.
        self.largest = {
            _key(attack, budget): self.texts.new_zeros(2, len(self.budgets.grid(budget)))
            for attack in self.attacks
            for budget in attack.budgets
        }
        both = [attack for attack in self.attacks if attack.name in (SINGLE, MAXIMISER)]
        keys = [(attack.name, attack.crafted_on, judge) for attack in both for judge in self.judges]
        self.cells = {key: self.texts.new_zeros(4, *shape) for key in keys}

    @torch.no_grad()
    def read(self, images: SelectedImages) -> None:
        """Add images to the columns, the cells and the largest."""
        sums: dict[str, Tensor] = {}
        for rows in images.rows(self.plan, len(self.texts)):
            index, same = images.indices[rows.image.cpu()].numpy(), own_prompt(rows.text, self.texts)
            before = {
                (defence, judge): self._judged(defence, judge, rows.features, rows, same)
                for defence in ("", "drop_null")
                for judge in self.judges
            }
            found = {"rows": torch.ones_like(rows.image)}
            found |= {f"{defence}|{judge}|eligible": ~first for (defence, judge), (_, first) in before.items()}
            for judge, basis in self.reach.items():
                z = in_its_own_dtype(self.judges[judge])(rows.features)
                able = reachable(z, rows.text, self.texts, same, basis)
                found[f"{judge}|reachable"] = able & ~before["", judge][1]
            for attack in self.attacks:
                for budget in attack.budgets:
                    found |= self._attacked(attack, budget, rows, index, same, before, found)
            for name, values in found.items():
                add_by_image(sums, name, values.double(), rows.image, len(images.indices))
        if sums:
            columns = {name: values.cpu().numpy() for name, values in sums.items()}
            self.columns.append({"index": images.indices.numpy(), **columns})

    def _judged(
        self, defence: str, judge: str, features: Tensor, rows: SteeringRows, same: Tensor
    ) -> tuple[Tensor, Tensor]:
        read = self.space.remove(features) if defence else features
        return judged(self.judges[judge], read, rows.text, self.texts, same)

    def _attacked(
        self,
        attack: Attack,
        budget: str,
        rows: SteeringRows,
        index: np.ndarray,
        same: Tensor,
        before: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
        counted: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """`FIGURES` of every row at every point, (R, 6, G) by attack, budget, defence and judge."""
        grid, decided = self.budgets.grid(budget), self._decision(rows.features)
        points: dict[str, list[Tensor]] = {}
        largest, limit = [], {}
        for place, d in enumerate(attack.displace(rows, index, budget)):
            moved, change = rows.features + d, self._logit_change(d)
            kept = self._decision(moved) == decided
            quiet = kept if attack.tolerance is not None else kept & (change <= self.tolerance)
            if place == len(grid):  # beyond any budget
                judge = attack.crafted_on
                won = self._judged("", judge, moved, rows, same)[1]
                limit[f"{judge}|limit"] = won & quiet & counted[f"{judge}|reachable"]
                break
            largest.append(torch.stack([change.max(), self._length(budget, rows, d).max()]))
            read = in_its_own_dtype(attack.translator)(moved)
            similarity = torch.nn.functional.cosine_similarity(read, rows.text, dim=-1)
            for defence in _defences(attack):
                for judge in self.judges:
                    angle, first = before[defence, judge]
                    after, won = self._judged(defence, judge, moved, rows, same)
                    won, gained = won & ~first, angle - after
                    figures = [won & quiet, won & kept, gained, gained.abs(), kept, similarity]
                    values = torch.stack([figure.double() for figure in figures], dim=1)
                    points.setdefault(f"{_key(attack, budget)}|{defence}|{judge}", []).append(values)
                    cell = (attack.name, attack.crafted_on, judge)
                    if cell in self.cells and (defence, budget, grid[place]) == ("", "step", self.matrix_at):
                        pair = rows.source * len(self.plan.targets) + rows.target
                        summed = [values[:, 0], gained, (~first).double(), torch.ones_like(gained)]
                        self.cells[cell].flatten(1).index_add_(1, pair, torch.stack(summed))
        so_far = self.largest[_key(attack, budget)]
        torch.maximum(so_far, torch.stack(largest, dim=1), out=so_far)
        return limit | {name: torch.stack(values, dim=2) for name, values in points.items()}

    def _decision(self, features: Tensor) -> Tensor:
        return (features @ self.weight.T + self.bias).argmax(1)

    def _logit_change(self, d: Tensor) -> Tensor:
        """Largest |Δlogit| (R,); the softmax null lets all logits move together."""
        change = d @ self.weight.T
        if self.space.invariance == "softmax":
            change = change - change.mean(1, keepdim=True)
        largest: Tensor = change.abs().amax(1)
        return largest

    def _length(self, budget: str, rows: SteeringRows, d: Tensor) -> Tensor:
        """How much of the budget a displacement takes, in the grid's unit (R,); 0 where nothing was moved."""
        length: Tensor = torch.linalg.vector_norm(d, dim=1)
        if budget == "step":
            norm: Tensor = torch.linalg.vector_norm(rows.features, dim=1)
            return length / norm.clamp_min(torch.finfo(length.dtype).tiny)
        assert self.budgets.gaussian is not None
        assert self.budgets.natural is not None
        radius = self.budgets.gaussian.radius(rows.features + d) / self.budgets.natural["median"]
        return torch.where(length > 0, radius, torch.zeros_like(radius))

    def matrices(self) -> list[dict[str, Any]]:
        """Success, AS and counts by source and target, NaN where nothing was steered."""
        found = []
        for (name, on, judge), table in self.cells.items():
            success, gained, eligible, rows = all_reduce_sum(table)
            figures = {"success": success / eligible, "AS": gained / rows, "rows": rows.where(rows > 0, torch.nan)}
            found.append({"attack": name, "crafted_on": on, "judge": judge, "step": self.matrix_at, **figures})
        return found


def _key(attack: Attack, budget: str) -> str:
    return f"{attack.name}|{attack.crafted_on}|{budget}"


def _curve(
    by_image: Mapping[str, np.ndarray], target: _Target, attack: Attack, budget: str, judge: str, defence: str
) -> dict[str, Any]:
    """Ratios of sums over images with 95 % intervals: both successes over the eligible rows, the others over all."""
    grid, sums = target.budgets.grid(budget), by_image[f"{_key(attack, budget)}|{defence}|{judge}"]
    counts = np.stack([by_image[f"{defence}|{judge}|eligible"], by_image["rows"]], axis=1)
    columns = np.concatenate([sums.reshape(len(sums), -1), counts], axis=1)
    both = np.concatenate([columns.mean(0, keepdims=True), resampled_means(columns)])
    values = both[:, :-2].reshape(len(both), len(FIGURES), len(grid))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [values[:, :2] / both[:, -2, None, None], values[:, 2:] / both[:, -1, None, None]]
        ratios = np.concatenate(parts, axis=1)
    names = {"attack": attack.name, "crafted_on": attack.crafted_on, "judge": judge, "defence": defence}
    figures = curve_figures(FIGURES, ratios[0], ratios[1:], grid)
    change, longest = target.largest[_key(attack, budget)]
    more = {"logit_change": change, "longest": longest, "tolerance": attack.tolerance}
    curve: dict[str, Any] = plain({**names, "budget": budget, "grid": grid, **figures, **more})
    return curve


def points_of(curves: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row for each point of the curves, `FIGURES` with NAME_low and NAME_high of their 95 % intervals."""
    names = ("attack", "crafted_on", "judge", "defence", "budget", "tolerance")
    tables = []
    for curve in curves:
        ends = {name: np.array(values, dtype=float) for name, values in curve["intervals"].items()}
        columns = {"at": curve["grid"], **curve["figures"]}
        columns |= {f"{name}_{end}": ends[name][:, i] for i, end in enumerate(("low", "high")) for name in ends}
        columns |= {name: curve[name] for name in ("logit_change", "longest")}
        tables.append(pd.DataFrame(columns, dtype=float).assign(**{name: curve[name] for name in names}))
    table: pd.DataFrame = pd.concat(tables, ignore_index=True).astype({"tolerance": float})
    return table


def sanity_checks(points: pd.DataFrame, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold what `measure_robustness` found to the rules that every sound attack keeps (METHOD section 9).

    Returns:
        name, passed and found (who broke it) of each rule.
    """
    p, who = points, points["attack"] + " on " + points["crafted_on"]
    own = p[(p["budget"] == "step") & (p["defence"] == "") & (p["crafted_on"] == p["judge"])]

    def of(attack: str, figure: str) -> pd.DataFrame:
        table: pd.DataFrame = own[own["attack"] == attack].pivot(index="at", columns="judge", values=figure)
        return table

    # The mean of max(gain, 0): gains of random directions cancel, and an attacker would keep the helpful ones.
    random, gradient = (of(RANDOM, "AS") + of(RANDOM, "AS_abs")).mean() / 2, of(SINGLE, "AS").mean()
    shorter = of(SINGLE, "similarity") - of(MAXIMISER, "similarity")
    null = (p["defence"] == "drop_null") & (p["tolerance"] == EXACT) & (p["budget"] == "step")
    reached = {name: share for name, share in found["limit_success"].items() if found["reachable"][name] != 0}
    broken = {
        "logits stay within what the attack promises": who[~(p["logit_change"] <= p["tolerance"].fillna(np.inf))],
        "every displacement is within its budget": who[~(p["longest"] <= p["at"] * (1 + ROUNDING) + ROUNDING)],
        "many steps reach at least what one step does": shorter.columns[(shorter > ROUNDING).any()],
        "success goes to 100 % of what is reachable as the budget grows": [
            name for name, share in reached.items() if not (share or 0) >= ALL_OF_THEM
        ],
        "a random direction is far below the gradient": [
            name for name in random.index.intersection(gradient.index) if not random[name] <= FAR_BELOW * gradient[name]
        ],
        "success is exactly 0 with the null space dropped": who[null & (p["success"] > 0)],
    }
    return [
        {"name": name, "passed": not len(wrong), "found": ", ".join(dict.fromkeys(wrong)) or "holds"}
        for name, wrong in broken.items()
    ]
