"""Steering picture by picture, at a fixed image score and at equal effort, for figures paired between arms (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.old_steering.curves import FIGURES, Budgets, mean_height, read_along
from singreg.analysis.old_steering.plan import SteeringRows
from singreg.analysis.results import Rows
from singreg.analysis.steering import in_its_own_dtype, outranks, own_prompt, steering_arguments, steering_targets
from singreg.analysis.study.arm_results import RELATIVE_STEPS, EqualEffort
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, steer

LABELS = {f"{round(100 * step)}": step for step in RELATIVE_STEPS}


@torch.no_grad()
def steer_images(
    batch: FeatureBatch,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attacker: AnyTranslator,
    budgets: Budgets,
    judge: AnyTranslator | None = None,
    judge_texts: Tensor | None = None,
    image_score: float = 40.0,
    seed: int = 0,
) -> Rows:
    """Steer every picture towards one other class's prompt, which the seed and its index fix; columns (B,) by figure.

    steering_AS, steering_step (NaN out of reach), steering_reachable, steering_success at the image score; AS10, AS_abs10,
    success10, ... at `RELATIVE_STEPS`; area_AS, ... over the budgets' steps; manifold_AS50, ... at natural percentiles. The attacker
    chooses direction and step, the judge (default: the attacker) reads AS and success, in a space of its own if it has other
    texts. One gradient step, float64, so all figures are lower bounds; AS in degrees.

    Shapes: texts (C, n), judge_texts (C, n') unit rows. The budgets' steps hold `RELATIVE_STEPS`, their radii the natural percentiles.
    """
    targets = steering_targets(batch.labels, batch.indices, len(texts), seed=seed)
    prompts, f = (texts if judge_texts is None else judge_texts).double(), batch.features.double()
    rows = SteeringRows(torch.arange(len(f)).to(f.device), batch.labels, targets, f, texts.double()[targets])
    judge, judged = judge or attacker, replace(rows, text=prompts[targets])
    found = _at_image_score(rows, judged, prompts, null_space, attacker, judge, image_score)
    for budget, direction, steps in budgets.steps_along(rows, attacker, null_space):
        grid = budgets.grid(budget)
        if budget == "step":
            for name, values in zip(FIGURES, read_along(judged, direction, steps, judge, prompts), strict=True):
                height = values.cpu().numpy()
                found[f"area_{name}"] = mean_height(height, grid)
                found |= {f"{name}{label}": height[:, grid.index(step)] for label, step in LABELS.items()}
        elif budget == "on-manifold":
            read = read_along(judged, direction, torch.nan_to_num(steps), judge, prompts)
            for name, values in zip(FIGURES, read, strict=True):
                height = values.cpu().numpy()
                marks = budgets.natural.marks.items()
                found |= {f"manifold_{name}{label.removesuffix(' %')}": height[:, grid.index(mark)] for label, mark in marks}
    return found


def _at_image_score(
    rows: SteeringRows, judged: SteeringRows, prompts: Tensor, null_space: NullSpace, attacker: AnyTranslator,
    judge: AnyTranslator, degrees: float,
) -> Rows:  # fmt: skip
    steered = steer(
        rows.features, rows.text, null_space=null_space, image_score=degrees, **steering_arguments(attacker, rows.features)
    )
    translate, text, ok = in_its_own_dtype(judge), judged.text, steered.reachable
    after = translate(steered.features)
    moved = angle(translate(rows.features), text) - angle(after, text)
    unit = torch.nn.functional.normalize(after, dim=-1)
    won = outranks((unit * text).sum(-1), unit @ prompts.T, own_prompt(text, prompts))
    step = steered.step / torch.linalg.vector_norm(rows.features, dim=-1)
    columns = {
        "steering_AS": torch.where(ok, moved, torch.full_like(moved, torch.nan)),
        "steering_step": step,  # NaN out of reach
        "steering_reachable": ok.double(),
        "steering_success": (won & ok).double(),
    }
    return {name: value.cpu().numpy() for name, value in columns.items()}


def equal_effort(rows: Mapping[str, np.ndarray], name: str, image_score: float) -> EqualEffort:
    """Means of one translator's columns "FIGURE/NAME" (N,) over the pictures that were steered (not NaN)."""
    steered = ~np.isnan(rows[f"steering_reachable/{name}"])
    reached = rows[f"steering_reachable/{name}"] == 1

    def mean(figure: str, chosen: np.ndarray = steered) -> float:
        return float(rows[f"{figure}/{name}"][chosen].mean()) if chosen.any() else float("nan")

    percentiles = [key.removeprefix("manifold_success").split("/")[0] for key in rows if key.startswith("manifold_success")]
    return EqualEffort(
        image_score=image_score,
        AS=mean("steering_AS", reached),
        step=mean("steering_step", reached),
        reachable=mean("steering_reachable"),
        success=mean("steering_success"),
        at_steps={f"{label} %": {figure: mean(f"{figure}{label}") for figure in FIGURES} for label in LABELS},
        on_manifold={
            f"{label} %": {figure: mean(f"manifold_{figure}{label}") for figure in FIGURES} for label in dict.fromkeys(percentiles)
        },
        area={figure: mean(f"area_{figure}") for figure in FIGURES},
        images=int(steered.sum()),
    )
