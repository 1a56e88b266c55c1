"""AS and success against the size of the step, for any attack and judge (METHOD section 9)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.statistics import ENDS, resampled_means
from singreg.analysis.steering import PairPlan, SteeringRows, largest_change
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, ConditionalGaussian, Maximiser, NearNull, similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator
from singreg.utils import gather_rows, plain

FIGURES = ("AS", "AS_abs", "success")
STEPS = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
RADII = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
SINGLE = "single step"
EXACT = 1e-6  # logits: what a null direction may move them by, in float64 with features of any usual size

Craft = Callable[[SteeringRows], Iterator[tuple[Tensor, Tensor]]]
"""Rows to directions (R, m), each with its steps (R, g); the g of all directions make up an attack's grid."""
Found = Mapping[str, Any]
MAXIMISER, RANDOM = "maximiser", "random direction"
NEAR_RATIOS = (0.05, 1.0)  # of σ_1: below it a direction counts as nearly null; 1: held by the logit tolerance alone
DROPPED = "drop_null"


@dataclass(frozen=True)
class Attack:
    """A way to displace features, crafted on a translator, that moves no logit by more than its tolerance."""

    attack: str
    attacker: str
    grid: Sequence[float]
    craft: Craft
    budget: str = "step"
    tolerance: float = EXACT


def natural_radii(batches: Iterable[FeatureBatch], gaussian: ConditionalGaussian, fit_images: int) -> dict[str, Any]:
    """Measure percentiles of the radius over held-out images; to those of its own fit a covariance is too near."""
    radii = gather_rows([{"radius": gaussian.radius(batch.features).cpu().numpy()} for batch in batches])["radius"]
    median, p95, p99 = (float(value) for value in np.quantile(radii, (0.5, 0.95, 0.99)))
    sizes = {"images": len(radii), "dimensions": len(gaussian.whitening), "fit_images": fit_images}
    return {"median": median, "p95": p95, "p99": p99, **sizes, "floor": gaussian.floor, "floored": gaussian.floored}


def natural_marks(natural: Found) -> dict[str, float]:
    """Return the natural percentiles as multiples of the median, which is the curves' unit."""
    return {"50 %": 1.0, "95 %": natural["p95"] / natural["median"], "99 %": natural["p99"] / natural["median"]}


def null_direction(rows: SteeringRows, space: NullSpace, translator: AnyTranslator | None) -> Tensor:
    """Return unit null directions (R, m): the gradient's null part; without a translator random ones.

    These are fixed by image and target: the same in any order, on any processes.
    """
    if translator is not None:
        return unit_in_null(similarity_gradient(rows.features, rows.text, translator), space)
    seeds = ([0, *pair] for pair in zip(rows.image.tolist(), rows.target.tolist(), strict=True))
    drawn = np.stack([np.random.default_rng(s).standard_normal(rows.features.shape[1]) for s in seeds])
    return unit_in_null(torch.from_numpy(drawn).to(rows.features), space)


def straight(space: NullSpace, translator: AnyTranslator | None, steps: Sequence[float]) -> Craft:
    """Go along one unit direction by shares of |f|."""

    def craft(rows: SteeringRows) -> Iterator[tuple[Tensor, Tensor]]:
        length = torch.linalg.vector_norm(rows.features, dim=1)
        yield null_direction(rows, space, translator), length[:, None] * rows.features.new_tensor(steps)

    return craft


def equal_effort(
    attackers: Mapping[str, AnyTranslator],
    space: NullSpace,
    gaussian: ConditionalGaussian,
    natural: Found,
    steps: Sequence[float] = STEPS,
    radii: Sequence[float] = RADII,
) -> list[Attack]:
    """Make one gradient step of every attacker under every budget; an untouched image lies at a radius of about 1.

    "step": shares of |f|. "radius": Mahalanobis radii in natural medians, the percentiles of natural images among them;
    an image outside a radius, that no step along its direction brings back, stays where it is.
    """
    radii = tuple(sorted({*radii, *natural_marks(natural).values()}))
    limits = natural["median"] * gaussian.mean.new_tensor(radii)

    def outwards(rows: SteeringRows, translator: AnyTranslator) -> Iterator[tuple[Tensor, Tensor]]:
        along = null_direction(rows, space, translator)
        yield along, torch.nan_to_num(gaussian.step_for_radius(rows.features, along, limits))

    within = [Attack(SINGLE, name, radii, partial(outwards, translator=t), "radius") for name, t in attackers.items()]
    return [Attack(SINGLE, name, steps, straight(space, t, steps)) for name, t in attackers.items()] + within


