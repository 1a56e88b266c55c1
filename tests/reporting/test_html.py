"""The HTML report: it holds everything itself, says everything literally, and nothing in it can become markup."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tabulate import tabulate

from singreg.reporting.html import Page, Picture, Section, Table, render_html, write_html
from singreg.reporting.page import Facts, Heading, page_from_markdown
from singreg.reporting.plots import save_figure, save_plots
from singreg.reporting.report_files import write_report
from singreg.reporting.tables import OBEYED, escape
from tests.reporting.small_report import finetune_report

NASTY = "<script>alert(1)</script> & \"q\" 'q' </td> | `x` \\ ![a](b) *c* é"
# Browsers and Python's parser read carriage returns and NUL in their own way; a report's texts are on one line.
TEXTS = st.text(st.characters(exclude_characters="\r\x00", exclude_categories=("Cs",)), min_size=1)


class Reader(HTMLParser):
    """Tags with attributes, and the text in each tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.inside: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.inside.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, "tags are not nested"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside[-1]][-1] += data


def names(page: str) -> set[str]:
    return {tag for tag, _ in Reader(page).tags}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    save_figure(figure, tmp_path / "plots" / "p.png")
    return tmp_path / "plots" / "p.png"


@given(TEXTS)
@example(NASTY)
@example("&lt;b&gt;")
def test_any_text_anywhere_is_shown_as_it_is_and_adds_no_tag(text: str) -> None:
    def page(text: str) -> str:
        blocks = [text, Table([text], [[text]], text), Facts([text]), Heading(text)]
        return render_html(Page(text, [text], [text], [Section(text, blocks), Section("b", [])]))

    found, plain = Reader(page(text)), Reader(page("x" * len(text)))
    assert [tag for tag, _ in found.tags if tag not in ("small", "br")] == [tag for tag, _ in plain.tags]
    for tag in ("title", "h1", "h2", "h3", "a", "th", "li", "caption"):
        assert found.texts[tag][0] == text, tag
    assert found.texts["p"] == [text] * 3


def test_it_needs_nothing_from_outside(picture: Path) -> None:
    page = render_html(Page("t", ["s"], [NASTY], [Section("a", [Picture(picture, NASTY)]), Section("b", [Table(["x"], [["1"]])])]))
    found = Reader(page)
    addresses = [value for _, attrs in found.tags for key, value in attrs.items() if key in ("src", "href")]
    assert [value[:22] for value in addresses if value] == ["#s0", "#s1", "data:image/png;base64,"]
    assert base64.b64decode(addresses[-1].split(",")[1]) == picture.read_bytes()
    assert ("img", NASTY) in [(tag, attrs.get("alt")) for tag, attrs in found.tags]
    assert names(page).isdisjoint({"script", "link", "iframe", "object"})
    assert "url(" not in page
    assert "@import" not in page
    policies = [attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme:dark" in page
    assert "width=device-width" in page


def test_an_interval_goes_below_its_figure_and_a_sentence_may_wrap() -> None:
    page = render_html(Page("t", [], [], [Section("a", [Table(["x"], [["1.5 [1, 2]"], ["[1, 2] a [3]"], ["word " * 12]])])]))
    assert "<td>1.5<br><small>[1, 2]</small></td>" in page
    assert "<td>[1, 2] a [3]</td>" in page
    assert '<td class="long">word ' in page


@given(st.lists(st.lists(TEXTS.map(lambda text: " ".join(OBEYED.sub("", text).split())), min_size=2, max_size=2), max_size=3))
def test_a_table_comes_back_from_the_markdown_of_the_reports(rows: list[list[str]]) -> None:
    headers = ["a|b", "\\|c\\| <&amp;>"]
    guarded = [[escape(cell) for cell in row] for row in (headers, *rows)]
    text = tabulate(guarded[1:], headers=guarded[0], tablefmt="pipe", disable_numparse=True)
    table = Table.from_markdown(text)
    assert table.headers == headers
    assert table.rows == rows


def test_a_report_in_markdown_becomes_the_same_page(picture: Path) -> None:
    text = (
        f"# run {escape(NASTY)}\n\n{escape(NASTY)}\n\n**{escape('Warning: a < b')}**\n\n|AS| is first in this *plain* line.\n\n"
        "## One\n\n![a caption](plots/p.png)\n\n| x | y |\n|:--|---|\n| 1 | \\|z\\| |\n\n"
        "### Lesser\n\n- command: `a --b`\n- two\n\n## Two\n"
    )
    page = page_from_markdown(text, picture.parents[1])
    assert page.title == "run " + NASTY
    assert page.sentences == [NASTY, "|AS| is first in this plain line."]
    assert page.warnings == ["Warning: a < b"]
    one, two = page.sections
    assert (one.heading, two.heading, list(two.blocks)) == ("One", "Two", [])
    expected = [Picture(picture.resolve(), "a caption"), Table(["x", "y"], [["1", "|z|"]]), Heading("Lesser")]
    assert list(one.blocks) == [*expected, Facts(["command: a --b", "two"])]


def test_a_finetuning_run_writes_it_beside_report_md_with_the_same_tables(tmp_path: Path) -> None:
    report = finetune_report(class_names=("c|t", "<b>dog</b>", "fi\\sh"), tag=NASTY)
    write_report(report, tmp_path, save_plots(report, tmp_path / "plots"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Reader(page)
    assert [tag for tag, _ in found.tags].count("img") == 4
    assert found.texts["p"][:4] == ["It leaks.", "Less now.", "Kept.", "Warning: only made up."]
    cells = found.texts["td"]
    assert {"c|t", "<b>dog</b>", "fi\\sh", NASTY} <= set(cells)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|") and not line.startswith("|:")]
    assert [tag for tag, _ in found.tags].count("tr") == len(rows)
    assert "b" not in names(page)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no title", "begins with '# title'"),
        ("# t\n\n## s\n\n![x](../outside.png)", r"outside\.png is not in the report's folder"),
        ("# t\n\n## s\n\n| a | b |\n|:--|:--|\n| 1 |", r"row 0 has 1 cells under 2 headers"),
    ],
)
def test_what_is_no_report_of_ours_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        page_from_markdown(text, tmp_path)
    with pytest.raises(ValueError, match="expected a Markdown table"):
        Table.from_markdown("| a |\n| 1 |")


def test_a_failing_write_leaves_the_old_page(tmp_path: Path) -> None:
    target, fake = tmp_path / "report.html", tmp_path / "p.png"
    write_html(target, Page("old", [], [], []))
    fake.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"p\.png is not a PNG"):
        write_html(target, Page("new", [], [], [Section("a", [Picture(fake, "")])]))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write_html(target, Page("new", [], [], [Section("a", [Picture(tmp_path / "none.png", "")])]))
    assert "<h1>old</h1>" in target.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "report.html"]


def test_stray_bytes_of_a_folder_name_do_not_stop_a_report(tmp_path: Path) -> None:
    write_html(tmp_path / "report.html", Page("run \udcff", [], [], []))
    assert "run \\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
