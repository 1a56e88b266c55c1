"""The demo's frozen figures, the tour, the benchmarks and the check for GPUs, each run to its end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

ROOT = Path(__file__).parents[1]
FROZEN = json.loads((ROOT / "tests" / "golden" / "demo.json").read_text(encoding="utf-8"))
NOTEBOOK = ROOT / "recipes" / "tour.ipynb"
PAIRS = r"ratio, pair by pair: median \d"
BENCHMARKS = {
    "growth --largest 5000 --features 200 --dim 6": r"5000 / 500 features: peak memory ratio \d",
    "step_time --model test_resnet --pixels 32 --batch 4 --classes 5 --dim 8 --pairs 3": PAIRS,
    "analysis_speed --audit 64 --test 40 --dim 8 --pairs 2": PAIRS,
}


def printed_by(script: str, *words: str, folder: Path) -> str:
    command = [sys.executable, str(ROOT / "tests" / script), *words]
    return subprocess.check_output(command, text=True, cwd=folder, timeout=1800)


@pytest.mark.slow
def test_the_demo_gives_its_frozen_figures(tmp_path: Path) -> None:
    """A change that moves them must be argued, and the file written anew."""
    finetune.main(["--config", str(ROOT / "configs" / "demo.yaml"), "--out", str(tmp_path / "demo")])
    found = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))["measurements"]
    assert set(found) == set(FROZEN)
    for stage, wanted in FROZEN.items():
        measured, degrees = found[stage], 1e-3
        assert measured["top1"] == pytest.approx(wanted["top1"], abs=1e-6)
        assert measured["null_share"] == pytest.approx(wanted["null_share"], abs=1e-4)
        assert measured["audit"]["class_variance"] == pytest.approx(wanted["class_variance"], abs=degrees / 20)
        for name in measured["translators"]:
            overall = measured["translators"][name]["overall"]
            mine = {key: overall[key] for key in ("AS_neg", "AS_abs", "IS", "kappa")}
            assert mine == pytest.approx(wanted[name], abs=degrees), (stage, name)


def test_the_images_of_the_tour_are_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    figures = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(figures) == 8
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.slow
def test_the_tour_runs_and_leakage_falls() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    before, *_, after = re.findall(r"AS⁻ ([\d.]+)°", printed)
    assert float(after) < 0.5 * float(before)
    assert "predictions kept: 100.0%" in printed


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_prints_its_line_at_toy_size(benchmark: str, tmp_path: Path) -> None:
    name, *words = benchmark.split()
    assert re.search(BENCHMARKS[benchmark], printed_by(f"benchmarks/{name}.py", *words, folder=tmp_path))
    assert name != "growth" or (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_check_for_gpus_prints_json_and_a_table_on_a_cpu(tmp_path: Path) -> None:
    """At toy size; and it says by name what a CPU leaves out."""
    printed = printed_by("gpu/check.py", "--device", "cpu", "--small", folder=tmp_path)
    found, end = json.JSONDecoder().raw_decode(printed)
    figures = {row["figure"]: row for row in found["figures"]}
    assert all(row["ok"] for row in found["figures"])
    assert {"demo, s", "step: with / without the loss", "loss all, d head: relative to the CPU"} <= figures.keys()
    assert found["skipped"] == ["no synchronisation inside SingLoss.forward", "compiled step", "peak memory"]
    assert all(name in printed[end:] for name in figures)
