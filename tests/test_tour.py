"""The tour keeps its figures, and runs to the same end."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "recipes" / "tour.ipynb"


def printed(cells: list[dict]) -> str:
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def test_pictures_are_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    figures = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(figures) == 8
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.slow
def test_it_runs_and_leakage_falls() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    before, *_, after = re.findall(r"AS⁻ ([\d.]+)°", printed(notebook.cells))
    assert float(after) < 0.5 * float(before)
    assert "predictions kept: 100.0%" in printed(notebook.cells)
