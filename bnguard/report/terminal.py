"""Reports on a terminal: with rich where that is wanted and installed, else as plain text."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any, Final

from bnguard.report.document import Document, as_text

__all__ = ["show"]

_STYLES: Final = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


def show(document: Document, *, apart: bool = False) -> None:
    """Prints a report on stdout; plain where that is no terminal, ``NO_COLOR`` is set, or rich is missing.

    Where a script has closed or replaced it, on what the process began with.

    Args:
        document: The report.
        apart: Whether an empty line comes first.
    """
    for stream in (sys.stdout, sys.__stdout__):
        try:
            if _is_plain(stream):
                print("\n" * apart + as_text(document), file=stream, flush=True)
            else:
                print("\n" * apart, end="", file=stream)
                _show_with_rich(document, stream)
        except (AttributeError, ValueError, OSError):  # none, closed, or not quite a file
            continue
        return


def _is_plain(stream: Any) -> bool:
    if stream is None:
        raise ValueError
    is_terminal = getattr(stream, "isatty", bool)()
    if not is_terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return True
    return importlib.util.find_spec("rich") is None


def _show_with_rich(document: Document, stream: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if document.title:
        console.print(document.title, style="dim")
    if document.verdict:
        worst = document.findings[0].severity if document.findings else "error"
        console.print(document.verdict, style=_STYLES[worst])
    console.print(document.summary, style="" if document.verdict else "bold green")
    for finding in document.findings:
        title, *rest = str(finding).splitlines()
        console.print(Text.assemble("\n", (finding.code, _STYLES[finding.severity]), title.removeprefix(finding.code)))
        for line in rest:
            console.print(Padding(line.strip(), (0, 0, 0, 2)))
    for table in document.tables:
        drawn = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in table.columns:
            drawn.add_column(
                column.title,
                justify="right" if column.is_number else "left",
                no_wrap=column.is_number,
                overflow="fold",
            )
        for row in table.rows[: table.shown]:
            drawn.add_row(*row)
        console.print()
        console.print(drawn)
        more = table.more()
        if more is not None:
            console.print(f"  {more}", style="dim")
    for note in document.notes:
        console.print(f"\n{note}")
    if document.more:
        console.print(f"\n{document.more}", style="dim")
