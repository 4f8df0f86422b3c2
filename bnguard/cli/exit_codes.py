"""What the commands exit with."""

from __future__ import annotations

from typing import Final

__all__ = ["USAGE", "UsageError", "exit_code_of"]

_CLEAN: Final = 0
_FOUND: Final = 1
USAGE: Final = 2


class UsageError(Exception):
    """The user has asked for something that is not there; the text says what."""


def exit_code_of(has_found: bool, is_written: bool) -> int:
    """Of a command that has looked for something, and was to write files about it."""
    if has_found:
        return _FOUND
    return _CLEAN if is_written else USAGE
