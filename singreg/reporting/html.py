"""A report as one HTML file that needs no network: figures inside, light and dark, readable on a phone. Computes nothing."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from singreg.reporting.page import Block, Facts, Heading, Page, Picture, Section, Table, page_from_markdown
from singreg.utils import write_text

__all__ = ["Block", "Facts", "Heading", "Page", "Picture", "Section", "Table", "page_from_markdown", "render_html", "write_html"]

STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--soft:#4b5563;--paper:#fff;--card:#f3f4f6;--line:#d1d5db;--shade:#9ca3af;
--warn:#92400e;--warnpaper:#fef3c7}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--soft:#9ca3af;--paper:#111827;--card:#1f2937;--line:#374151;--shade:#6b7280;
--warn:#fde68a;--warnpaper:#422006}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;color:var(--ink);background:var(--paper);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25}h3{font-size:1rem;margin-bottom:0}
h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
p{max-width:48rem}.lead{background:var(--card);border-radius:.5rem;padding:.25rem 1rem;margin:1rem 0}.lead p{max-width:none}
.warning{background:var(--warnpaper);color:var(--warn);border-left:.3rem solid;padding:.5rem 1rem;margin:.75rem 0;max-width:none}
nav{font-size:.9rem}nav a{display:inline-block;margin-right:1rem}a{color:inherit}
.scroll{overflow-x:auto;margin:1rem 0;background:
linear-gradient(90deg,var(--paper) 1.5rem,transparent 3rem) local,linear-gradient(270deg,var(--paper) 1.5rem,transparent 3rem) right local,
linear-gradient(90deg,var(--shade),transparent .6rem),linear-gradient(270deg,var(--shade),transparent .6rem)}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
td.long{white-space:normal;min-width:18rem}td small{color:var(--soft);font-size:.8rem}
th{background:var(--card)}caption{text-align:left;caption-side:bottom;color:var(--soft);padding-top:.3rem}
figure{margin:1rem 0}figure img{max-width:100%;height:auto;background:#fff;border-radius:.25rem}
figure.wide{overflow-x:auto}figcaption{color:var(--soft);font-size:.9rem;max-width:48rem}
ul{padding-left:1.2rem;font-size:.9rem}
@media(max-width:40rem){figure.wide img{max-width:52rem}figure.wide figcaption{position:sticky;left:0;max-width:calc(100vw - 2rem)}}
"""
LONG = 48  # characters; a longer cell is a sentence
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_html(path: str | Path, page: Page) -> None:
    """Write the page to the path, whole or not at all (no shapes).

    Raises:
        FileNotFoundError, ValueError: a picture's file is missing, or is not a PNG.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_html(target, Page("Run <1>", ["It leaks."], [], [Section("Results", [Table(["a"], [["1"]])])]))
        >>> "<h1>Run &lt;1&gt;</h1>" in target.read_text()
        True
    """
    write_text(path, render_html(page))


def render_html(page: Page) -> str:
    """The page as HTML; every text in it is escaped (no shapes)."""
    titles = [section.heading for section in page.sections]
    links = "".join(f'<a href="#s{place}">{_text(title)}</a>' for place, title in enumerate(titles))
    body = [
        f"<h1>{_text(page.title)}</h1>",
        '<div class="lead">' + "".join(f"<p>{_text(sentence)}</p>" for sentence in page.sentences) + "</div>",
        *[f'<p class="warning">{_text(sentence)}</p>' for sentence in page.warnings],
        *([f"<nav>{links}</nav>"] if len(titles) > 1 else []),
    ]
    for place, section in enumerate(page.sections):
        blocks = "\n".join(_block(block) for block in section.blocks)
        body.append(f'<section id="s{place}"><h2>{_text(section.heading)}</h2>\n{blocks}</section>')
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(page.title)}</title><style>{STYLE}</style></head><body>\n"
    )
    return head + "\n".join(body) + "\n</body></html>\n"


def _text(value: object) -> str:
    """Escaped for a page; what UTF-8 cannot hold (a folder name's stray bytes) is shown as its number."""
    return html.escape(str(value)).encode("utf-8", "backslashreplace").decode("utf-8")


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        wide = ' class="wide" tabindex="0"' if block.wide else ""
        caption = _text(block.caption)
        return f'<figure{wide}><img alt="{caption}" src="{_data_uri(block.path)}"><figcaption>{caption}</figcaption></figure>'
    if isinstance(block, Heading):
        return f"<h3>{_text(block.text)}</h3>"
    if isinstance(block, Facts):
        return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in block.lines) + "</ul>"
    return f"<p>{_text(block)}</p>"


def _table(table: Table) -> str:
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.headers)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: str) -> str:
    """A figure's interval goes below it, so that wide tables stay readable; a sentence may wrap."""
    match = re.fullmatch(r"([^\[\]]+) (\[[^\[\]]+\]\D{0,3})", str(value))
    if match is not None:
        return f"<td>{_text(match[1])}<br><small>{_text(match[2])}</small></td>"
    return f'<td class="long">{_text(value)}</td>' if len(str(value)) > LONG else f"<td>{_text(value)}</td>"


def _data_uri(path: Path) -> str:
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is not a PNG picture, so it cannot go into the report")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
