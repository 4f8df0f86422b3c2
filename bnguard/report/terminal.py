"""Print a report: with rich on a terminal if it is installed, else as plain text."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, Final, Literal

from bnguard.report.document import Document, Table, as_text

_STYLES: Final = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


def show(document: Document, *, apart: bool = False) -> None:
    """Prints a report on stdout, as plain text if stdout is no terminal, ``NO_COLOR`` is set, or rich is missing.

    If a script has closed or replaced ``sys.stdout``, prints on the original one.

    Args:
        document: The report.
        apart: Whether to print an empty line first.
    """

    def write(stream: Any) -> None:
        if _is_plain(stream):
            print("\n" * apart + as_text(document), file=stream, flush=True)
        else:
            print("\n" * apart, end="", file=stream)
            _show_with_rich(document, stream)

    _on_stdout(write)


def show_text(text: str, *, apart: bool = False) -> None:
    """Prints a text on the same stream as ``show``, for a program to read."""
    _on_stdout(lambda stream: print("\n" * apart + text, file=stream, flush=True))


def _on_stdout(write: Callable[[Any], None]) -> None:
    for stream in (sys.stdout, sys.__stdout__):
        try:
            write(stream)
        except (AttributeError, ValueError, OSError):  # no stream, a closed one, or no real file
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
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if document.title:
        console.print(document.title, style="dim")
    if document.verdict:
        worst = document.findings[0].severity if document.findings else "error"
        console.print(document.verdict, style=_STYLES[worst])
    console.print(document.summary, style="bold green" if document.is_clean else "")
    for finding in document.findings:
        title, *rest = str(finding).splitlines()
        console.print(Text.assemble("\n", (finding.code, _STYLES[finding.severity]), title.removeprefix(finding.code)))
        for line in rest:
            console.print(Padding(line.strip(), (0, 0, 0, 2)))
    for table in document.tables:
        console.print()
        console.print(_rich_table(table))
        more = table.more()
        if more is not None:
            console.print(f"  {more}", style="dim")
    for note in document.notes:
        console.print(f"\n{note}")
    if document.more:
        console.print(f"\n{document.more}", style="dim")


def _rich_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        side: Literal["right", "left"] = "right" if column.is_number else "left"
        drawn.add_column(column.title, justify=side, no_wrap=column.is_number, overflow="fold")
    for row in table.rows[: table.shown]:
        drawn.add_row(*row)
    return drawn
