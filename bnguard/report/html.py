"""A report as one self-contained HTML page: findings, pictures and tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bnguard import __version__
from bnguard.records import Finding
from bnguard.report.document import Document, Table
from bnguard.words import sentence

if TYPE_CHECKING:
    from bnguard.report.plots import Picture


_FOLDED: Final = 20  # rows; longer tables are collapsed

# The content security policy keeps the browser from loading anything else.
_HEAD: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; margin-bottom: 0.2rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.verdict {{ font-size: 1.15rem; font-weight: 600; padding: 0.6rem 0.8rem; border-left: 6px solid #d55e00;
           background: #fff4ec; }}
.clean {{ border-color: #009e73; background: #eefaf5; }}
.finding {{ border: 1px solid #ccc; border-radius: 6px; padding: 0.6rem 0.9rem; margin: 0.8rem 0; }}
.finding h3 {{ font-size: 1rem; margin: 0; }}
.finding p {{ margin: 0.3rem 0 0; }}
.error h3 {{ color: #a63700; }}
code, pre, td.text {{ font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; background: #f5f5f5; padding: 0.6rem 0.8rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: 0.2rem 0.7rem; border-bottom: 1px solid #e2e2e2; vertical-align: top; }}
th.number, td.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
img {{ width: 100%; height: auto; }}
figure {{ margin: 0 0 1.5rem; }}
footer {{ color: #666; font-size: 0.85rem; margin-top: 2rem; }}
</style>
</head>
<body>
"""


def page(document: Document, pictures: Sequence[Picture]) -> str:
    """The page as text.

    Args:
        document: The report.
        pictures: The pictures to draw and embed.
    """
    parts = [_HEAD.format(title=escape(document.title)), f"<h1>{escape(document.title)}</h1>\n"]
    if document.verdict:
        parts.append(f'<p class="verdict">{escape(document.verdict)}</p>\n<p>{escape(document.summary)}</p>\n')
    else:
        parts.append(f'<p class="verdict clean">{escape(document.summary)}</p>\n')
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
    path.write_text(page(document, pictures), encoding="utf-8")


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
    kinds = ["number" if column.is_number else "text" for column in table.columns]
    head = "".join(
        [f'<th class="{kind}">{escape(column.title)}</th>' for kind, column in zip(kinds, table.columns, strict=True)]
    )
    rows = [
        "<tr>" + "".join([f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True)])
        for row in table.rows
    ]
    text = f"<table>\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>\n"
    if len(rows) > _FOLDED:
        text = f"<details><summary>{len(rows)} rows</summary>\n{text}</details>\n"
    return f"<h2>{escape(table.title[0].upper() + table.title[1:])}</h2>\n{text}"


def _figure(picture: Picture) -> str:
    from bnguard.report.plots import as_svg  # needs an extra

    data = base64.b64encode(as_svg(picture).encode()).decode()
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.description)}"></figure>\n'
