"""What is planted in the null space is told apart by the scores of METHOD section 8, and today's |AS| alone cannot do it.

What each figure should say, and is asserted to (●: clearly not chance, ○: chance or nothing):

| planted in the null | |AS| paper's | AS⁻ | AS⁺ | κ | |AS| centred | unique R² | class probe | AS⁻ own text over another's |
|---|---|---|---|---|---|---|---|---|
| leakage: class meaning      | ● | ● | ○ | - | ● | ● | ● | ● |
| nuisance: across the class  | ● | ○ | ● | + | ● | ● | ○ | ○ |
| copy: of the row space      | ● | ● | ○ | - | ● | ○ | ● | ● |
| offset: one for all         | ● | ● | ○ | - | ○ | ○ | ○ | ○ |
| nothing                     | ○ | ○ | ○ | 0 | ○ | ○ | ○ | ○ |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest

from singreg.analysis.chance import measure_chance
from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.information import fit_blocks, measure_information
from singreg.analysis.information_results import UniqueInformation
from singreg.translator import fit_translator
from tests.analysis.planted import CASES, CLASSES, DIM, plant

LOUD = [case for case in CASES if case != "nothing"]


@dataclass(frozen=True)
class Findings:
    chance: ChanceReport
    information: UniqueInformation


@cache
def findings(case: str) -> Findings:
    """Fitted on one part, measured on another, by an auditor (standardised by block)."""
    fit, test = plant(case, seed=1), plant(case, seed=2, count=800)
    auditor = fit_translator([(b.features, b.embeddings) for b in fit.batches()], standardize=fit.space.basis)
    chance = measure_chance(
        test.batches(), texts=test.texts, null_space=test.space, translators={"auditor": auditor}, mean=fit.features.mean(0), draws=4
    )["auditor"]
    fits = fit_blocks(fit.batches(), null_space=fit.space, classes=CLASSES, target_dim=DIM)
    return Findings(chance, measure_information(test.batches(), fits, resamples=300))


def decide(found: Findings) -> str:
    """The decision table read from top to bottom."""
    paper, centred, information = found.chance.paper, found.chance.centred, found.information
    if paper.observed["IS"] < 0.25 * paper.levels["energy"].mean["IS"]:
        return "nothing"
    if centred.observed["AS_abs"] < 0.25 * paper.observed["AS_abs"]:
        return "offset"
    if information.intervals["unique"][1] < 0.01:
        return "copy"
    class_in_null = information.intervals["accuracy null_space"][0] > 2 * information.chance
    harm, help_ = centred.observed["AS_neg"], centred.observed["AS_pos"]
    if class_in_null and harm > 3 * help_ and centred.observed["kappa"] < 0:
        return "leakage"
    if not class_in_null and help_ > 3 * harm and centred.observed["kappa"] > 0:
        return "nuisance"
    return "undecided"


@pytest.mark.parametrize("case", CASES)
def test_each_truth_is_told_apart(case: str) -> None:
    assert decide(findings(case)) == case


def test_the_papers_absolute_score_cannot_tell_them_apart() -> None:
    """Leakage and nuisance, its opposite, read the same |AS|; so do all four that are not nothing."""
    values = {case: findings(case).chance.paper.observed["AS_abs"] for case in CASES}
    assert values["leakage"] == pytest.approx(values["nuisance"], rel=0.05)
    assert [values[case] for case in LOUD] == pytest.approx([5.0] * len(LOUD), rel=0.05)
    assert values["nothing"] < 0.5


@pytest.mark.parametrize(("case", "sign"), [("leakage", -1), ("copy", -1), ("offset", -1), ("nuisance", 1), ("nothing", 0)])
def test_the_sign_tells_harm_from_help(case: str, sign: int) -> None:
    figures = findings(case).chance.paper.observed
    if sign:
        assert sign * figures["kappa"] > 0.2
        assert sign * (figures["AS_pos"] - figures["AS_neg"]) > 0.95 * figures["AS_abs"]
    else:
        assert abs(figures["kappa"]) < 0.05
        assert abs(figures["AS"]) < 0.1


@pytest.mark.parametrize("case", LOUD)
def test_only_an_offset_goes_with_centring(case: str) -> None:
    found = findings(case).chance
    ratio = found.centred.observed["AS_abs"] / found.paper.observed["AS_abs"]
    assert ratio < 0.15 if case == "offset" else ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("case", "unique"), [("leakage", 0.11), ("nuisance", 0.65), ("copy", 0), ("offset", 0), ("nothing", 0)])
def test_unique_information_knows_a_copy(case: str, unique: float) -> None:
    found = findings(case).information
    assert found.unique == pytest.approx(unique, abs=0.02)
    low, high = found.intervals["unique"]
    assert low <= found.unique <= high
    assert (low > 0.05) == (unique > 0)


@pytest.mark.parametrize(
    ("case", "inside"), [("leakage", True), ("copy", True), ("nuisance", False), ("offset", False), ("nothing", False)]
)
def test_the_probe_finds_the_class_where_it_was_put(case: str, inside: bool) -> None:
    found = findings(case).information
    low, high = found.intervals["accuracy null_space"]
    assert (low > 0.7) == inside
    assert inside or low < 1.2 / CLASSES < high + 0.05
    assert found.chance == pytest.approx(1 / CLASSES, abs=0.01)
    assert (found.unique_accuracy > 0.05) == (case == "leakage")  # a copy adds nothing to what the row space tells of the class


@pytest.mark.parametrize(("case", "own"), [("leakage", True), ("copy", True), ("offset", False), ("nothing", False)])
def test_another_classs_text_tells_the_class_from_a_shift_of_all(case: str, own: bool) -> None:
    scores = findings(case).chance.paper
    other = scores.levels["texts"].mean["AS_neg"]
    assert scores.observed["AS_neg"] > 4 * other if own else scores.observed["AS_neg"] < 1.2 * other


def test_removing_nothing_is_far_below_a_random_removal() -> None:
    """A null space that holds nothing is no accident of its size: random subspaces as large, or as energetic, cost meaning."""
    scores = findings("nothing").chance.paper
    for kind in ("dimension", "energy"):
        assert scores.observed["IS"] < 0.15 * scores.levels[kind].mean["IS"]
        assert scores.observed["AS_neg"] < 0.05 * scores.levels[kind].mean["AS_neg"]
