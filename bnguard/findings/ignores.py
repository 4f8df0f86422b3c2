"""Findings that are meant: the entries that ignore them. Importing this module imports no torch."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from bnguard.findings.codes import checked_code
from bnguard.records import Finding
from bnguard.report.document import Document
from bnguard.report.places import Place, place_of
from bnguard.words import count_text

_FORMS: Final = "write CODE, CODE:FILE, CODE:FILE:LINE, FILE or FILE:LINE, such as BN003:gan.py:40"


class Ignore(NamedTuple):
    """One entry that ignores findings.

    Attributes:
        text: The entry as it was written.
        source: Where it was written: ``"command line"``, ``"pyproject.toml"``, ``"train.py:42"``.
        code: The code that it ignores; None for every code.
        file: A pattern on the path, relative to the working directory, or on its end; None for findings of every file
            and those without a line.
        lines: The lines; None for all.
    """

    text: str
    source: str
    code: str | None = None
    file: str | None = None
    lines: range | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"

    def matches(self, finding: Finding, place: Place | None, folder: str) -> bool:
        """Whether it ignores a finding.

        Args:
            finding: The finding.
            place: Its line, with the absolute path of the file; None if it has no line.
            folder: The working directory.
        """
        if self.code not in (None, finding.code):
            return False
        if self.file is None:
            return True
        if place is None or (self.lines is not None and place.line not in self.lines):
            return False
        names = (os.path.relpath(place.file, folder), place.file)
        return any([fnmatchcase(name, self.file) for name in names]) or fnmatchcase(place.file, f"*/{self.file}")


class FilteredFindings(NamedTuple):
    """The findings of a run or an audit without those that are meant.

    Attributes:
        kept: Those that no entry ignores.
        ignored: Those that some do, each with the first entry that does.
        unused: Entries that ignore nothing.
        problems: What is wrong with entries that cannot be read.
    """

    kept: tuple[Finding, ...]
    ignored: tuple[tuple[Finding, Ignore], ...]
    unused: tuple[Ignore, ...] = ()
    problems: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """The ignored ones for a JSON file: ``{"ignored": [...]}``, with the fields of ``Finding`` and the entry."""
        return {
            "ignored": [{**dataclasses.asdict(finding), "ignored_by": str(ignore)} for finding, ignore in self.ignored]
        }


def parse_ignore(text: str, source: str) -> Ignore:
    """Reads ``CODE:FILE:LINE``. Each part may be left out; a line needs its file.

    What comes first is a code unless it is empty or contains a dot, a slash or a wildcard.

    Raises:
        ValueError: It has another form, there is no such code, or the line is no positive integer.
    """
    parts = [part.strip() for part in text.split(":")]
    is_file = re.search(r"[./*?]", parts[0]) is not None
    code = None if is_file or not parts[0] else checked_code(parts[0])
    file, *rest = parts if is_file else parts[1:] or [""]
    has_file = is_file or len(parts) > 1
    if len(rest) > 1 or (has_file and not file) or (not has_file and code is None):
        raise ValueError(f"cannot read {text!r}: {_FORMS}")
    if file.isdecimal() and not rest:
        raise ValueError(f"line {file} of {text!r} has no file: {_FORMS}")
    if rest and not (rest[0].isdecimal() and int(rest[0])):
        raise ValueError(f"the line of {text!r} must be a positive integer, got {rest[0]!r}")
    line = int(rest[0]) if rest else 0
    return Ignore(
        text.strip(), source, code, os.path.normpath(file) if file else None, range(line, line + 1) if line else None
    )


def filter_findings(
    findings: Sequence[Finding], ignores: Sequence[Ignore], folder: str, files: Collection[str] = ()
) -> FilteredFindings:
    """Takes out the findings that an entry ignores.

    Args:
        findings: The findings.
        ignores: The entries.
        folder: The working directory, from which relative paths start.
        files: Absolute paths that the findings may be about, for programs that change the working directory.
    """
    matching = {}
    for finding in findings:
        place = _absolute(place_of(finding.where), folder, files)
        matching[finding] = [one for one in ignores if one.matches(finding, place, folder)]
    used = {one for ones in matching.values() for one in ones}
    return FilteredFindings(
        tuple([finding for finding in findings if not matching[finding]]),
        tuple([(finding, ones[0]) for finding, ones in matching.items() if ones]),
        tuple([one for one in ignores if one not in used]),
    )


def _absolute(place: Place | None, folder: str, files: Collection[str]) -> Place | None:
    if place is None:
        return None
    path = os.path.normpath(os.path.join(folder, place.file))
    if path not in files:
        named = [file for file in files if file.endswith(f"{os.sep}{place.file}")]
        path = named[0] if len(named) == 1 else path
    return Place(path, place.line)


def with_ignored(document: Document, filtered: FilteredFindings) -> Document:
    """The report with the number of findings that were ignored, and a note about entries without effect."""
    ignored = len(filtered.ignored)
    counted = f"; {count_text(ignored, 'finding')} ignored" if ignored else ""
    lines = [*filtered.problems, *[f"Unused ignore: {one}" for one in filtered.unused]]
    notes = ["\n".join(lines)] if lines else []
    return document._replace(summary=document.summary + counted, notes=(*document.notes, *notes))
