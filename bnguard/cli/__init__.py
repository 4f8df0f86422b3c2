"""The command line: ``bnguard``, which is ``python -m bnguard``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bnguard import __version__

if TYPE_CHECKING:
    from bnguard.report.files import Outputs

__all__ = ["main"]

# Extra: what it brings, by import name.
_EXTRAS: Final = {
    "demo": {"sklearn": "scikit-learn", "rich": "rich"},
    "plot": {"matplotlib": "matplotlib"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; None: those of the process, which ends with the command; ``run`` waits for its threads.

    Returns:
        The exit code: 0 for clean, 1 for findings, 2 for something that is missing or cannot be written; of ``run`` the
        script's own where that is not 0. Wrong arguments end the process with 2, as argparse does.
    """
    parser = _parser()
    own, of_module = _split(list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(own)
    if of_module is not None:
        options.args = of_module
    missing = _missing(*_wanted(options))
    if missing:
        print(missing, file=sys.stderr)
        return 2
    outputs = _outputs(parser, options)
    if options.command == "demo":
        return _demo(options.seed, options.plot, options.json)
    from bnguard.cli import commands as _commands  # imports torch, as the next one
    from bnguard.cli.exit_codes import UsageError

    try:
        if options.command == "audit":
            return _commands.audit_target(options.target, outputs)
        if options.command == "diff":
            return _commands.diff_states(options.before, options.after, options.key, outputs)
        return _run(parser, options, outputs, ends_process=argv is None)
    except UsageError as error:
        parser.exit(2, f"bnguard {options.command}: {error}\n")


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, outputs: Outputs, *, ends_process: bool) -> int:
    from bnguard.cli.run import WatchedRun

    target, *args = [options.module, *options.args] if options.module else options.args or [None]
    if target is None:
        parser.error("run needs a script, or -m and a module")
    has_pictures = outputs.plot is not None or outputs.html is not None
    run = WatchedRun(
        target,
        args,
        is_module=options.module is not None,
        ends_process=ends_process,
        fail_on=options.fail_on,
        frozen=options.frozen,
        on_change=options.on_change,
        every=options.every or ("auto" if has_pictures else None),
        progress=options.progress or (_PROGRESS if sys.stderr.isatty() else None),
        outputs=outputs,
    )
    return run.run()


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The arguments of ``run -m module``, and what comes after it: that is the module's, options too."""
    if argv[:1] != ["run"]:
        return argv, None
    position = 1
    while position < len(argv) and argv[position].startswith("-"):
        if argv[position] == "-m":
            return argv[: position + 2], argv[position + 2 :]
        position += 2 if argv[position].startswith("--") and "=" not in argv[position] else 1
    return argv, None


def _wanted(options: argparse.Namespace) -> list[str]:
    """The extras that a command needs."""
    extras = ["demo"] if options.command == "demo" else []
    draws = options.plot is not None or (options.html is not None and options.command != "audit")
    return [*extras, *["plot"] * draws]


def _outputs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Outputs:
    """Where to write what: refused now, not after hours, and from where the user is, not where the script goes."""
    from bnguard.report.files import Outputs, problem_with

    paths = {name: getattr(options, name) for name in ("json", "plot", "html")}
    for name, path in paths.items():
        problem = None if path is None else problem_with(path)
        if problem is None and name == "plot" and path is not None:
            from bnguard.report.plots import problem_with_format

            problem = problem_with_format(path)
        if problem is not None:
            parser.error(f"argument --{name}: {problem}")
    return Outputs(**{name: None if path is None else path.absolute() for name, path in paths.items()})


