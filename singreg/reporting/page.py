"""A report as plain data: a title, sentences, warnings, sections. Written out by `reporting.html`, or read from a report.md."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Cells as plain text (rows (R, k) under k headers) with an optional caption.

    Raises:
        ValueError: a row of another length than the headers.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        """Check the rows' lengths (no shapes)."""
        for place, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                raise ValueError(f"row {place} has {len(row)} cells under {len(self.headers)} headers: {list(row)}")

    @classmethod
    def from_markdown(cls, text: str, caption: str = "") -> Table:
        r"""From a pipe table as the reports have it; what `tables.escape` guarded becomes plain text again (R rows).

        Raises:
            ValueError: it is not a pipe table with a header and a rule.

        Example:
            >>> Table.from_markdown("| a | \\|b\\| |\n|:--|:--|\n| 1 | x &lt; y |").rows
            [['1', 'x < y']]
        """
        lines = [line for line in text.strip().splitlines() if line.strip()]
        if not _is_table(lines):
            raise ValueError(f"expected a Markdown table with a header and a rule below it, got {text[:80]!r}")
        header, *rows = [_cells(line) for line in (lines[0], *lines[2:])]
        return cls(header, rows, caption)


@dataclass(frozen=True)
class Picture:
    """A PNG file (path) that goes into the page, with its caption; a wide one scrolls on a phone instead of shrinking."""

    path: Path
    caption: str
    wide: bool = True


@dataclass(frozen=True)
class Facts:
    """A list of short plain lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


Block = str | Table | Picture | Facts | Heading


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it in that order: paragraphs (plain text), tables, pictures, lists, lesser headings."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: what it says first in plain sentences, what to beware of, then the sections. Everything is plain text."""

    title: str
    sentences: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]


def page_from_markdown(text: str, folder: Path) -> Page:
    """The page that a report.md of ours describes, pictures by their path in `folder` (no shapes).

    Blocks are parted by blank lines: `# title`, then sentences (bold ones are warnings), then `## section`s of paragraphs,
    pipe tables, `- ` lists, `### heading`s and `![caption](picture.png)`. What `tables.escape` guarded becomes plain text.

    Raises:
        ValueError: no title, or a picture outside `folder`.

    Example:
        >>> page = page_from_markdown("# Run\\n\\nIt leaks.\\n\\n**Beware.**\\n\\n## Results\\n\\n| a |\\n|:--|\\n| 1 |", Path("."))
        >>> page.sentences, page.warnings, page.sections[0].heading
        (['It leaks.'], ['Beware.'], 'Results')
    """
    first, *blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", text.strip())]
    if not first.startswith("# "):
        raise ValueError(f"expected a report that begins with '# title', got {first[:80]!r}")
    starts = [place for place, block in enumerate(blocks) if block.startswith("## ")]
    lead = blocks[: starts[0]] if starts else blocks
    bold = [re.fullmatch(r"\*\*(.+)\*\*", block, flags=re.DOTALL) for block in lead]
    return Page(
        title=_plain(first[2:]),
        sentences=[_plain(block) for block, match in zip(lead, bold, strict=True) if match is None],
        warnings=[_plain(match[1]) for match in bold if match is not None],
        sections=[
            Section(_plain(blocks[start][3:]), list(_blocks(blocks[start + 1 : stop], folder)))
            for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)
        ],
    )


def _blocks(blocks: Sequence[str], folder: Path) -> Iterator[Block]:
    for block in blocks:
        picture = re.fullmatch(r"!\[(.*)\]\((.+)\)", block)
        if picture is not None:
            yield Picture(_inside(folder, picture[2]), _plain(picture[1]))
        elif _is_table(block.splitlines()):
            yield Table.from_markdown(block)
        elif block.startswith("### "):
            yield Heading(_plain(block[4:]))
        elif block.startswith("- "):
            yield Facts([_plain(line[2:]) for line in block.splitlines()])
        else:
            yield _plain(block)


def _is_table(lines: Sequence[str]) -> bool:
    return len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"\|[\s|:]*-[\s|:\-]*", lines[1]) is not None


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the picture {name} is not in the report's folder {folder}")
    return path


def _plain(text: str) -> str:
    """Without the marks of emphasis and code and without escapes, on one line."""
    bare = re.sub(r"(?<![\w*\\])\*(\w[^*]*)\*(?![\w*])", r"\1", text)
    bare = re.sub(r"(?<!\\)`", "", bare)
    return html.unescape(" ".join(re.sub(r"\\([\\|`])", r"\1", bare).split()))


def _cells(line: str) -> list[str]:
    """The cells of one table line, split at pipes that no backslash guards, back to plain text."""
    cells = [""]
    for token in re.findall(r"\\.?|[^\\]", line.strip()):
        if token == "|":
            cells.append("")
        else:
            cells[-1] += token[1:] if token[1:] in ("\\", "|", "`") else token
    return [html.unescape(cell.strip()) for cell in cells[1:-1]]
