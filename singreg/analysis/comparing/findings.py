"""A comparison of classifiers in plain words, and when not to believe it (METHOD section 8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from singreg.analysis.results import PRIMARY
from singreg.tables import AGREEMENT, ZERO_SHOT
from singreg.analysis.comparing.differences import Measured, PairedFigures
from singreg.analysis.comparing.results import ComparedHead, ModelDifference, OrderCheck
from singreg.analysis.old_passport import compare_passports


def compare_findings(
    figures: PairedFigures | None, differences: Sequence[ModelDifference], order: OrderCheck | None, heads: Sequence[ComparedHead]
) -> list[str]:
    """Three sentences (degrees): who leaks least and most, whether that order holds, how many pairs can be told apart."""
    omitted = [head.label for head in heads if head.omitted is not None]
    left_out = f"Nothing could be measured, for want of a null space: {_listed(omitted)}." if omitted else "Every model has a null space."
    if figures is None or order is None:
        return ["None of the models has a null space, so no score exists for any of them.", left_out]
    view = primary_view(figures)
    space, translator = figures.views[view]
    if len(figures.models) == 1:
        value, (low, high) = figures.values["AS_neg"][view, 0], figures.interval("AS_neg", view, 0)
        only = f"Only {figures.models[0]} could be measured: AS⁻ {value:.2f}° [{low:.2f}, {high:.2f}] in {space}, by the {translator}."
        return [only, left_out]
    names = order.orders[view]
    best, worst = names[0], names[-1]

    def read(name: str) -> str:
        model = figures.models.index(name)
        low, high = figures.interval("AS_neg", view, model)
        return f"{name} ({figures.values['AS_neg'][view, model]:.2f}° [{low:.2f}, {high:.2f}])"

    pairs = [d for d in differences if (d.figure, d.space, d.translator) == ("AS_neg", space, translator)]
    gap = next(d for d in pairs if {d.first, d.second} == {best, worst})
    value, low, high = (gap.value, gap.low, gap.high) if gap.second == worst else (-gap.value, -gap.high, -gap.low)
    first = (
        f"Of {len(names)} models on the same {figures.images} pictures, {read(best)} loses least of the true class when its null space is "
        f"removed (AS⁻) and {read(worst)} most, read in {space} by the {translator}; paired by picture they differ by {value:.2f}° "
        f"[{low:.2f}, {high:.2f}]."
    )
    return [first, _order_sentence(order, view), f"{_apart(pairs)} {left_out}"]


def primary_view(figures: PairedFigures) -> int:
    """The view that sentences speak of: the first space, by the auditor where there is one (an index into `views`)."""
    space = figures.views[0][0]
    return next((place for place, view in enumerate(figures.views) if view == (space, PRIMARY)), 0)


def _order_sentence(order: OrderCheck, view: int) -> str:
    own = f"the order itself comes again in {order.stable[view]:.0%} of bootstrap resamples"
    if len(order.views) == 1:
        return f"There is one view only, so nothing says whether the order by AS⁻ holds in another; {own}."
    holds = "is the same" if all(names == order.orders[0] for names in order.orders) else "is not the same"
    return (
        f"The order by AS⁻ {holds} in all {len(order.views)} views (spaces and translators): lowest Kendall τ {order.lowest_tau:.2f}, all "
        f"views alike in {order.everywhere:.0%} of bootstrap resamples; {own}."
    )


def _apart(pairs: Sequence[ModelDifference]) -> str:
    apart = sum(d.low > 0 or d.high < 0 for d in pairs)
    return (
        f"In {apart} of {len(pairs)} pairs of models the 95 % interval of the paired difference in AS⁻ leaves 0 out (not corrected for "
        "the number of pairs)."
    )


def compare_warnings(
    heads: Sequence[ComparedHead], measured: Measured, agreement: dict[str, dict[str, float]], images_per_feature: float
) -> list[str]:
    """Reasons not to compare: null spaces too small or too unlike, too few pictures, poor translators, a blind VLM (sentences)."""
    warnings = [f"Warning: {sentence}" for sentence in compare_passports([h.passport for h in heads if h.passport and h.omitted is None])]
    for space, models in measured.items():
        few = [
            f"{model} ({scores.fit_images} for {found.head.features} features, {name})"
            for model, found in models.items()
            for name, scores in found.translators.items()
            if scores.fit_images < images_per_feature * found.head.features
        ]
        poor = [
            f"{model} ({name}: {scores.zero_shot:.0%})"
            for model, found in models.items()
            for name, scores in found.translators.items()
            if scores.zero_shot < ZERO_SHOT * found.vlm_zero_shot
        ]
        apart = [f"{model} ({value:.2f})" for model, value in agreement[space].items() if value < AGREEMENT]
        zero_shot = next((found.vlm_zero_shot for found in models.values()), 1.0)
        sentences = {
            f"fewer than {images_per_feature:g} pictures a feature, so AS⁻ reads too high: {_listed(few)}": few,
            f"translation loses too much of the class for AS to mean it (zero-shot; the VLM's {zero_shot:.0%}): {_listed(poor)}": poor,
            f"translators from different pictures agree on the classes' directions to less than {AGREEMENT}: {_listed(apart)}": apart,
            f"the vision-language model itself names only {zero_shot:.0%} of the pictures' classes": zero_shot < 0.5,
        }
        warnings += [f"Warning: in {space}, {sentence}." for sentence, holds in sentences.items() if holds]
    return warnings


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
