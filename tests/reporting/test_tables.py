"""Tables: figures where they belong, dashes for what is not there, and names that cannot become markup."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from singreg.analysis.results import CENTRED, FinetuneReport
from singreg.reporting import tables
from singreg.reporting.page import Table
from singreg.reporting.tables import STAGES, escape, number, percent
from tests.analysis import toy
from tests.reporting.real_report import HOSTILE, real_report


def rows(text: str) -> list[dict[str, str]]:
    """A Markdown table as one mapping a row."""
    table = Table.from_markdown(text)
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def shortened(figure: float, digits: int = 2) -> str:
    return f"{figure:.{digits}f}"


@pytest.mark.parametrize(
    ("value", "text"), [(1.006, "1.01"), (-2.0, "-2.00"), (None, "–"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "-∞")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text
    assert number(40.2, 0, "°") == "40°"


@pytest.mark.parametrize(("value", "text"), [(0.1234, "12.3%"), (1, "100.0%"), (None, "–"), (math.nan, "–")])
def test_percentages(value: float | None, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize("control", [True, False])
def test_every_stage_and_translator_has_its_row_with_its_own_figures(control: bool) -> None:
    report = real_report(control=control)
    got = rows(tables.results_table(report))
    stages = ["before", *(["control"] if control else []), "sing"]
    wanted = [(STAGES[s], t) for s in stages for t in ("frozen", "loop", "auditor") if t in report.measurements[s].translators]
    assert [(row["model"], row["translator"]) for row in got] == wanted
    assert ("SingLoss", "loop") in wanted
    measured = report.measurements["sing"]
    for row, name in zip(got[-3:], ("frozen", "loop", "auditor"), strict=True):
        scores = measured.translators[name]
        low, high = scores.intervals["AS_neg"]
        assert row["AS⁻ °"] == f"{scores.overall['AS_neg']:.2f} [{low:.2f}, {high:.2f}]"
        assert row["|AS| °"].startswith(shortened(scores.overall["AS_abs"]))
        assert row["IS °"].startswith(shortened(scores.overall["IS"]))
        assert row["κ"].startswith(shortened(scores.overall["kappa"], 3))
        low, high = scores.intervals[f"{CENTRED}AS_neg"]
        assert row["AS⁻ centred °"] == f"{scores.centred['AS_neg']:.2f} [{low:.2f}, {high:.2f}]"
        assert row["top-1"] == f"{measured.top1:.1%}"
        assert row["null share"] == shortened(measured.null_share, 3)
        assert row["cosine"] == shortened(scores.cosine, 3)


def test_the_table_on_screen_is_plain_and_narrow_and_holds_the_same_figures() -> None:
    report = real_report()
    compact = tables.results_table(report, compact=True)
    lines = compact.splitlines()
    assert len(lines) == 2 + 7
    assert max(map(len, lines)) <= 140
    assert "\\" not in compact
    assert f"{report.measurements['sing'].translators['loop'].overall['AS_neg']:.2f}" in lines[-2]
    assert "[" not in compact  # intervals are in the report


def test_comparisons_have_one_row_each_with_interval_and_unit() -> None:
    report = real_report()
    got = rows(tables.comparison_table(report))
    assert len(got) == len(report.comparisons)
    for row, found in zip(got, report.comparisons, strict=True):
        assert row["figure"] == found.name
        assert (row["value"], row["unit"]) == (shortened(found.value, 3), found.unit)
        assert row["95 % interval"] == f"[{found.low:.3f}, {found.high:.3f}]"
    undefined = replace(report.comparisons[0], value=math.nan, low=0.5, high=math.inf)
    (row,) = rows(tables.comparison_table(replace(report, comparisons=[undefined])))
    assert (row["value"], row["95 % interval"]) == ("–", "[0.500, ∞]")


def test_heads_steering_and_translators_have_a_row_for_each() -> None:
    report = real_report(tag="toy|net")
    heads = rows(tables.head_table(report))
    assert [row["model"] for row in heads] == [STAGES[stage] for stage in report.measurements]
    assert {row["classifier"] for row in heads} == {"toy|net"}
    assert (heads[0]["classes"], heads[0]["features"], heads[0]["nullity"]) == ("5", "24", "19 (79%)")
    steering = rows(tables.steering_table(report))
    summary = report.measurements["before"].steering["frozen"]
    assert len(steering) == 7
    assert steering[0]["AS to target °"] == f"{summary.attribute_score:.2f} ± {summary.attribute_score_std:.2f}"
    assert (steering[0]["at IS"], steering[0]["images"]) == ("40°", str(summary.images))
    quality = rows(tables.translator_table(report))
    assert len(quality) == 7
    assert (quality[0]["fit on"], quality[0]["ridge"], quality[0]["R² (validation)"]) == ("50", "0.1", "–")


def with_class_figures(report: FinetuneReport, stage: str, values: list[float | None]) -> FinetuneReport:
    measured = report.measurements[stage]
    scores = measured.translators["auditor"]
    scores = replace(scores, per_class={**scores.per_class, "AS_neg": values})
    measured = replace(measured, translators={**measured.translators, "auditor": scores})
    return replace(report, measurements={**report.measurements, stage: measured})


def test_classes_are_listed_leakiest_first_and_those_without_pictures_last() -> None:
    report = with_class_figures(real_report(), "before", [1.0, None, 3.0, 0.0, 2.0])
    got = rows(tables.per_class_table(report))
    assert [row["class"] for row in got] == ["gamma", "epsilon", "alpha", "delta", "beta"]
    assert [row["AS⁻ ° before"] for row in got] == ["3.00", "2.00", "1.00", "0.00", "–"]
    assert {f"{label} {stage}" for label in ("AS⁻ °", "IS °") for stage in report.measurements} < set(got[0])


def test_how_it_was_made_is_a_list_that_no_argument_can_leave() -> None:
    text = tables.facts({"command": "x.py --name `a`\n\n# Title\n<b>"}, {"a<b>": "c|d"}, {"before": 1.4}, "one more")
    assert text.splitlines() == [
        "- command: `x.py --name a # Title <b>`", "- configuration: config.yaml beside this file", "- one more",
        "- machine: a&lt;b&gt;: c\\|d", "- time: before 1 s",
    ]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_become_text(name: str) -> None:
    guarded = escape(name)
    assert "<" not in guarded
    assert not re.search(r"(?<!\\)\|", guarded)
    assert not re.search(r"(?<!\\)`", guarded)
    assert "](" not in guarded  # neither a link nor a picture
    assert "*" not in guarded
    (cell,) = Table.from_markdown(f"| {guarded} |\n|:--|").headers
    assert cell == " ".join(name.split())
    for table in (tables.per_class_table(real_report((name, *toy.NAMES[1:]))), tables.head_table(real_report(tag=name))):
        assert name in [cell for row in Table.from_markdown(table).rows for cell in row]
        assert guarded in table


@given(st.text())
def test_any_text_stays_one_cell_and_can_be_written(text: str) -> None:
    guarded = escape(text)
    guarded.encode()  # stray bytes of a folder name, too
    table = Table.from_markdown(f"| {guarded} | end |\n|:--|:--|")
    assert table.headers[1:] == ["end"]


def test_stray_bytes_of_a_folder_name_are_shown_as_such() -> None:
    assert escape("run \udcff") == "run \\\\udcff"


def test_underscores_within_words_stay_readable_and_those_around_them_are_no_emphasis() -> None:
    assert escape("n01440764_tench_fish") == "n01440764_tench_fish"
    assert escape("_tench_ __x") == "&#95;tench&#95; &#95;&#95;x"
