"""Tables and figures of chance, information, perturbations and passports: what is measured is what is written and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from singreg.analysis.chance_results import FIGURES, KINDS, ChanceLevel, ChanceReport, ChanceScores
from singreg.analysis.information_results import BLOCKS, UniqueInformation
from singreg.analysis.passport import HeadPassport, head_passport
from singreg.analysis.perturbation import PerturbationCurve, PerturbationReport
from singreg.reporting.plots import save_figure
from singreg.reporting.validation_plots import draw_chance, draw_information, draw_passports, draw_perturbations
from singreg.reporting.validation_tables import chance_table, information_table, passport_table, perturbation_table


def chance() -> ChanceReport:
    def scores(shift: float) -> ChanceScores:
        mean = {name: shift + place for place, name in enumerate(FIGURES)}
        level = ChanceLevel(mean, dict.fromkeys(FIGURES, 0.25), {}, 0.5)
        return ChanceScores({name: value + 10 for name, value in mean.items()}, 0.75, dict.fromkeys(KINDS, level))

    return ChanceReport(images=31, draws=4, seed=0, features=12, dimensions=8, paper=scores(0.125), centred=scores(0.5))


def information() -> UniqueInformation:
    r2, accuracy = dict(zip(BLOCKS, (0.6, 0.5, 0.4), strict=True)), dict(zip(BLOCKS, (0.9, 0.8, 0.7), strict=True))
    intervals = {f"r2 {name}": [value - 0.01, value + 0.02] for name, value in r2.items()}
    intervals |= {f"accuracy {name}": [value - 0.05, value + 0.05] for name, value in accuracy.items()}
    intervals |= {"unique": [0.09, 0.11], "unique_accuracy": [-0.01, 0.2], "chance": [0.1, 0.15]}
    return UniqueInformation(r2, 0.1, accuracy, 0.1, 0.125, intervals, {}, 101, 90, 0, 403, 300)


def perturbations() -> PerturbationReport:
    def curve(change: float) -> PerturbationCurve:
        mean = {"logit_change": [change, 2 * change], "logit_change_float32": [1e-6, 2e-6], "flipped": [0.25, 0.5], "angle T": [3.25, 6.5]}
        return PerturbationCurve(mean, mean, mean)

    return PerturbationReport([0.1, 1.0], {"null": curve(0.0), "random": curve(0.5), "principal": curve(1.0)}, 2.0, 31, ["T"])


def passports() -> list[HeadPassport]:
    g = torch.Generator().manual_seed(0)
    shapes = {"wide": (4, 12), "a | <name> with $ and more letters than a figure has room for": (11, 12), "full": (14, 12)}
    return [head_passport(torch.randn(*shape, generator=g), tag=tag) for tag, shape in shapes.items()]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in table.splitlines()]


def test_chance_stands_beside_every_score() -> None:
    rows = cells(chance_table({"auditor": chance()}))
    assert rows[0][3:] == ["AS °", "AS⁻ °", "AS⁺ °", "/AS/ °", "IS °", "κ", "energy removed"]
    body = rows[2:]
    assert len(body) == 8
    assert {len(row) for row in rows} == {10}
    assert body[0][:5] == ["auditor", "paper's", "the null space", "10.12", "11.12"]
    assert body[1][2:4] == ["random, equal dimension", "0.12 ± 0.25"]
    assert body[3][8] == "5.125 ± 0.250"
    assert body[4][1:4] == ["centred", "the null space", "10.50"]
    assert [body[0][9], body[2][9]] == ["75.0%", "50.0%"]
    assert "\\|" not in chance_table({"auditor": chance()}, compact=True)


def test_information_gives_every_interval() -> None:
    rows = cells(information_table(information()))[2:]
    assert rows[0] == ["f, whole", "0.600 [0.590, 0.620]", "90.0 [85.0, 95.0]"]
    assert rows[3][1:] == ["0.100 [0.090, 0.110]", "10.0 [-1.0, 20.0]"]
    assert rows[4] == ["chance", "0", "12.5 [10.0, 15.0]"]


def test_perturbations_by_size_and_direction() -> None:
    rows = cells(perturbation_table(perturbations()))
    assert rows[0][-1] == "T: angle °"
    assert rows[2] == ["0.1", "null space", "0.0e+00", "1.0e-06", "25.0%", "3.25"]
    assert rows[7] == ["1", "row space", "2.0e+00", "2.0e-06", "50.0%", "6.50"]


def test_passports_side_by_side_even_without_a_null_space() -> None:
    rows = cells(passport_table(passports()))
    assert len(rows) == 5
    assert {len(row) for row in rows} == {11}
    assert rows[2][:6] == ["wide", "4", "12", "4", "4", "8 (66.7%)"]
    assert rows[4][5] == "0 (0.0%)"
    assert rows[4][-1].startswith("no null space")
    assert "<name>" not in passport_table(passports())


@pytest.mark.parametrize(
    "figure",
    [
        draw_chance(chance(), "auditor"),
        draw_information(information()),
        draw_perturbations(perturbations()),
        draw_perturbations(replace(perturbations(), curves={"random": perturbations().curves["random"]})),
        draw_passports(passports()),
        draw_passports([replace(passports()[0], summary=replace(passports()[0].summary, tag="猫 \U0001f408"))]),
    ],
    ids=["chance", "information", "perturbations", "no null space", "passports", "letters the font lacks"],
)
@pytest.mark.filterwarnings("error")
def test_figures_are_written_as_pictures(figure: Figure, tmp_path: Path) -> None:
    save_figure(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert min(picture.size) > 250
        assert len(picture.convert("RGB").getcolors(2**24)) > 30  # type: ignore[arg-type]


def test_what_is_drawn_is_what_was_measured() -> None:
    panels = draw_chance(chance()).axes
    assert [axes.get_title() for axes in panels] == ["AS °", "AS⁻ °", "AS⁺ °", "|AS| °", "IS °", "κ"]
    drawn = [float(line.get_ydata()[0]) for line in panels[4].lines if line.get_marker() == "D"]  # type: ignore[index, arg-type]
    assert drawn == [14.125, 14.5]
    bars = [patch.get_height() for patch in draw_information(information()).axes[0].patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx([0.6, 0.5, 0.4])
    lines = {str(line.get_label()): list(line.get_ydata()) for line in draw_perturbations(perturbations()).axes[1].lines}  # type: ignore[arg-type]
    assert lines["row space"] == [25, 50]
    widths = [patch.get_width() for patch in draw_passports(passports()).axes[0].patches]  # type: ignore[attr-defined]
    assert widths[:3] == pytest.approx([100 * 8 / 12, 100 / 12, 0])
