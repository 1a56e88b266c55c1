"""The steering recipe on tiny scenes: whole, on two processes, and on bad input."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.steer import main
from singreg.analysis.old_steering.results import SteerReport
from singreg.evaluation.steer import Steering, SteeringBench
from singreg.evaluation.steer_config import SteerConfig, parse_steer
from singreg.reporting.plots import save_figure
from singreg.reporting.steering_plots import draw_curves, draw_pairs
from singreg.reporting.steering_tables import pair_table
from singreg.workbench.parsing import find_config
from singreg.workbench.run import Run, make_accelerator
from tests.processes import run_processes

TINY = [
    "--data.scenes_train", "90", "--data.scenes_audit", "80", "--data.scenes_test", "50", "--data.scenes_bank", "10",
    "--images_per_class", "2", "--steps", "[0, 0.1, 0.5]", "--radii", "[0.8, 1.2]",
]  # fmt: skip
SOME = ["--sources", '["circle", "star"]', "--targets", '["star", "heart"]', "--prompts", '["an image of grass"]']


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def arguments(runs: Path, cache: Path, *more: str) -> list[str]:
    return ["--runs", str(runs), "--cache", str(cache), *TINY, *SOME, *more]


def run_job(folder: str, cache: str, *more: str) -> SteerReport | None:
    """What the recipe does between parsing and the end, with the report in hand."""
    AcceleratorState._reset_state(True)
    config = parse_steer(arguments(Path(folder), Path(cache), *more))
    accelerator = make_accelerator(seed=config.seed)
    run = Run(config, accelerator, "steer").check()
    bench = SteeringBench.build(config, accelerator)
    job = Steering(run.open(), config, bench)
    job.fit_translators()
    job.measure()
    job.steer()
    try:
        return job.report()
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> SteerReport:
    """One small run's report, for the tests that change its figures or names."""
    found = run_job(str(tmp_path_factory.mktemp("runs")), str(cache), "--name", "small")
    assert found is not None
    return found


def test_the_recipe_from_end_to_end(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(tmp_path, cache, "--name", "whole"))
    folder = tmp_path / "whole"
    shown = capsys.readouterr().out
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "report.json", "report.md", "report.html", "plots/curves.png", "plots/pairs.png"} <= files
    assert str(folder / "report.md") in shown
    assert "fitted      auditor" in shown

    report = json.loads((folder / "report.json").read_text())
    assert (report["kind"], report["sources"], report["targets"]) == ("steer", ["circle", "star"], ["star", "heart", "an image of grass"])
    assert [(p["attacker"], p["judge"]) for p in report["pairs"]] == [
        ("fitted", "fitted"), ("fitted", "auditor"), ("auditor", "fitted"), ("auditor", "auditor")
    ]  # fmt: skip
    own = report["pairs"][0]
    assert own["overall"]["pairs"] == 5  # star to star is left out
    assert own["overall"]["images"] == 4
    assert own["matrices"]["images"] == [[2, 2, 2], [0, 2, 2]]
    assert own["calibration_error"] < 1e-3
    assert own["logit_change"] < 1e-9
    assert len(report["curves"]) == 4 * 3
    assert {name: t["fit_images"] for name, t in report["measurement"]["translators"].items()} == {"fitted": 100, "auditor": 80}
    assert report["natural"]["images"] == 50
    assert report["natural"]["fit_images"] == 100
    assert any("100 pictures for 256 features" in warning for warning in report["warnings"])
    assert any("lower bounds" in sentence for sentence in report["findings"])

    text = (folder / "report.md").read_text()
    assert "![success and AS" in text
    assert all(f"| {name} " in text for name in ("circle", "star"))
    assert "lower bounds" in (folder / "report.html").read_text()
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()
    assert tags["images"] == ["plots/curves", "plots/pairs"]
    curve = events.Scalars("curve step (x 1000)/success/fitted attacks, auditor judges")
    assert [event.step for event in curve] == [0, 100, 500]
    written = next(c for c in report["curves"] if (c["budget"], c["attacker"], c["judge"]) == ("step", "fitted", "auditor"))
    assert [event.value for event in curve] == pytest.approx(written["figures"]["success"])
    assert {"table 1/text_summary", "findings/text_summary"} <= set(tags["tensors"])

    # The resolved configuration is the run: the same again under another name finds the same.
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["prompts"] == ["an image of grass"]
    main(["--config", str(folder / "config.yaml"), "--name", "again"])
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert (again["pairs"], again["curves"]) == (report["pairs"], report["curves"])
    with pytest.raises(SystemExit, match="already holds a run"):
        main(["--config", str(folder / "config.yaml")])


