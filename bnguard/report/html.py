"""A report as one self-contained HTML page: findings, pictures and tables."""

from __future__ import annotations

import base64
import platform
import sys
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bnguard import __version__
from bnguard.records import Finding
from bnguard.report.document import Column, Document, Table
from bnguard.words import sentence

if TYPE_CHECKING:
    from bnguard.report.picture import Picture


_FOLDED: Final = 50  # rows; what follows them is folded away

# Within a picture: all of it but what has colours for a scale.
_DARK: Final = """\
<style>@media (prefers-color-scheme: dark) {
  #figure_1 { filter: invert(0.91) hue-rotate(180deg); }
  #figure_1 image { filter: invert(1) hue-rotate(180deg); }
}</style>
"""

# The content security policy keeps the browser from loading anything else.
_HEAD: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --text: #1a1a1a; --page: #fff; --soft: #666; --line: #ddd; --code: #f5f5f5; --bad: #d55e00;
        --bad-page: #fff4ec; --bad-text: #a63700; --good: #009e73; --good-page: #eefaf5; --plain: #5b7083;
        --plain-page: #f0f3f6; }}
@media (prefers-color-scheme: dark) {{
:root {{ --text: #e4e4e4; --page: #171717; --soft: #a0a0a0; --line: #3a3d42; --code: #222529; --bad: #e8864a;
        --bad-page: #33221a; --bad-text: #f5a06a; --good: #3dbd93; --good-page: #16302a; --plain: #8ba3b8;
        --plain-page: #20272e; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 68rem;
       margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.3rem; margin-bottom: 0.2rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.verdict {{ font-size: 1.15rem; font-weight: 600; padding: 0.6rem 0.8rem; border-left: 6px solid var(--bad);
           background: var(--bad-page); }}
.clean {{ border-color: var(--good); background: var(--good-page); }}
.plain {{ border-color: var(--plain); background: var(--plain-page); }}
.about {{ color: var(--soft); font-size: 0.85rem; margin: 0.2rem 0 0.8rem; }}
.about span {{ display: inline-block; margin-right: 1.2rem; }}
.finding {{ border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.9rem; margin: 0.8rem 0; }}
.finding h3 {{ font-size: 1rem; margin: 0; }}
.finding p {{ margin: 0.3rem 0 0; }}
.error h3, .mark {{ color: var(--bad-text); }}
code, pre, td.text {{ font: 13px/1.4 ui-monospace, monospace; }}
pre {{ white-space: pre-wrap; background: var(--code); padding: 0.6rem 0.8rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
th.number, td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
th, td.number {{ white-space: nowrap; }}
td.text {{ min-width: 7rem; }}
abbr {{ cursor: help; text-decoration: underline dotted; text-underline-offset: 3px; }}
tr.marked {{ background: var(--bad-page); }}
img {{ width: 100%; min-width: 44rem; height: auto; }}
figure {{ margin: 0 0 1.5rem; }}
footer {{ color: var(--soft); font-size: 0.85rem; margin-top: 2rem; }}
</style>
</head>
<body>
"""


def page(document: Document, pictures: Sequence[Picture], about: str = "") -> str:
    """The page as text.

    Args:
        document: The report.
        pictures: The pictures to draw and embed.
        about: When and with what the report was made.
    """
    parts = [_HEAD.format(title=escape(document.title)), f"<h1>{escape(document.title)}</h1>\n"]
    facts = [f"{name}: <code>{escape(value)}</code>" for name, value in document.about.items() if value]
    facts += [escape(about)] * bool(about)
    parts += [f'<p class="about">{"".join([f"<span>{fact}</span>" for fact in facts])}</p>\n'] * bool(facts)
    if document.verdict:
        parts.append(f'<p class="verdict">{escape(document.verdict)}</p>\n<p>{escape(document.summary)}</p>\n')
    else:
        tone = "clean" if document.is_clean else "plain"
        parts.append(f'<p class="verdict {tone}">{escape(document.summary)}</p>\n')
    parts += [f"<pre>{escape(note)}</pre>\n" for note in document.notes]
    if document.findings:
        parts.append("<h2>Findings</h2>\n")
        parts += [_finding(finding) for finding in document.findings]
    parts += [_figure(picture) for picture in pictures]
    parts += [_table(table) for table in document.tables]
    parts.append(f"<footer>bnguard {__version__}</footer>\n</body>\n</html>\n")
    return "".join(parts)


def write(path: Path, document: Document, pictures: Sequence[Picture]) -> None:
    """Writes the page into a file."""
    path.write_text(page(document, pictures, _made_now()), encoding="utf-8")


def _made_now() -> str:
    """The date, and the versions that matter to the numbers."""
    torch = sys.modules.get("torch")
    with_torch = f"torch {torch.__version__}, " if torch is not None else ""
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return f"{date}, {with_torch}Python {platform.python_version()} on {platform.system()}"


def _finding(finding: Finding) -> str:
    place = "" if finding.where is None else f" at <code>{escape(finding.where)}</code>"
    layers = escape(", ".join([layer or "(root)" for layer in finding.layers]))
    return (
        f'<section class="finding {finding.severity}">\n'
        f"<h3>{finding.code} {escape(finding.title)}{place}</h3>\n"
        f"<p>{escape(finding.what)}.</p>\n<p>{escape(sentence(finding.fix))}</p>\n"
        f"<details><summary>Layers</summary><code>{layers}</code></details>\n</section>\n"
    )


def _table(table: Table) -> str:
    """A table; rows about layers with findings come first. Rows beyond the first fifty are folded away."""
    columns = table.columns
    rows = [_row(row, columns) for row in table.rows]
    if table.marks:
        columns = (*columns, Column("findings", meaning="The codes of the findings about this layer."))
        order = sorted(range(len(rows)), key=lambda number: not table.marks[number])
        rows = [_row((*table.rows[number], table.marks[number]), columns, table.marks[number]) for number in order]
    text = _rows(columns, rows[:_FOLDED], table.title)
    if len(rows) > _FOLDED:
        rest = _rows(columns, rows[_FOLDED:], f"{table.title}, continued")
        text += f"<details><summary>{len(rows) - _FOLDED} more of {len(rows)} rows</summary>\n{rest}</details>\n"
    return f"<h2>{escape(table.title[0].upper() + table.title[1:])}</h2>\n{text}"


def _rows(columns: Sequence[Column], rows: Sequence[str], label: str) -> str:
    head = "".join([f'<th class="{_kind(column)}">{_heading(column)}</th>' for column in columns])
    region = f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'  # for the keyboard
    return f"{region}<table>\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table></div>\n"


def _row(cells: Sequence[str], columns: Sequence[Column], mark: str = "") -> str:
    listed = [f'<td class="{_kind(column)}">{escape(cell)}</td>' for column, cell in zip(columns, cells, strict=True)]
    start = '<tr class="marked">' if mark else "<tr>"
    return f"{start}{''.join(listed)}</tr>"


def _kind(column: Column) -> str:
    return "number" if column.is_number else "text"


def _heading(column: Column) -> str:
    if not column.meaning:
        return escape(column.title)
    return f'<abbr title="{escape(column.meaning)}" tabindex="0">{escape(column.title)}</abbr>'


def _figure(picture: Picture) -> str:
    from bnguard.report.plots import as_svg  # needs an extra

    svg = as_svg(picture).replace("<defs>", f"{_DARK}<defs>", 1)
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.description)}">'
    return f'<figure class="scroll">{image}</figure>\n'
