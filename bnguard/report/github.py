"""Workflow commands, which GitHub shows as annotations at the lines.

The format, with its escapes, is that of GitHub's own toolkit (``packages/core/src/command.ts`` in actions/toolkit).
"""

from __future__ import annotations

from typing import Final, Literal

from bnguard.records import Finding, Severity
from bnguard.report.places import place_of
from bnguard.words import sentence

Kind = Literal["error", "warning", "notice"]

_KINDS: Final[dict[Severity, Kind]] = {"error": "error", "warning": "warning", "note": "notice"}


def annotation(kind: Kind, message: str, where: str | None, title: str = "") -> str:
    """One workflow command.

    Args:
        kind: How GitHub shows it.
        message: The text.
        where: The line to show it at, ``"train.py:42 in train_step"``; None shows it without a line.
        title: The heading; empty leaves it to GitHub.
    """
    place = place_of(where)
    properties = {} if place is None else {"file": place.file, "line": str(place.line)}
    if title:
        properties["title"] = title
    listed = ",".join([f"{name}={_escaped(value, of_property=True)}" for name, value in properties.items()])
    return f"::{kind}{' ' if listed else ''}{listed}::{_escaped(message)}"


def finding_annotation(finding: Finding) -> str:
    """The workflow command of a finding: what happened, and what to do."""
    message = f"{finding.what}.\n{sentence(finding.fix)}"
    return annotation(_KINDS[finding.severity], message, finding.where, f"{finding.code} {finding.title}")


def _escaped(text: str, *, of_property: bool = False) -> str:
    for character in "%\r\n" + (":," if of_property else ""):
        text = text.replace(character, f"%{ord(character):02X}")
    return text