def _in_process(rank: int, world: int, runs: str, cache: str) -> dict[str, Any] | None:
    report = run_job(runs, cache, "--name", "two")
    return None if report is None else report.to_json()


def test_two_processes_find_what_one_finds(tmp_path: Path, cache: Path) -> None:
    one = run_job(str(tmp_path), str(cache), "--name", "one")
    assert one is not None
    first, second = run_processes(2, _in_process, str(tmp_path), str(cache))
    assert second is None  # only the main process reports
    for a, b in zip(one.pairs, first["pairs"], strict=True):
        assert a.matrices["images"] == b["matrices"]["images"]
        assert a.overall["AS"] == pytest.approx(b["overall"]["AS"], abs=1e-3)
        assert a.overall["images"] == b["overall"]["images"]
    for a, b in zip(one.curves, first["curves"], strict=True):
        assert a.figures["AS"] == pytest.approx(b["figures"]["AS"], abs=1e-3)
        assert a.area["success"] == pytest.approx(b["area"]["success"], abs=1e-3)
    assert one.natural.p95 == pytest.approx(first["natural"]["p95"], rel=1e-5)
    assert first["machine"]["processes"] == 2


def test_a_run_that_reaches_nothing_says_so(tmp_path: Path, cache: Path) -> None:
    """An image score that no null step can turn to: no figure, no crash, one warning for each attacker."""
    report = run_job(str(tmp_path), str(cache), "--name", "far", "--image_score", "179.5")
    assert report is not None
    assert [p.overall["reachable"] for p in report.pairs] == [0.0] * 4
    assert report.pairs[0].overall["AS_abs"] is None
    assert sum("no picture can be steered to 179.5°" in warning for warning in report.warnings) == 2
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["measurement"]["steering"]["fitted"]["attribute_score"] is None
    assert "paper's table 1" not in " ".join(report.findings)
    text = (tmp_path / "far" / "report.md").read_text()
    assert "– ± –" in text
    assert "nan" not in text.lower()


def test_what_is_not_defined_goes_to_json_as_null(report: SteerReport) -> None:
    nan = float("nan")
    curve = replace(report.curves[0], figures={"AS": [nan, 1.0]}, area={"AS": [nan, -float("inf"), 2.0]})
    holes = replace(report, curves=[curve], natural=replace(report.natural, p99=nan))
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(asdict(holes.curves[0]), allow_nan=False)
    written = json.loads(json.dumps(holes.to_json(), allow_nan=False))
    assert written["curves"][0]["figures"]["AS"] == [None, 1.0]
    assert written["curves"][0]["area"]["AS"] == [None, None, 2.0]
    assert written["natural"]["p99"] is None


def test_non_linear_translators_attack_and_judge_by_bisection(tmp_path: Path, cache: Path) -> None:
    report = run_job(str(tmp_path), str(cache), "--name", "mlp", "--mlp", '["mlp3"]', "--image_score", "10")
    assert report is not None
    names = ["fitted", "auditor", "mlp3"]
    assert [(p.attacker, p.judge) for p in report.pairs] == [(a, j) for a in names for j in names]
    own = report.pairs[-1]
    assert own.overall["reachable"] > 0.5
    assert own.calibration_error < 1e-2  # float32 weights; the linear ones are exact to 1e-3
    assert own.logit_change < 1e-9
    assert own.overall["AS"] > 1
    assert list(report.measurement.translators) == names
    assert {(c.attacker, c.judge) for c in report.curves} == {(a, j) for a in names for j in names[:2]}
    assert sum("non-linear mlp3 translator" in sentence for sentence in report.findings) == 1
    text = (tmp_path / "mlp" / "report.md").read_text()
    assert "*mlp3*: non-linear" in text
    assert "| mlp3 " in text
    labels = [line.get_text() for line in draw_curves(report).axes[0].get_legend().get_texts()]
    assert labels[-1] == "mlp3 attacks, auditor judges"
    assert len({line.get_color() for line in draw_curves(report).axes[0].get_lines()}) == 3


