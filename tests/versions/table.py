"""One row for each pair of torch and Python, in a table that is kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.versions.environment import ROOT

TABLE: Final = ROOT / "benchmarks" / "results" / "versions.md"
_HEAD: Final = """# Versions of torch and Python

What `python -m tests.versions` has run: the core tests, without the slow ones.

| torch | build | Python | other packages | passed | failed | skipped | date |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_DATA: Final = re.compile(r"<!-- (\{.*\}) -->")


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        torch: The version of torch.
        build: Which build of it, and how it was installed.
        python: The version of Python.
        packages: Which versions of the other packages: ``"pinned"``, ``"floor"`` or ``"newest"``.
        date: When, as year-month-day.
        passed: How many tests passed.
        failed: The names of those that did not.
        skipped: How many were skipped, by reason.
    """

    torch: str
    build: str
    python: str
    packages: str
    date: str
    passed: int
    failed: list[str]
    skipped: dict[str, int]

    @property
    def torch_numbers(self) -> list[int]:
        """The version of torch as numbers, to compare."""
        return _numbers(self.torch)

    @property
    def key(self) -> tuple[list[int], list[int], str]:
        """By which rows are sorted; of two with the same key the later one stands."""
        return self.torch_numbers, _numbers(self.python)[:2], self.packages

    @property
    def title(self) -> str:
        """What ran."""
        return f"torch {self.torch}, Python {self.python}, {self.packages} packages"

    def __str__(self) -> str:
        return f"{self.title}: {self.passed:,} passed, {len(self.failed)} failed, {sum(self.skipped.values())} skipped"


def read_junit(path: Path) -> tuple[int, list[str], dict[str, int]]:
    """How many tests passed, the names of those that failed, and how many were skipped for which reason."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcomes = {child.tag: child.get("message", "") for child in case}
        if "failure" in outcomes or "error" in outcomes:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        elif "skipped" in outcomes:
            skipped[outcomes["skipped"]] += 1
        else:
            passed += 1
    return passed, failed, dict(skipped.most_common())


def read_table(path: Path = TABLE) -> list[Row]:
    """The rows of a table."""
    if not path.exists():
        return []
    return [Row(**json.loads(found)) for found in _DATA.findall(path.read_text(encoding="utf-8"))]


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Writes a table; the rows themselves are in comments, for the next time."""
    latest = {str(row.key): row for row in rows}
    ordered = sorted(latest.values(), key=lambda row: row.key)
    lines = [
        f"| {row.torch} | {row.build} | {row.python} | {row.packages} | {row.passed:,} | {len(row.failed)} | "
        f"{sum(row.skipped.values())} | {row.date} |\n"
        for row in ordered
    ]
    notes = [note for row in ordered for note in _notes(row)]
    data = [f"<!-- {json.dumps(asdict(row))} -->\n" for row in ordered]
    path.write_text("".join([_HEAD, *lines, "\n", *notes, *data]), encoding="utf-8")


def _notes(row: Row) -> list[str]:
    """What failed and why what was skipped was."""
    failed = [f"- failed: `{name}`\n" for name in row.failed]
    skipped = [f"- skipped, {number}: {reason}\n" for reason, number in row.skipped.items()]
    return [f"**{row.title}**\n\n", *failed, *skipped, "\n"]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]
