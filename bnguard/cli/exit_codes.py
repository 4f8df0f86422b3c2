"""The exit codes of the commands."""

from __future__ import annotations

from typing import Final

_CLEAN: Final = 0
_FOUND: Final = 1
USAGE: Final = 2


class UsageError(Exception):
    """An argument names something that does not exist; the text says what."""


def exit_code_of(has_found: bool, is_written: bool) -> int:
    """The exit code of a command that looked for something and wrote files about it."""
    if has_found:
        return _FOUND
    return _CLEAN if is_written else USAGE
