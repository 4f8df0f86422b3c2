"""``bnguard --print-completion SHELL``: completion of commands, options, files and codes, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, Final

from bnguard.findings.codes import CODES

SHELLS: Final = ("bash", "zsh", "fish")
_FILES: Final = ("before", "after", "args")  # positional arguments that name files


class PrintCompletion(argparse.Action):
    """Prints the completion for a shell, and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: object) -> None:
        """Does so."""
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'bnguard[completion]'")
        for action in _actions_of(parser):
            if action.metavar == "FILE" or action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # which shtab looks for
            elif action.dest == "code":
                action.choices = list(CODES)
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def _actions_of(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:
                of_command = action.choices[command.dest]
                of_command.description = command.help  # the short text, which shells show beside the name
                yield from _actions_of(of_command)
