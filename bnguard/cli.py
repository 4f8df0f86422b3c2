"""The command line: ``bnguard``, which is ``python -m bnguard``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bnguard import __version__

__all__ = ["main"]

# Extra: what it brings, by import name.
_EXTRAS: Final = {
    "demo": {"sklearn": "scikit-learn", "rich": "rich"},
    "plot": {"matplotlib": "matplotlib"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process where None.

    Returns:
        The exit code: 0, or 1 where an extra is missing. Wrong arguments end the process with 2, as argparse does.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    missing = _missing("demo") if options.plot is None else _missing("demo", "plot")
    if missing:
        print(missing, file=sys.stderr)
        return 1
    return _demo(parser, options.seed, options.plot)


def _demo(parser: argparse.ArgumentParser, seed: int, plot: Path | None) -> int:
    # Here, because they need an extra.
    import torch

    from bnguard import _demo_report, demo

    # The network is small, and on a busy machine threads that wait for each other cost ten times what they save.
    torch.set_num_threads(1)
    if plot is not None:
        from bnguard import _demo_plot

        problem = _demo_plot.problem_with(plot)
        if problem is not None:
            parser.error(f"argument --plot: {problem}")
    result = demo.run(seed=seed)
    _demo_report.show(result)
    if plot is not None:
        _demo_plot.draw(result, plot)
        print(f"\nDrift per layer and step: {plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnguard", description="Protects the running statistics of PyTorch's BatchNorm, and its relatives."
    )
    parser.add_argument("--version", action="version", version=f"bnguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="fine-tune on real data, with and without a guard (under a minute, no download)",
        description=(
            "Trains a small network on scikit-learn's digits, freezes its backbone with requires_grad_(False) and "
            "fine-tunes a new head on shifted images: without a guard and with one. Needs the extra 'demo'."
        ),
    )
    demo.add_argument("--plot", type=Path, metavar="FILE", help="draw the drift per layer and step (extra 'plot')")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of every run (default: 0)")
    return parser


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return seed


def _missing(*extras: str) -> str | None:
    """The sentence about packages that are not installed, or None."""
    absent = {
        extra: [title for name, title in _EXTRAS[extra].items() if importlib.util.find_spec(name) is None]
        for extra in extras
    }
    wanted = [extra for extra in extras if absent[extra]]
    if not wanted:
        return None
    packages = " and ".join(title for extra in wanted for title in absent[extra])
    return f"This command needs {packages}: pip install 'bnguard[{','.join(wanted)}]'"
