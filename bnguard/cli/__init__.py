"""The command line: ``bnguard``, which is ``python -m bnguard``. Importing it does not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from bnguard.cli.completion import SHELLS, PrintCompletion
from bnguard.cli.exit_codes import USAGE, UsageError
from bnguard.cli.options import Commands, checked_outputs, missing_packages
from bnguard.cli.parser import Parser, one_of, unknown_command_text
from bnguard.cli.version import ShowVersion

__all__ = ["main"]

_COMMANDS: Final = ("run", "audit", "diff", "explain", "demo")  # each is a module beside this one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments. None takes those of the process, which ends with the command: ``run`` then waits for the
            threads of its script.

    Returns:
        The exit code: 0 for clean, 1 for findings, 2 for something that is missing or cannot be written. ``run``
        returns the exit code of its script unless that is 0. Wrong arguments end the process with 2, as argparse does;
        without any, it prints the help and returns 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    # Only the command that is named, if one is: to load the others takes as long.
    parser, commands = _parser(words[:1] if words and words[0] in _COMMANDS else _COMMANDS)
    if not words:
        parser.print_help()
        return USAGE
    if not words[0].startswith("-") and words[0] not in commands.choices:
        parser.error(unknown_command_text(words[0], list(commands.choices)))
    options, unknown = parser.parse_known_args(words, argparse.Namespace(ends_process=argv is None))
    if options.command is None:
        parser.refuse_unknown(unknown)
    command = commands.choices[options.command]
    command.refuse_unknown(unknown)
    missing = missing_packages(options)
    if missing is not None:
        print(f"{command.prog}: {missing}", file=sys.stderr)
        return USAGE
    outputs = checked_outputs(command, options)
    try:
        code: int = options.execute(options, outputs)
        return code
    except UsageError as error:
        command.exit(USAGE, f"{command.prog}: {error}\n")


def _parser(names: Sequence[str]) -> tuple[Parser, Commands]:
    parser = Parser(
        prog="bnguard",
        description="Protects the running statistics of PyTorch's BatchNorm and of similar layers.",
        epilog="bnguard COMMAND --help says what a command does. Start with: bnguard run train.py",
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the versions of bnguard and torch")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        type=one_of(SHELLS),
        choices=SHELLS,
        help="print completion, which needs the extra 'completion'; in ~/.bashrc: "
        'eval "$(bnguard --print-completion bash)"; in fish: bnguard --print-completion fish | source; in zsh: a file '
        "_bnguard in a folder of $fpath",
    )
    commands: Commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in names:
        import_module(f"bnguard.cli.{name}").add_parser(commands)
    return parser, commands
