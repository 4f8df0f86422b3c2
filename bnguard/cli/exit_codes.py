"""The exit codes of the commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bnguard.records import Finding

_CLEAN: Final = 0
_FOUND: Final = 1
USAGE: Final = 2
ALL: Final = "all"  # instead of a code


class UsageError(Exception):
    """An argument names something that does not exist; the text says what."""


def exit_code_of(has_found: bool, is_written: bool) -> int:
    """The exit code of a command that looked for something and wrote files about it."""
    if has_found:
        return _FOUND
    return _CLEAN if is_written else USAGE


def fails(findings: Iterable[Finding], fail_on: frozenset[str]) -> bool:
    """Whether a command fails because of some findings.

    Args:
        findings: The findings.
        fail_on: Their codes; ``"all"`` stands for every code, unless the finding is a note.
    """
    return any([finding.code in fail_on or (ALL in fail_on and finding.severity != "note") for finding in findings])
