"""A report before it has a form: a verdict, findings, tables; and the form of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnguard.findings.grouping import Finding

__all__ = ["Column", "Document", "Table", "as_text"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: What it says, with the unit.
        is_number: Whether its cells are numbers, and go to the right.
    """

    title: str
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: What it is about.
        columns: Its columns.
        rows: A cell for each column; what matters most comes first.
        shown: How many rows are shown where there is little space.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    shown: int

    def more(self) -> str | None:
        """What is said of the rows that are not shown; None where all are."""
        return f"and {len(self.rows) - self.shown} more" if len(self.rows) > self.shown else None


@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    Attributes:
        verdict: What is worst, and what to do about it, in one line; empty where nothing is wrong.
        summary: What there was, in one line.
        findings: All that is wrong, the worst first.
        tables: The figures.
        more: Where more can be seen.
        notes: What else there is to say, after the figures; of several lines each.
        title: What was done, such as a command.
    """

    verdict: str
    summary: str
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...]
    more: str = ""
    notes: tuple[str, ...] = ()
    title: str = ""


def as_text(document: Document) -> str:
    """Plain text: lines may be long, as those of ``grep``."""
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
