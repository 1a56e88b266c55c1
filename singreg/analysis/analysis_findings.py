"""An analysis in plain words: what leaks, how much, where; and when not to believe it (METHOD section 8)."""

from __future__ import annotations

from singreg.analysis.analysis_results import PRIMARY
from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.levels.class_results import ClassMeasurement
from singreg.analysis.levels.concept_results import ConceptMeasurement, ConceptShift
from singreg.analysis.results import ModelMeasurement

AGREEMENT = 0.75
"""Below this the two translators place the classes too differently. Two disjoint halves of a real set of pictures agreed to 0.64 at
two pictures a feature, where their AS⁻ differed by 6 % and both read high, and to 0.77 to 0.85 at four to six a feature."""
ZERO_SHOT = 0.5
"""Share of the VLM's own zero-shot accuracy that must survive translation: with less, T(f) misses the class more often than it
names it wherever the VLM is right, and an angle to the class's prompt is an angle to noise."""
VISIBLE_IS = 10.0
"""Degrees of IS below which a change is hardly visible in a picture (METHOD section 3)."""


def analysis_findings(
    measurement: ModelMeasurement,
    chance: ChanceReport,
    information: UniqueInformation,
    classes: ClassMeasurement,
    concepts: ConceptMeasurement,
) -> list[str]:
    """Three sentences (degrees): what leaks and how much against chance, what only the null space knows, and where."""
    scores = measurement.translators[PRIMARY]
    overall, intervals = scores.overall, scores.intervals
    level = chance.paper.levels["energy"]
    low, high = intervals["AS_neg"]
    against = "more than" if low > level.mean["AS_neg"] else "less than" if high < level.mean["AS_neg"] else "no different from"
    first = (
        f"Removing the null component ({measurement.head.null_dimensions:.0%} of the dimensions, {measurement.null_share:.0%} of the "
        f"feature norm) takes {overall['AS_neg']:.2f}° [{low:.2f}, {high:.2f}] of the true class away (AS⁻), {against} the "
        f"{level.mean['AS_neg']:.2f}° of a random displacement of equal energy, while it moves the picture's meaning by "
        f"{overall['IS']:.1f}° [{intervals['IS'][0]:.1f}, {intervals['IS'][1]:.1f}] (IS) and leaves every logit as it was."
    )
    accuracy, interval = information.accuracy["null_space"], information.intervals["accuracy null_space"]
    second = (
        f"The null component alone lets a fresh linear probe name the class in {accuracy:.0%} [{interval[0]:.0%}, {interval[1]:.0%}] of "
        f"held-out pictures (always naming the most frequent one: {information.chance:.0%}), and {information.unique:.1%} of the variance "
        "of the image embeddings can be read from features but not from the part of them that the head sees."
    )
    worst = ", ".join(f"{score.name} ({score.means['AS_neg']:.1f}°)" for score in classes.classes[:3])
    moved = concepts.select("strongest", len(concepts.concepts))
    lost, gained = [shift for shift in moved if shift.score < 0][:3], [shift for shift in moved if shift.score > 0][:3]
    third = (
        f"It leaks most for {worst}; of {len(concepts.concepts)} concepts, removal takes most from {_named(lost)} and brings "
        f"{_named(gained)} closer."
    )
    return [first, second, third]


def _named(shifts: list[ConceptShift]) -> str:
    return ", ".join(f"{shift.concept} ({shift.score:+.1f}°)" for shift in shifts) or "none"


def analysis_warnings(measurement: ModelMeasurement, agreement: float, images_per_feature: float) -> list[str]:
    """Reasons not to believe the figures: too few pictures, translators that disagree or lose the class, a blind VLM (sentences)."""
    warnings = []
    for name, scores in measurement.translators.items():
        if scores.fit_images < images_per_feature * measurement.head.features:
            warnings.append(
                f"Warning: the {name} translator was fitted on {scores.fit_images} pictures for {measurement.head.features} features; "
                f"below {images_per_feature:g} a feature it is not identified well and AS⁻ reads too high."
            )
        if scores.zero_shot < ZERO_SHOT * measurement.vlm_zero_shot:
            warnings.append(
                f"Warning: features translated by the {name} translator name {scores.zero_shot:.0%} of the classes where the "
                f"vision-language model's own embeddings name {measurement.vlm_zero_shot:.0%}; too much is lost for AS to mean the class."
            )
    if agreement < AGREEMENT:
        warnings.append(
            f"Warning: the two translators, fitted on different pictures, agree on the classes' directions to {agreement:.2f} only "
            f"(below {AGREEMENT}); class-level figures depend on which pictures were taken."
        )
    if measurement.vlm_zero_shot < 0.5:
        warnings.append(
            f"Warning: the vision-language model itself names only {measurement.vlm_zero_shot:.0%} of the test pictures' classes."
        )
    if measurement.translators[PRIMARY].overall["IS"] < VISIBLE_IS:
        warnings.append(
            f"Note: an IS below {VISIBLE_IS:g}° is hardly visible in a picture; the null space of this head does little."
        )
    return warnings
