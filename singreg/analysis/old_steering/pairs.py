"""How easily features are steered through the null space towards another class's prompt (METHOD sections 4 and 9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.old_steering.plan import PairPlan, SteeringRows
from singreg.analysis.old_steering.results import Matrix, SteeringPairs
from singreg.analysis.results import Rows
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.steering import in_its_own_dtype, outranks, own_prompt, steering_arguments
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, Steered, steer
from singreg.utils import all_reduce_sum, gather_rows

SUMS = ("rows", "reachable", "AS", "AS²", "AS_abs", "success", "step")


@dataclass
class _PairSums:
    """Running sums of one attacker and judge: table (7, S, K) by pair, extremes (2,): calibration error and |Δlogit|."""

    table: Tensor
    extremes: Tensor
    by_image: list[Rows]

    def add(self, rows: SteeringRows, values: Tensor, images: Tensor) -> None:
        """values (7, R); images (7, b) is added to."""
        pair = rows.source * self.table.shape[2] + rows.target
        self.table.flatten(1).index_add_(1, pair, values)
        images.index_add_(1, rows.image, values)


def steer_pairs(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    *,
    texts: Tensor,
    weight: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    judges: Mapping[str, AnyTranslator] | None = None,
    image_score: float = 40.0,
) -> list[SteeringPairs]:
    """Paper table 1 for every planned (source, target): steer to a fixed image score, read AS towards the target.

    Every attacker is read by every judge (default: the attackers), in float64. One gradient step each, so all figures are lower
    bounds of what an attacker can do. Exact over processes; memory does not grow with pictures but for one row each.

    Shapes: texts (C, n) unit rows of all class prompts, weight (C, m). image_score in degrees; steps relative to |f|.
    """
    judges = judges or attackers
    exact = texts.double()
    shape = (len(SUMS), len(plan.sources), len(plan.targets))
    sums = {
        (attacker, judge): _PairSums(torch.zeros(shape).to(exact), torch.zeros(2).to(exact), [])
        for attacker in attackers
        for judge in judges
    }
    for batch in batches:
        pictures = plan.select(batch)
        images = {key: exact.new_zeros(len(SUMS), len(pictures.indices)) for key in sums}
        for rows in pictures.rows(plan, len(texts)):
            for attacker, translator in attackers.items():
                steered = _attack(rows, translator, null_space, image_score)
                extremes = _extremes(rows, steered, translator, weight, null_space, image_score)
                for judge, reader in judges.items():
                    found = sums[attacker, judge]
                    found.add(rows, _judged(rows, steered, reader, exact), images[attacker, judge])
                    found.extremes = torch.maximum(found.extremes, extremes)
        for key, found in sums.items():
            found.by_image.append(
                {"index": pictures.indices.numpy(), "sums": images[key].T.cpu().numpy(), "class": pictures.source.cpu().numpy()}
            )
    return [_pairs(attacker, judge, found) for (attacker, judge), found in sums.items()]


def _attack(rows: SteeringRows, attacker: AnyTranslator, null_space: NullSpace, image_score: float) -> Steered:
    arguments = steering_arguments(attacker, rows.features)
    return steer(rows.features, rows.text, null_space=null_space, image_score=image_score, **arguments)


def _extremes(
    rows: SteeringRows, steered: Steered, attacker: AnyTranslator, weight: Tensor, null_space: NullSpace, degrees: float
) -> Tensor:
    """(2,): largest |IS - wanted| of the reachable by the attacker, largest |Δlogit|, both 0 where nothing was steered."""
    translate = in_its_own_dtype(attacker)
    with torch.no_grad():
        error = (angle(translate(rows.features), translate(steered.features)) - degrees).abs()
    change = (steered.features - rows.features) @ weight.detach().to(rows.features).T
    if null_space.invariance == "softmax":
        change = change - change.mean(1, keepdim=True)
    zero = error.new_zeros(1)
    return torch.stack([torch.cat([error[steered.reachable], zero]).max(), torch.cat([change.abs().flatten(), zero]).max()])


@torch.no_grad()
def _judged(rows: SteeringRows, steered: Steered, judge: AnyTranslator, texts: Tensor) -> Tensor:
    """The seven summable figures of every row, (7, R) in the order of `SUMS`; 0 where the angle is out of reach."""
    translate = in_its_own_dtype(judge)
    before, after = translate(rows.features), translate(steered.features)
    moved = angle(before, rows.text) - angle(after, rows.text)
    unit = torch.nn.functional.normalize(after, dim=-1)
    won = outranks((unit * rows.text).sum(-1), unit @ texts.T, own_prompt(rows.text, texts))
    step = torch.nan_to_num(steered.step) / torch.linalg.vector_norm(rows.features, dim=-1)
    ok = steered.reachable.to(moved)
    values = torch.stack([torch.ones_like(moved), ok, moved, moved**2, moved.abs(), won.to(moved), step])
    return torch.where(torch.tensor([name == "rows" for name in SUMS]).to(ok.device)[:, None], values, values * ok)


def _pairs(attacker: str, judge: str, found: _PairSums) -> SteeringPairs:
    """The sums of all processes as figures."""
    table = all_reduce_sum(found.table)
    extremes = gather_rows([{"value": found.extremes.cpu().numpy()[None]}])["value"].max(0)
    rows = gather_rows(found.by_image, sort_by="index")
    by_image = rows["sums"]
    matrices = _figures(table)
    overall = {name: _plain(value) for name, value in _figures(table.sum((1, 2))).items()}
    overall |= {"images": float((by_image[:, 0] > 0).sum()), "rows": float(table[0].sum()), "pairs": float((table[0] > 0).sum())}
    any_reached = bool(table[1].sum() > 0)
    return SteeringPairs(
        attacker=attacker,
        judge=judge,
        overall=overall,
        intervals=_intervals(by_image, rows["class"]),
        matrices={name: _matrix(value) for name, value in matrices.items()},
        calibration_error=float(extremes[0]) if any_reached else None,
        logit_change=float(extremes[1]),
    )


def _figures(sums: Tensor) -> dict[str, Tensor]:
    """Means from sums (7, ...), each (...); NaN where nothing was steered or reached."""
    table = dict(zip(SUMS, sums.double(), strict=True))
    rows, reached = table["rows"], table["reachable"]
    figures = {name: table[name] / reached for name in ("AS", "AS_abs", "step")}
    for name in ("AS", "AS_abs"):  # (|AS|)² is AS²
        figures[f"{name}_std"] = (table["AS²"] / reached - figures[name] ** 2).clamp_min(0).sqrt()
    return {**figures, "success": table["success"] / rows, "reachable": reached / rows, "images": rows}


def _intervals(by_image: np.ndarray, classes: np.ndarray) -> dict[str, list[float | None]]:
    """95 % bootstrap intervals over pictures (N, 7), clustered in source classes (N,), of the overall figures: ratios of sums."""
    column = {name: by_image[:, place] for place, name in enumerate(SUMS)}
    intervals: dict[str, list[float | None]] = {}
    for name in ("AS", "AS_abs", "step", "success", "reachable"):
        below = "rows" if name in ("success", "reachable") else "reachable"
        defined = bool(column[below].sum() > 0)
        intervals[name] = list(paired_ratio(column[name], column[below], groups=classes)[1:]) if defined else [None, None]
    return intervals


def _plain(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def _matrix(values: Tensor) -> Matrix:
    return [[_plain(value) for value in row] for row in values.cpu()]
