"""The analysis recipe on tiny scenes: whole, on two processes, with a non-linear translator, and on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState

from recipes.analyze import main
from singreg.analysis.analysis_findings import analysis_warnings
from singreg.analysis.study.agreement import translator_agreement
from singreg.evaluation.analyze import Analysis, AnalysisBench
from singreg.evaluation.analyze_config import parse_analyze
from singreg.translator import LinearTranslator
from singreg.workbench.run import Run, make_accelerator
from tests.processes import run_processes

TINY = [
    "--data.scenes_train", "150", "--data.scenes_audit", "140", "--data.scenes_test", "61", "--data.scenes_bank", "10",
    "--concepts", '["red", "grass", "water", "Red"]', "--worst", "3", "--neighbours", "2", "--chance_draws", "2", "--concepts_shown", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def arguments(runs: Path, cache: Path, *more: str) -> list[str]:
    return ["--runs", str(runs), "--cache", str(cache), *TINY, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    AcceleratorState._reset_state(True)
    main(arguments(runs, cache, "--name", "whole"))
    AcceleratorState._reset_state(True)
    return runs / "whole"


def test_the_files_and_what_they_say(whole: Path) -> None:
    files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    names = ("joint", "classes", "accuracy", "concepts", "images", "chance", "information", "perturbations")
    plots = {f"plots/{name}.png" for name in names}
    translators = {"translator-fitted.safetensors", "translator-auditor.safetensors"}
    assert {"config.yaml", "report.json", "report.md", "report.html", "scores.parquet", *plots, *translators} <= files
    report: dict[str, Any] = json.loads((whole / "report.json").read_text())
    assert report["measurement"]["images"] == report["concepts"]["images"] == 61
    assert report["omissions"][0] == "1 repeated concepts were left out."
    assert len(report["findings"]) == 3
    assert any("140 pictures for 256 features" in sentence for sentence in report["warnings"])
    assert pq.read_table(whole / "scores.parquet").num_rows == 61
    text = (whole / "report.md").read_text()
    for sentence in ["1 repeated concepts were left out.", "## Beside chance", "## Concepts", "random, equal energy"]:
        assert sentence in text
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(plots)
    assert "http" not in page.replace("http-equiv", "")


def test_a_second_analysis_reads_the_features_of_the_first(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singreg.models.classifier import Classifier

    def forbidden(*_: object) -> None:
        raise AssertionError("the backbone ran again although its features are cached")

    monkeypatch.setattr(Classifier, "features", forbidden)
    monkeypatch.setattr(Classifier, "features_and_logits", forbidden)
    main(arguments(tmp_path, cache, "--name", "again"))
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (whole, tmp_path / "again"))
    for name in ("measurement", "chance", "information", "perturbation", "concepts", "images", "shifts"):
        assert first[name] == second[name], name


def _report(rank: int, world: int, folder: str, cache: str) -> dict[str, Any] | None:
    AcceleratorState._reset_state(True)
    config = parse_analyze(arguments(Path(folder), Path(cache), "--name", f"on-{world}", "--concepts", '["red", "grass", "water"]'))
    accelerator = make_accelerator(seed=config.seed)
    run = Run(config, accelerator, "analyze").check()
    bench = AnalysisBench.build(config, accelerator)
    job = Analysis(run.open(), config, bench)
    job.fit_translators()
    job.measure()
    job.describe()
    report = job.report()
    AcceleratorState._reset_state(True)
    return None if report is None else report.to_json()


def test_two_processes_give_what_one_gives(tmp_path: Path, cache: Path) -> None:
    one = _report(0, 1, str(tmp_path / "one"), str(cache))
    two, idle = run_processes(2, _report, str(tmp_path / "two"), str(cache))
    assert idle is None
    assert one is not None
    assert one["measurement"]["images"] == two["measurement"]["images"] == 61
    for name in ("fitted", "auditor"):
        mine, theirs = (r["measurement"]["translators"][name]["overall"] for r in (one, two))
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert one["concepts"]["overall"]["AS"] == pytest.approx(two["concepts"]["overall"]["AS"], abs=1e-3)
    assert [image["image"] for image in one["images"]["worst"]] == [image["image"] for image in two["images"]["worst"]]
    assert one["information"]["accuracy"] == pytest.approx(two["information"]["accuracy"])
    assert one["chance"]["auditor"]["paper"]["observed"] == pytest.approx(two["chance"]["auditor"]["paper"]["observed"], abs=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--concepts", '["no/such/file.txt"]'], "no/such/file.txt"),
        (["--concepts", "[]"], "concepts: expected at least one"),
        (["--concept_templates", '["a picture"]'], "{concept}"),
        (["--neighbours", "5000"], "neighbours = 5000 need more"),
        (["--chance_draws", "1"], "chance_draws: expected at least 2, got 1"),
    ],
)
def test_bad_input_is_said(more: list[str], words: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path, cache, *more))
    assert words in f"{stop.value} {capsys.readouterr().err}"
    assert not list(tmp_path.rglob("*"))


def test_agreement_is_1_for_one_translator_and_falls_with_noise() -> None:
    torch.manual_seed(0)
    texts, matrix = torch.randn(6, 8), torch.randn(8, 12)
    near = [translator_agreement(LinearTranslator(matrix, torch.zeros(8)), LinearTranslator(m, torch.ones(8)), texts)
            for m in (3 * matrix, matrix + 0.5 * torch.randn(8, 12), torch.randn(8, 12))]  # fmt: skip
    assert near[0] == pytest.approx(1)
    assert near[0] > near[1] > 0.5 > abs(near[2])
    # What all prompts share does not count: the same classes about another centre.
    shifted = translator_agreement(LinearTranslator(matrix, torch.zeros(8)), LinearTranslator(matrix, torch.zeros(8)), texts + 100)
    assert shifted == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="at least 2 classes"):
        translator_agreement(LinearTranslator(matrix, torch.zeros(8)), LinearTranslator(matrix, torch.zeros(8)), texts[:1])


def test_warnings_come_when_translators_disagree(whole: Path) -> None:
    from singreg.analysis.results import ModelMeasurement

    measured = ModelMeasurement.from_json(json.loads((whole / "report.json").read_text())["measurement"])
    said = {agreement: "\n".join(analysis_warnings(measured, agreement, 0.0)) for agreement in (0.5, 0.9)}
    assert "agree on the classes' directions to 0.50" in said[0.5]
    assert "agree on" not in said[0.9]
