"""A report independent of its output format, a verdict, findings and tables, and its plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from bnguard.records import Finding


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: Its heading, with the unit.
        is_number: Whether its cells are numbers, aligned to the right.
        meaning: What its cells say, with the unit, for a page that shows it on demand; empty if the heading says it.
    """

    title: str
    is_number: bool = False
    meaning: str = ""


class Table(NamedTuple):
    """A table.

    Attributes:
        title: Its heading.
        columns: Its columns.
        rows: One cell per column; the most important rows come first.
        shown: How many rows are printed where space is limited.
        marks: The codes of the findings about each row, for a page that shows such rows first; empty where no row is
            about a layer.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    shown: int
    marks: tuple[str, ...] = ()

    def more(self) -> str | None:
        """The line about the rows that are left out; None if there are none."""
        return f"and {len(self.rows) - self.shown} more" if len(self.rows) > self.shown else None


class Document(NamedTuple):
    """A report.

    Attributes:
        verdict: The most severe finding and its remedy, in one line; empty if nothing is wrong.
        summary: What was recorded, in one line.
        findings: All findings, the most severe first.
        tables: The numbers.
        more: Where to find more.
        notes: Remarks printed after the tables, of one or more lines each.
        title: What was run, such as a command.
        file: The file that findings without a line belong to; empty if there is none.
        about: How the report came about, such as arguments and exit code, by what it is.
        is_clean: Whether there was something to look at, and nothing is wrong or different.
    """

    verdict: str
    summary: str
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...]
    more: str = ""
    notes: tuple[str, ...] = ()
    title: str = ""
    file: str = ""
    about: Mapping[str, str] = MappingProxyType({})
    is_clean: bool = True


def as_text(document: Document) -> str:
    """The report as plain text. Lines are not wrapped."""
    head = [line for line in (document.title, document.verdict, document.summary) if line]
    parts = ["\n".join(head), *[str(finding) for finding in document.findings]]
    parts += ["\n".join(_lines(table)) for table in document.tables]
    return "\n\n".join([*parts, *document.notes, *filter(None, [document.more])])


def _lines(table: Table) -> list[str]:
    rows = [tuple([column.title for column in table.columns]), *table.rows[: table.shown]]
    widths = [max([len(row[number]) for row in rows]) for number in range(len(table.columns))]
    lines = [f"{table.title}:"]
    lines += [_line(row, widths, table.columns) for row in rows]
    more = table.more()
    return lines if more is None else [*lines, f"  {more}"]


def _line(row: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    cells = [
        f"{cell:>{width}}" if column.is_number else f"{cell:<{width}}"
        for cell, width, column in zip(row, widths, columns, strict=True)
    ]
    return f"  {'  '.join(cells)}".rstrip()
