"""What a steering measurement says in plain words, and reasons not to believe it (METHOD sections 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence

from singreg.analysis.old_steering.results import NaturalRadii, SteeringCurve, SteeringPairs
from singreg.analysis.results import ModelMeasurement

SMALL_STEP = 0.1
LINEAR = ("fitted", "auditor")
MANY_FLOORED = 0.1


def steering_findings(
    measurement: ModelMeasurement,
    pairs: Sequence[SteeringPairs],
    curves: Sequence[SteeringCurve],
    natural: NaturalRadii,
    image_score: float,
) -> list[str]:
    """Sentences: table 1, reach and step, success at equal effort, within natural radii, and what the figures bound (degrees)."""
    read = {(p.attacker, p.judge): p for p in pairs}
    own, audited = read["fitted", "fitted"], read["fitted", "auditor"]
    figures = own.overall
    sentences = []
    if figures["AS_abs"] is not None:
        removal = measurement.translators["fitted"].overall["IS"]
        times = f", so {image_score:g}° is {image_score / removal:.1f} times that" if removal > 0 else ""
        sentences += [
            f"Steered to an image score of {image_score:g}°, features turn by {_spread(own)} towards the target prompt as the fitted "
            f"translator reads its own steering (the paper's table 1; {figures['pairs']:.0f} source-target pairs, "
            f"{figures['images']:.0f} pictures), and by {_spread(audited)} as the auditor reads the same steered features.",
            f"{figures['reachable']:.0%} of the steerings can reach {image_score:g}° at all; those take a step of "
            f"{figures['step']:.0%} of the feature norm. Removing the null component moves this classifier's pictures by an IS of "
            f"{removal:.1f}°{times}.",
        ]
    sentences += _at_equal_effort(curves, natural)
    sentences += [_non_linear(read[p.attacker, "auditor"], audited, p, image_score) for p in pairs if _is_non_linear(p)]
    sentences.append(
        f"Logits moved by at most {max(p.logit_change for p in pairs):.1e} (float64). Every steering is one step along one gradient: a "
        "search with many steps does at least as well, so these figures are lower bounds of how easily the classifier is steered. "
        "Dropping the null component (f → Π_p f) leaves the logits as they are and makes steering of features impossible: a trained "
        "defence shows its worth in pixels only."
    )
    return sentences


def _is_non_linear(pairs: SteeringPairs) -> bool:
    return pairs.attacker == pairs.judge and pairs.attacker not in LINEAR and pairs.overall["AS_abs"] is not None


def _non_linear(audited: SteeringPairs, linear: SteeringPairs, own: SteeringPairs, image_score: float) -> str:
    """What a non-linear attacker gains, by itself and by the auditor."""
    beside = f" ({_spread(linear)} when the fitted translator attacks)" if linear.overall["AS_abs"] is not None else ""
    return (
        f"Steered by the non-linear {own.attacker} translator to the same {image_score:g}° (by bisection; {own.overall['reachable']:.0%} "
        f"can reach it, with a step of {own.overall['step']:.0%}), features turn by {_spread(own)} as it reads them itself and by "
        f"{_spread(audited)} as the auditor reads them{beside}."
    )


def _spread(pairs: SteeringPairs) -> str:
    return f"{pairs.overall['AS_abs']:.2f}° ± {pairs.overall['AS_abs_std']:.2f}° (|AS|)"


def _at_equal_effort(curves: Sequence[SteeringCurve], natural: NaturalRadii) -> list[str]:
    by_name = {(c.budget, c.attacker, c.judge): c for c in curves}
    step = by_name["step", "fitted", "auditor"]
    near = min((value for value in step.grid if value > 0), key=lambda value: abs(value - SMALL_STEP))
    own = by_name["step", "fitted", "fitted"]
    gradient, manifold = (by_name[kind, "fitted", "auditor"] for kind in ("radius", "on-manifold"))
    mark = natural.marks["95 %"]
    return [
        f"With a step of {near:.1%} of the feature norm the target prompt outranks every class prompt in "
        f"{step.at(near, 'success'):.0%} of the steerings by the auditor ({own.at(near, 'success'):.0%} by the fitted translator "
        f"itself), against {step.figures['success'][0]:.0%} at a step of {step.grid[0]:.0%}.",
        f"Kept within the Mahalanobis radius of 95 % of natural pictures ({mark:.2f} times the median), steering succeeds in "
        f"{gradient.at(mark, 'success'):.0%} along the gradient and in {manifold.at(mark, 'success'):.0%} along the on-manifold "
        f"direction, by the auditor.",
    ]


def steering_warnings(
    measurement: ModelMeasurement,
    pairs: Sequence[SteeringPairs],
    natural: NaturalRadii,
    image_score: float,
    images_per_feature: float,
) -> list[str]:
    """Reasons not to believe a figure, and what was left out, each counted (sentences)."""
    width, warnings = measurement.head.features, []
    behind = {f"the {name} translator": scores.fit_images for name, scores in measurement.translators.items()}
    behind["the covariance behind the radii"] = natural.fit_images
    for name, images in behind.items():
        if images < images_per_feature * width:
            warnings.append(
                f"Warning: {name} rests on {images} pictures for {width} features; below {images_per_feature:g} a feature it is not "
                "identified well, and no claim should be made."
            )
    for name, scores in measurement.translators.items():
        if scores.zero_shot < 0.5 * measurement.vlm_zero_shot:
            warnings.append(
                f"Warning: features translated by the {name} translator name {scores.zero_shot:.0%} of the classes where the "
                f"vision-language model's own embeddings name {measurement.vlm_zero_shot:.0%}; its AS says little about classes."
            )
    if natural.floored > MANY_FLOORED * natural.dimensions:
        warnings.append(
            f"Warning: {natural.floored} of {natural.dimensions} null directions vary less than {natural.floor:g} of the mean; their "
            "variance is held there, so radii depend on that floor (radius_floor)."
        )
    return warnings + [_reach(p, image_score) for p in pairs if p.attacker == p.judge and _reach(p, image_score)]


def _reach(pairs: SteeringPairs, image_score: float) -> str:
    """A sentence when some planned pairs have no reachable picture, else nothing."""
    images, reachable = pairs.matrices["images"], pairs.matrices["reachable"]
    planned = [
        share for counts, shares in zip(images, reachable, strict=True) for count, share in zip(counts, shares, strict=True) if count
    ]
    lost = sum(share == 0 for share in planned)
    if lost == len(planned):
        return (
            f"Warning: no picture can be steered to {image_score:g}° by the {pairs.attacker} translator, so its table 1 has no "
            "figures; use a smaller image_score."
        )
    if not lost:
        return ""
    return (
        f"Warning: {lost} of {len(planned)} pairs have no picture that reaches {image_score:g}° by the {pairs.attacker} translator; "
        "they are left out of its mean AS."
    )
