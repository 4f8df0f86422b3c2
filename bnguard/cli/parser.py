"""The parser of the command line: errors of one line that name their command, and the nearest word that exists."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from bnguard.cli.exit_codes import USAGE
from bnguard.words import listing, suggestion


class Parser(argparse.ArgumentParser):
    """The parser of ``bnguard``, or of one of its commands."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with a line that names the command."""
        self.exit(USAGE, f"{self.prog}: {message}\nSee {self.prog} --help.\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Ends the process if there are words that no argument has taken."""
        if not words:
            return
        option = words[0].partition("=")[0]
        if not option.startswith("-"):
            self.error(f"unexpected argument {option!r}")
        valid = [name for action in self._actions for name in action.option_strings]
        nearest = difflib.get_close_matches(option, valid, n=1)
        self.error(f"unknown option {option!r}{f': did you mean {nearest[0]!r}?' if nearest else ''}")


def unknown_command_text(word: str, commands: Sequence[str]) -> str:
    """What to say of a first word that is no command."""
    if os.path.isfile(word):
        return f"expected a command, got the file {word!r}: to run a script, write bnguard run {word}"
    return f"unknown command {word!r}: {suggestion(word, commands)}"


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """The type of an argument with a few valid values, the nearest of which is suggested."""

    def checked(text: str) -> str:
        if text in choices:
            return text
        nearest = difflib.get_close_matches(text, choices, n=1)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        expected = f"{listing([repr(choice) for choice in choices[:-1]])} or {choices[-1]!r}".replace(" and ", ", ")
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}{hint}")

    return checked