def _demo(seed: int, plot: Path | None, json: Path | None) -> int:
    # Here, because they need an extra.
    import torch

    from bnguard.cli import demo
    from bnguard.cli.demo import report as _demo_report

    # The network is small, and on a busy machine threads that wait for each other cost ten times what they save.
    torch.set_num_threads(1)
    result = demo.run(seed=seed)
    _demo_report.show(result)
    if plot is not None:
        from bnguard.cli.demo import plot as _demo_plot

        _demo_plot.draw(result, plot)
        print(f"\nDrift per layer and step: {plot}")
    if json is not None:
        from bnguard.report import json as json_file

        json_file.write(json, {"seed": seed, **_demo_report.as_json(result)})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnguard", description="Protects the running statistics of PyTorch's BatchNorm, and its relatives."
    )
    parser.add_argument("--version", action="version", version=f"bnguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a script unedited, and say who moves running statistics",
        description=(
            "Runs a script as python does, records every update of running statistics, and prints what is wrong, "
            "which lines updated, and what moved most; also after an exception, Ctrl-C or SIGTERM. The exit code is "
            "that of the script."
        ),
    )
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module instead, as python -m does")
    run.add_argument("--frozen", metavar="PATTERN", help="guard the layers that match, in every model that runs")
    run.add_argument(
        "--on-change",
        choices=("raise", "warn", "restore"),
        default="raise",
        help="what becomes of their updates (default: raise)",
    )
    run.add_argument(
        "--fail-on",
        type=_codes,
        default=frozenset(),
        metavar="CODES",
        help="exit with 1 if one of these findings is made: BN001,BN002",
    )
    run.add_argument(
        "--every",
        type=_positive_whole,
        metavar="N",
        help="measure the drift at every N-th optimizer step (default: at 128 to 256 steps where there are pictures)",
    )
    run.add_argument(
        "--progress",
        type=_positive,
        metavar="SECONDS",
        help=f"say so often on stderr how far the run is (default: {_PROGRESS:g} on a terminal, else never)",
    )
    _add_outputs(run, "json", "plot", "html")
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="script [args]", help="the script and its arguments")
    audit = commands.add_parser(
        "audit",
        help="look at a model without running it",
        description="Prints what is wrong with the running statistics of the model that a callable makes.",
    )
    audit.add_argument("target", metavar="module:callable", help="what makes the model, such as models:make_net")
    _add_outputs(audit, "json", "html")
    diff = commands.add_parser(
        "diff",
        help="compare the running statistics of two checkpoints",
        description="Prints which layers moved between two checkpoint files, what is missing, and what is broken.",
    )
    diff.add_argument("before", metavar="BEFORE", help=".pt, .pth, .ckpt or .safetensors; nothing in it is executed")
    diff.add_argument("after", metavar="AFTER", help="the later one")
    diff.add_argument("--key", metavar="KEY", help="where the state dict is in them (default: the usual places)")
    _add_outputs(diff, "json", "plot", "html")
    demo = commands.add_parser(
        "demo",
        help="fine-tune on real data, with and without a guard (under a minute, no download)",
        description=(
            "Trains a small network on scikit-learn's digits, freezes its backbone with requires_grad_(False) and "
            "fine-tunes a new head on shifted images: without a guard and with one. Needs the extra 'demo'."
        ),
    )
    _add_outputs(demo, "json", "plot")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of every run (default: 0)")
    return parser


_OUTPUTS: Final = {
    "json": "write all of it for programs; README.md has the schema",
    "plot": "draw it: .png, .svg, .pdf (extra 'plot')",
    "html": "write one page with tables and pictures, which needs nothing else (extra 'plot')",
}


def _add_outputs(command: argparse.ArgumentParser, *names: str) -> None:
    """The options for files; all three are there as attributes."""
    for name, text in _OUTPUTS.items():
        if name in names:
            command.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
        else:
            command.set_defaults(**{name: None})


def _positive_whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return seed


def _codes(text: str) -> frozenset[str]:
    codes = [code.strip().upper() for code in text.split(",")]
    wrong = [code for code in codes if code not in _CODES]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no finding: they are {_CODES[0]} to {_CODES[-1]}")
    return frozenset(codes)


_PROGRESS: Final = 10.0  # seconds
_CODES: Final = [f"BN{number:03}" for number in range(1, 16)]


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
