"""A run's files: report.json, report.md, report.html, scores.parquet, each whole or not at all (DESIGN: "A run's folder")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from singreg.analysis.results import Comparison, FinetuneReport, ModelMeasurement, nan_for_null, nulls_for_nan
from singreg.old_seals import read_sealed, write_sealed
from singreg.reporting import tables
from singreg.reporting.html import write_html
from singreg.reporting.page import page_from_markdown
from singreg.reporting.tables import escape
from singreg.utils import atomic_write, write_text

ROWS_A_CHUNK = 65536
FORMAT = 1
CAPTIONS = {
    "summary": "AS⁻, the absolute AS, IS and top-1 of every model, with 95 % intervals",
    "joint": "AS against IS of every test picture, by the auditor, with the 2σ ellipse",
    "distributions": "distribution of AS and IS over the test pictures, by the auditor",
    "classes": "AS⁻ of every class in every model, by the auditor",
}


def write_report(report: FinetuneReport, folder: Path, plots: Mapping[str, Path]) -> None:
    """Write scores.parquet, report.md, report.html and report.json into the path `folder`; `plots` by name lie below it."""
    write_scores(report, folder / "scores.parquet")
    text = markdown(report, {name: path.relative_to(folder) for name, path in plots.items()})
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_sealed(folder / "report.json", to_json(report))


def to_json(report: FinetuneReport) -> dict[str, Any]:
    """Everything but the per-image rows as strictly JSON-able values: what is not defined becomes null (no shapes)."""
    without_rows = {stage: replace(measured, rows={}) for stage, measured in report.measurements.items()}
    value = asdict(replace(report, measurements=without_rows))
    value["measurements"] = {stage: measured.to_json() for stage, measured in report.measurements.items()}
    plain: dict[str, Any] = nulls_for_nan({"format": FORMAT, **value})
    return plain


def read_report(path: str | Path) -> FinetuneReport:
    """A report back from the path of its report.json, or of the run's folder; per-image rows stay in scores.parquet.

    Raises:
        FileNotFoundError: there is no report yet. ValueError: another format.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no report at {file}; a run writes it as its last step")
    value = read_sealed(file)
    if value.pop("format", None) != FORMAT:
        raise ValueError(f"{file} is not a report of format {FORMAT}")
    value["measurements"] = {stage: ModelMeasurement.from_json(m) for stage, m in value["measurements"].items()}
    value["comparisons"] = [Comparison(**nan_for_null(found)) for found in value["comparisons"]]
    return FinetuneReport(**value)


def write_scores(report: FinetuneReport, path: Path) -> None:
    """One row a test image and model to the Parquet path: label, correct, null share, AS, IS (degrees), κ by translator."""
    write_rows(report.measurements, path)


def write_rows(measurements: Mapping[str, ModelMeasurement], path: Path) -> None:
    """Per-image rows of every model (N, columns) to the Parquet path, in chunks; "model" is the name it goes by here."""
    names = list(dict.fromkeys(name for m in measurements.values() for name in m.rows))
    kinds = {
        name: pa.from_numpy_dtype(m.rows[name].dtype) if m.rows[name].dtype.kind not in "UO" else pa.string()
        for m in measurements.values()
        for name in m.rows
    }
    schema = pa.schema([("model", pa.string()), *((name, kinds[name]) for name in names)])
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for stage, measured in measurements.items():
            for start in range(0, measured.images, ROWS_A_CHUNK):
                rows = {name: column[start : start + ROWS_A_CHUNK] for name, column in measured.rows.items()}
                count = min(ROWS_A_CHUNK, measured.images - start)
                columns = [pa.array([stage] * count, pa.string())]
                # A translator that only one model has (the loop's) is null for the others.
                columns += [_column(rows[n], kinds[n]) if n in rows else pa.nulls(count, kinds[n]) for n in names]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Values (N,) for Parquet; bytes in a file's name that are no UTF-8 are written as their escapes."""
    if kind == pa.string():
        return pa.array([str(value).encode("utf-8", "backslashreplace").decode() for value in values], kind)
    return pa.array(values, kind)


def markdown(report: FinetuneReport, plots: Mapping[str, Path]) -> str:
    """report.md: verdict, tables, pictures (relative paths in `plots`), settings, machine."""
    name = report.settings.get("name", "run")
    blocks = [
        f"# {escape(name)}: null-space leakage before and after fine-tuning",
        *[escape(sentence) for sentence in report.verdict],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        "## Results",
        tables.results_table(report),
        "Angles in degrees, mean over the same held-out test images, with 95 % bootstrap intervals. AS⁻: what removing the null "
        "space takes from the true class (leakage; lower is better). IS: how far it moves the picture's meaning (permitted variety; "
        "to be kept). κ: AS as a share of what IS would allow. *frozen*: the translator fitted before training; *loop*: "
        "the one the loss saw last; *auditor*: fitted afterwards on pictures training never used. Believe the auditor.",
        *([_picture(key, path) for key, path in plots.items() if key == "summary"]),
        "## SingLoss against the control" if "control" in report.measurements else "## SingLoss against the model before",
        tables.comparison_table(report),
        "Ratios are of means; intervals are 95 % bootstrap over classes and their test images, paired. Spread over seeds is not in them.",
        "## Pictures",
        *[_picture(key, path) for key, path in plots.items() if key != "summary"],
        "## Classes",
        tables.per_class_table(report),
        "## Steering through the null space",
        tables.steering_table(report),
        "Each translator attacks and judges by itself; logits do not change by construction. Lower AS at the same IS is harder to steer.",
        "## Heads",
        tables.head_table(report),
        "## Translators",
        tables.translator_table(report),
        "## How this was made",
        _facts(report),
    ]
    return "\n\n".join(blocks) + "\n"


def _picture(key: str, path: Path) -> str:
    return f"![{CAPTIONS.get(key, key)}]({path.as_posix()})"


def _facts(report: FinetuneReport) -> str:
    gap = "–" if report.audit_gap is None else f"{report.audit_gap:.2f}"
    return tables.facts(report.settings, report.machine, report.seconds, f"audit gap (auditor AS⁻ / loop AS⁻): {gap}")
