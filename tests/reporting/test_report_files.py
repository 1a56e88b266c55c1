"""A run's files: back as they went, one Parquet row a picture and model, whole or not at all, and no markup from names."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from singreg.analysis.results import FinetuneReport
from singreg.reporting import report_files
from singreg.reporting.report_files import markdown, read_report, write_report, write_scores
from tests.analysis import toy
from tests.analysis.study.arms import COUNT
from tests.reporting.real_report import HOSTILE, real_report


def write(report: FinetuneReport, folder: Path) -> Path:
    plots = {name: folder / "plots" / f"{name}.png" for name in ("summary", "joint")}
    for path in plots.values():
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3)).save(path)
    write_report(report, folder, plots)
    return folder


def test_report_json_comes_back_equal(tmp_path: Path) -> None:
    report = real_report()
    write(report, tmp_path)
    for path in (tmp_path, tmp_path / "report.json"):
        assert read_report(path) == report
    assert list(read_report(tmp_path).measurements) == ["before", "control", "sing"]
    assert read_report(tmp_path).measurements["sing"].rows == {}


def test_what_is_not_defined_survives_as_nan_in_strict_json(tmp_path: Path) -> None:
    report = real_report()
    holed = replace(report.comparisons[0], value=math.nan, low=0.5, high=math.inf)
    before = replace(report.measurements["before"], null_energy=math.nan)
    report = replace(report, comparisons=[holed], audit_gap=None, measurements={**report.measurements, "before": before})
    write(report, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    back = read_report(tmp_path)
    (found,) = back.comparisons
    assert math.isnan(found.value)
    assert math.isnan(found.high)
    assert found.low == 0.5
    assert back.audit_gap is None
    assert math.isnan(back.measurements["before"].null_energy)


def test_no_report_or_another_format_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no report at {re.escape(str(tmp_path / 'report.json'))}"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"report\.json is not a report of format 1"):
        read_report(tmp_path)


@pytest.mark.parametrize("chunk", [7, 65536])
def test_parquet_has_a_row_for_every_picture_and_model(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_files, "ROWS_A_CHUNK", chunk)
    report = real_report()
    write_scores(report, tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.num_rows == 3 * COUNT
    assert table["model"].to_pylist() == [stage for stage in report.measurements for _ in range(COUNT)]
    for name in report.measurements["sing"].rows:
        got = table[name].to_pylist()
        expected = [
            value for measured in report.measurements.values()
            for value in (measured.rows[name].tolist() if name in measured.rows else [None] * COUNT)
        ]  # fmt: skip
        assert got == expected, name
    assert table["AS/loop"].null_count == 2 * COUNT  # only the regularised arm has a loop
    assert table["AS/auditor"].null_count == 0
    assert pq.ParquetFile(tmp_path / "scores.parquet").metadata.num_row_groups == 3 * math.ceil(COUNT / chunk)


def test_a_file_whose_name_is_not_text_does_not_stop_the_scores(tmp_path: Path) -> None:
    report = real_report()
    rows = {**report.measurements["before"].rows, "image": np.array(["a/\udcff.png"] * COUNT)}
    before = replace(report.measurements["before"], rows=rows)
    write_scores(replace(report, measurements={"before": before}), tmp_path / "scores.parquet")
    assert pq.read_table(tmp_path / "scores.parquet")["image"][0].as_py() == "a/\\udcff.png"


@pytest.mark.parametrize("failing", ["scores.parquet", "report.md", "report.json"])
def test_a_write_that_fails_leaves_the_old_file_whole(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(real_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    genuine = Path.write_text

    def write_text(path: Path, text: str, **options: str) -> int:
        return disk_full() if path.suffix == Path(failing).suffix else genuine(path, text, **options)  # type: ignore[return-value]

    monkeypatch.setattr(*((pq.ParquetWriter, "write_table", disk_full) if "parquet" in failing else (Path, "write_text", write_text)))
    with pytest.raises(OSError, match="No space left"):
        write(real_report(name="second"), tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after.keys() == before.keys()  # no temporary file is left
    assert after[failing] == before[failing]
    assert read_report(tmp_path).settings["name"] == "run"


@pytest.mark.parametrize("control", [True, False])
def test_the_markdown_holds_verdict_tables_pictures_and_how_it_was_made(control: bool, tmp_path: Path) -> None:
    report = real_report(control=control)
    text = (write(report, tmp_path) / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# run: null-space leakage")
    for sentence in report.verdict:
        assert sentence in text
    for sentence in report.warnings:
        assert f"**{sentence}**" in text
    assert ("no control arm was trained" in text) == (not control)
    assert ("## SingLoss against the control" in text) == control
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert links == ["plots/summary.png", "plots/joint.png"]
    assert all((tmp_path / link).is_file() for link in links)
    assert "- command: `recipes/finetune.py --name run`" in text
    assert "audit gap (auditor AS⁻ / loop AS⁻): 1.25" in text
    assert "audit gap (auditor AS⁻ / loop AS⁻): –" in markdown(replace(report, audit_gap=None), {})
    assert "nan" not in text


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)


def test_names_cannot_inject_markup_anywhere(tmp_path: Path) -> None:
    hostile = "x\n\n# Title <img src=http://evil.example/t.png> [a](http://evil.example) |"
    machine = {"<b>cores</b>": "[l](http://evil.example)"}
    report = real_report(HOSTILE, tag=hostile, name=hostile, machine=machine)
    text = (write(report, tmp_path) / "report.md").read_text(encoding="utf-8")
    own = markdown(real_report(), {name: Path(f"plots/{name}.png") for name in ("summary", "joint")})
    outside_code = re.sub(r"(?m)^- command: `[^`\n]*`$", "", text)
    assert "<" not in re.sub(r"(?m)^- command: `[^`\n]*`$", "", own)  # so that any "<" were a user's
    assert "<" not in outside_code
    assert len(re.findall(r"\]\(", outside_code)) == 2  # the two plots
    for lines in (r"^#", r"^\|", r"^- ", r"^$"):
        assert len(re.findall(lines, text, re.MULTILINE)) == len(re.findall(lines, own, re.MULTILINE)), lines
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "plain").mkdir()
    plain = (write(real_report(), tmp_path / "plain") / "report.html").read_text(encoding="utf-8")
    assert Tags(page).names == Tags(plain).names
    assert "evil.example" not in re.sub(r">[^<]*<", "><", page)  # in no attribute
    for name in HOSTILE:
        assert " ".join(name.split()) in [html_text(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]


def html_text(cell: str) -> str:
    parts: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(cell)
    parser.close()
    return "".join(parts)


def test_class_figures_of_the_report_are_by_class_name(tmp_path: Path) -> None:
    text = (write(real_report(), tmp_path) / "report.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} " in text for name in toy.NAMES)