@torch.no_grad()
def measure_curves(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    attacks: Sequence[Attack],
    judges: Mapping[tuple[str, str], LinearTranslator],
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    null_space: NullSpace,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Read AS towards the target and success of every attack by every judge. Exact over processes, in float64.

    Success is that the target's prompt outranks all other class prompts, as a share of an image's targets.

    Args:
        judges: by name and defence.
        fresh: count as success only what did not outrank all before and keeps the decision, as a share of the former;
            every target counts alike, and intervals are over images alone.

    Returns:
        attack, attacker, budget, judge, defence, grid, images, rows and tolerance of each curve; figures AS, AS_abs
        (degrees) and success; their 95 % intervals over source classes and images; area, [mean height over the grid,
        low, high]; logit_change, the largest at each point.
    """
    head = weight.detach().double(), 0.0 if bias is None else bias.detach().double()
    columns = [_read_all(rows, attacks, judges, head, null_space, fresh) for rows in plan.rows(batches)]
    table, curves = gather_rows(columns, sort_by="image"), list[dict[str, Any]]()
    every, groups = table["rows"], None if fresh else table["source"]
    for place, attack in enumerate(attacks):
        for judge in judges:
            sums = table[f"{place} {judge}"]
            counts = np.stack([every, every, table[f"open {judge}"]], axis=1)
            if not fresh:
                sums, counts = sums / every[:, None, None], np.ones_like(counts)
            curve = {name: value for name, value in vars(attack).items() if name != "craft"}
            curve |= {"judge": judge[0], "defence": judge[1], "logit_change": table[f"{place} logits"].max(0)}
            curve |= {"images": len(every), "rows": int(every.sum())}
            curves.append(plain(curve | _ratios(sums, counts, groups, attack.grid)))
    return curves


def _read_all(
    rows: SteeringRows,
    attacks: Sequence[Attack],
    judges: Mapping[tuple[str, str], LinearTranslator],
    head: tuple[Tensor, Tensor | float],
    space: NullSpace,
    fresh: bool,
) -> dict[str, np.ndarray]:
    """Sums of `FIGURES` (3, G) over each image's rows, by attack and judge, with what else `measure_curves` needs."""
    z = {judge: translator(rows.features) for judge, translator in judges.items()}
    before, (weight, bias) = {judge: rows.read(each) for judge, each in z.items()}, head
    logits = rows.features @ weight.T + bias
    sums = {f"open {judge}": (~first).double() for judge, (_, first) in before.items()}
    changes = {}
    for place, attack in enumerate(attacks):
        largest, points = list[Tensor](), {judge: list[Tensor]() for judge in judges}
        for direction, steps in attack.craft(rows):
            shift = direction @ weight.T
            travel = {judge: direction @ each.matrix.to(direction).T for judge, each in judges.items()}
            for step in steps.T[:, :, None]:
                kept = (logits + step * shift).argmax(1) == logits.argmax(1)
                largest.append(largest_change(step * shift, space).max())
                for judge, (angle, first) in before.items():
                    after, won = rows.read(z[judge] + step * travel[judge])
                    gained, success = angle - after, won & ~first & kept if fresh else won
                    points[judge].append(torch.stack([gained, gained.abs(), success.double()], dim=1))
        sums |= {f"{place} {judge}": torch.stack(values, dim=2) for judge, values in points.items()}
        changes[f"{place} logits"] = torch.stack(largest).cpu().numpy()
    image, count = (each.cpu().numpy() for each in torch.unique_consecutive(rows.image, return_counts=True))
    first = count.cumsum() - count  # a chunk holds the rows of an image one after the other
    found = {"image": image, "source": rows.source.cpu().numpy()[first], "rows": count.astype(float)}
    found |= {name: np.add.reduceat(values.cpu().numpy(), first) for name, values in sums.items()}
    # every image carries the largest change of its chunk, so that the largest of all is the largest over images
    return found | {name: np.tile(values, (len(image), 1)) for name, values in changes.items()}


def _ratios(sums: np.ndarray, counts: np.ndarray, groups: np.ndarray | None, grid: Sequence[float]) -> dict[str, Any]:
    """Figures, intervals and area by name, from sums (N, 3, G) over counts (N, 3); NaN where nothing was counted."""
    columns = np.concatenate([sums.reshape(len(sums), -1), counts], axis=1)
    both = resampled_means(columns, groups=groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = both[:, :-3].reshape(len(both), 3, -1) / both[:, -3:, None]
    # The area is linear in the curve, so the same draws give its interval.
    areas = (curves[..., 1:] + curves[..., :-1]) / 2 @ np.diff(grid) / (grid[-1] - grid[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an end that is NaN since no draw is defined
        ends = np.nanquantile(np.concatenate([curves, areas[..., None]], axis=2)[1:], ENDS, axis=0)
    return {
        "figures": {name: curves[0, place] for place, name in enumerate(FIGURES)},
        "intervals": {name: ends[:, place, :-1].T for place, name in enumerate(FIGURES)},
        "area": {name: [areas[0, place], *ends[:, place, -1]] for place, name in enumerate(FIGURES)},
    }


def at(curve: Found, value: float, figure: str) -> Any:
    """Return a curve's figure at one point of its grid."""
    return curve["figures"][figure][curve["grid"].index(value)]


def the_curve(curves: Iterable[Found], **wanted: Any) -> Found:
    """Return the only curve with these values, such as attacker="fitted", budget="step"."""
    (found,) = (curve for curve in curves if all(curve[name] == value for name, value in wanted.items()))
    return found


def climb(translator: LinearTranslator, space: NullSpace, steps: Sequence[float], near: NearNull | None) -> Craft:
    """Maximise the cosine; each step begins from the one below it and is never worse."""
    maximiser = Maximiser(translator, space, near)

    def craft(rows: SteeringRows) -> Iterator[tuple[Tensor, Tensor]]:
        start: Tensor | None = None
        for step in steps:
            limit = step * rows.features.norm(dim=1)
            displacement, start = maximiser.maximise(rows.features, rows.text, limit, start=start)
            yield displacement, rows.features.new_ones(len(rows.features), 1)

    return craft


def usual_attacks(
    translators: Mapping[str, LinearTranslator],
    weight: Tensor,
    space: NullSpace,
    steps: Sequence[float],
    tolerance: float,
) -> list[Attack]:
    """Make the single step and the maximiser on every translator, and on the first one the controls.

    These are a random direction, and the maximiser with directions beside the null space that keep every logit within
    the tolerance: those that are nearly null, and any.
    """
    attacks = []
    for name, each in translators.items():
        attacks.append(Attack(SINGLE, name, steps, straight(space, each, steps)))
        attacks.append(Attack(MAXIMISER, name, steps, climb(each, space, steps, None)))
    on, first = next(iter(translators.items()))
    attacks.append(Attack(RANDOM, on, steps, straight(space, None, steps)))
    for ratio in NEAR_RATIOS:
        near = NearNull.below(weight, space, ratio=ratio, tolerance=tolerance)
        if near.basis.shape[1]:
            name = f"near-null {100 * ratio:g} %, τ {tolerance:g}"
            attacks.append(Attack(name, on, steps, climb(first, space, steps, near), tolerance=tolerance))
    return attacks


def measure_robustness(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    translators: Mapping[str, LinearTranslator],
    *,
    classifier: Classifier,
    space: NullSpace,
    steps: Sequence[float],
    tolerance: float,
) -> dict[str, Any]:
    """Steer images by every attack and let every translator judge, with and without the null component.

    Success: the target prompt did not outrank all classes before, and does after, with the decision kept.

    All translators are attacked and all judge, so each is the others' transfer and adaptive attacker.

    Args:
        steps: shares of |f|.
        tolerance: |Δlogit| that attacks with nearly null directions may take.

    Returns:
        nullity, and the curves of `measure_curves`.
    """
    attacks = usual_attacks(translators, classifier.weight, space, steps, tolerance)
    judges = {(name, ""): each for name, each in translators.items()}
    for name, each in translators.items():  # T Π_p f: what is read of features without their null component
        judges[name, DROPPED] = LinearTranslator(space.remove(each.matrix.double()), each.offset)
    how: dict[str, Any] = {"weight": classifier.weight, "bias": classifier.bias, "null_space": space}
    curves = measure_curves(batches, plan, attacks, judges, **how, fresh=True)
    return {"nullity": space.nullity, "curves": curves}
