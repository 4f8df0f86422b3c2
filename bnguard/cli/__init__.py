"""The command line: ``bnguard``, which is ``python -m bnguard``. Importing it does not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bnguard.cli import audit, demo, diff, explain, run
from bnguard.cli.exit_codes import USAGE, UsageError
from bnguard.cli.options import checked_outputs, missing_packages
from bnguard.cli.version import ShowVersion

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments. None takes those of the process, which ends with the command: ``run`` then waits for the
            threads of its script.

    Returns:
        The exit code: 0 for clean, 1 for findings, 2 for something that is missing or cannot be written. ``run``
        returns the exit code of its script unless that is 0. Wrong arguments end the process with 2, as argparse does.
    """
    parser = _parser()
    options = parser.parse_args(argv, argparse.Namespace(ends_process=argv is None))
    missing = missing_packages(options)
    if missing is not None:
        print(missing, file=sys.stderr)
        return USAGE
    outputs = checked_outputs(parser, options)
    try:
        code: int = options.execute(options, outputs)
        return code
    except UsageError as error:
        parser.exit(USAGE, f"bnguard {options.command}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnguard", description="Protects the running statistics of PyTorch's BatchNorm and of similar layers."
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the versions of bnguard and torch")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (run, audit, diff, explain, demo):
        command.add_parser(commands)
    return parser