def test_dry_run_makes_nothing(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(tmp_path, cache, "--dry_run", "true"))
    shown = capsys.readouterr().out
    assert "5 pairs of 2 sources and 3 targets, 4 pictures, 10 steerings" in shown
    assert "rank 10, nullity 246" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--sources", "circle", "--targets", "circle", "--prompts", "[]"], ["'circle' is its own source"]),
        (["--prompts", '["an image of grass", "  "]'], ["prompts: blank at position 1 of 2"]),
        (["--targets", "[]", "--prompts", "[]"], ["targets: expected class names"]),
        (["--prompts", '["a dog", "...", " - "]'], ["prompts: no text in '...', ' - '"]),
        (
            ["--mlp", '["mlp3", "mlp3"]', "--unclip", " ", "--unclip_pictures", "0"],
            ["mlp: listed twice: mlp3", "unclip: expected a pipeline", "unclip_pictures: expected a number above 0"],
        ),
        (
            [
                "--steps", "[0.2, 0.1]", "--image_score", "180", "--images_per_class", "0", "--sources", '["star", "star"]',
                "--radius_floor", "0",
            ],
            ["steps: expected at least two", "image_score: expected degrees", "images_per_class", "listed twice: star", "radius_floor"],
        ),
    ],
)  # fmt: skip
def test_bad_values_are_shown_together(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, cache, *more))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in expected)
    assert f"{len(expected)} problem(s)" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--sources", '["circel"]', "--targets", '["hart", "star"]'],
            r"sources: .*'circel' \(near: circle(.|\n)*targets: .*'hart' \(near: heart",
        ),
        (
            ["--targets", "[]", "--prompts", '["an image of a circle"]', "--sources", "circle"],
            "the only target is the source itself.*: circle",
        ),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_stop_before_any_work(tmp_path: Path, cache: Path, more: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        main(arguments(tmp_path, cache, *more))
    assert list(tmp_path.iterdir()) == []


def test_shipped_configurations_parse() -> None:
    demo, real = (parse_steer(["--config", name]) for name in ("steer_demo", "steer_imagenet16"))
    assert demo.data.source == "scenes"
    assert (real.image_score, real.sources, real.targets) == (40.0, "all", "all")
    assert "../shared/assets" in find_config("steer_imagenet16").read_text()


def test_many_classes_are_drawn_and_listed_in_part(report: SteerReport) -> None:
    names = [f"class {n}" for n in range(70)]
    matrix = torch.rand(70, 70).tolist()
    pairs = [p.__class__(**{**p.__dict__, "matrices": dict.fromkeys(p.matrices, matrix)}) for p in report.pairs]
    wide = SteerReport(**{**report.__dict__, "sources": names, "targets": names, "pairs": pairs})
    assert len(draw_pairs(wide).axes[0].get_yticklabels()) == 60
    assert "the first 60 × 60" in draw_pairs(wide)._suptitle.get_text()
    assert len(draw_curves(wide).axes) == 6
    # Numbers must stay readable on a page: few classes side by side, many one below the other.
    (low, few), (tall, many) = (draw_pairs(r).get_size_inches()[::-1] for r in (report, wide))
    assert few <= 12 >= low
    assert many <= 12.5
    assert tall > 2 * low
    assert len(pair_table(wide, pairs[0]).splitlines()) == 2 + 20


def test_names_that_the_font_lacks_are_drawn_by_their_numbers(report: SteerReport, tmp_path: Path) -> None:
    named = replace(report, sources=["猫", "$x_{"], targets=["犬 and a very long name", "\U0001f642", "ünï"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning of matplotlib's
        save_figure(draw_pairs(named), tmp_path / "pairs.png")
    assert [label.get_text() for label in draw_pairs(named).axes[0].get_yticklabels()] == ["\\u732b", "\\$x_{"]


def test_configuration_is_what_the_flags_say() -> None:
    config = parse_steer(["--sources", "circle", "--max_pairs", "3", "--auditor.ridge", "0.5"])
    assert isinstance(config, SteerConfig)
    assert (config.sources, config.max_pairs, config.auditor.ridge) == ("circle", 3, 0.5)
