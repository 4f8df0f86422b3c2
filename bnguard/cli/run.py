"""The command ``run``: run a script unedited, and report who updates running statistics."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, cast

from bnguard.cli.config import load_config
from bnguard.cli.exit_codes import UsageError
from bnguard.cli.options import (
    Commands,
    GuardOptions,
    add_ignore,
    add_output_format,
    add_outputs,
    chosen_ignores,
    codes,
    positive_integer,
    seconds,
)
from bnguard.cli.parser import one_of
from bnguard.findings.file_kinds import EMPTY, SCRIPT, TEXT, kind_of

if TYPE_CHECKING:
    from bnguard.report.files import Outputs


_PROGRESS: Final = 10.0  # seconds
_POLICIES: Final = ("raise", "warn", "restore")
_DESCRIPTION: Final = """\
Runs a script as python does, records every update of running statistics, and
prints the findings, the lines that updated, and the layers that changed most;
also after an exception, Ctrl-C or SIGTERM. The exit code is that of the script."""
_EXAMPLES: Final = """\
examples:
  bnguard run train.py --lr 0.1            record, and change nothing
  bnguard run --html report.html train.py  the same, with a page
  bnguard run --fail-on all -m my.train    exit with 1 if there is a finding

  With --frozen, layers of all models are guarded. To see what a guard would do,
  take the first; then choose one of the others:
  bnguard run --frozen 'backbone*' --on-change warn train.py
      updates happen, and a warning names the first
  bnguard run --frozen 'backbone*' train.py
      the first update stops the script, at its line (--on-change raise)
  bnguard run --frozen 'backbone*' --on-change restore train.py
      normalise with the batch, keep the statistics
  bnguard run --frozen 'backbone*' --use-running-stats train.py
      normalise with the frozen statistics, as in eval mode"""


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,  # options of the script are not abbreviations of ours
        help="run a script unedited, and report who updates running statistics",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # which leaves the lines of both as they are
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="run a module instead, as python -m does"
    )
    parser.add_argument(
        "--frozen",
        metavar="PATTERN",
        help="guard the layers that match, in every model that runs (default: frozen in [tool.bnguard] of "
        "pyproject.toml)",
    )
    parser.add_argument(
        "--buffers",
        action="append",
        metavar="PATTERN",
        help="record other buffers, too, and guard them with --frozen: a pattern on their names in the state dict, or "
        "all; may be given several times",
    )
    parser.add_argument(
        "--on-change",
        type=one_of(_POLICIES),
        choices=_POLICIES,
        help="with --frozen: what to do about an update of a guarded layer (default: raise); see the examples",
    )
    parser.add_argument("--affine", action="store_true", help="with --frozen: hold weight and bias of the layers, too")
    allowed = parser.add_mutually_exclusive_group()
    allowed.add_argument(
        "--use-running-stats",
        action="store_true",
        help="with --frozen: normalise with the frozen statistics, whatever train() says",
    )
    allowed.add_argument(
        "--updates",
        type=positive_integer,
        default=0,
        metavar="N",
        help="with --frozen: allow each layer N updates in the whole run",
    )
    parser.add_argument(
        "--fail-on",
        type=codes,
        metavar="CODES",
        help="exit with 1 if there is one of these findings: BN001,BN002, or all for every finding but notes (default: "
        "fail-on in [tool.bnguard] of pyproject.toml, else none)",
    )
    add_ignore(parser)
    parser.add_argument(
        "--every",
        type=positive_integer,
        metavar="N",
        help="measure the drift at every N-th optimizer step (default: at 128 to 256 steps if there are figures)",
    )
    parser.add_argument(
        "--progress",
        type=seconds,
        metavar="SECONDS",
        help=f"print progress to stderr every SECONDS seconds (default: {_PROGRESS:g} on a terminal, else never)",
    )
    add_outputs(parser, "json", "plot", "html")
    add_output_format(parser)
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="script [args]", help="the script and its arguments")
    parser.set_defaults(execute=_run)


def _run(options: argparse.Namespace, outputs: Outputs) -> int:
    target, *args = [*(options.module or ()), *options.args] or [None]
    if target is None:
        raise UsageError("expected a script, or -m and a module")
    if not options.module:
        _check_script(target)
    config, given = load_config(), chosen_ignores(options)
    frozen = config.frozen if options.frozen is None else options.frozen
    guard_options = _checked_guard_options(options, frozen)
    with _without_collections():
        from bnguard.cli.watched_run import RunOptions, WatchedRun  # imports torch

    has_figures = outputs.plot is not None or outputs.html is not None
    run = WatchedRun(
        RunOptions(
            target,
            args,
            is_module=bool(options.module),
            ends_process=options.ends_process,
            fail_on=config.fail_on if options.fail_on is None else options.fail_on,
            ignores=config.ignore if given is None else given,
            frozen=frozen,
            frozen_source="" if options.frozen is not None else f" (from {config.path})",
            guard_options=guard_options,
            buffers=tuple(options.buffers or ()),
            every=options.every or ("auto" if has_figures else None),
            progress=options.progress or (_PROGRESS if sys.stderr.isatty() else None),
            outputs=outputs,
        )
    )
    return run.run()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collects no garbage meanwhile: with what torch makes when it is imported, that takes longer than our modules."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_script(path: str) -> None:
    """Refuses what is no script, before torch is imported.

    Raises:
        UsageError: There is no such file, or it is of another kind.
    """
    if not os.path.exists(path):
        hint = (
            f"; a module is run with -m {path}" if path.replace(".", "").isidentifier() and path[-3:] != ".py" else ""
        )
        raise UsageError(f"expected a Python script, got {path!r}: no such file{hint}")
    if os.path.isfile(path) or os.path.isdir(path):  # nothing is read from a pipe
        try:
            kind = kind_of(path)
        except OSError as error:
            raise UsageError(f"expected a Python script, got {path!r}: {error.strerror}") from error
        if kind not in (SCRIPT, TEXT, EMPTY):
            raise UsageError(f"expected a Python script, got {path!r}, which is {kind}")


def _checked_guard_options(options: argparse.Namespace, frozen: str | None) -> GuardOptions:
    """The options of the guard that were given.

    Raises:
        UsageError: There are some, but nothing to guard.
    """
    names = ("on_change", "affine", "use_running_stats", "updates")
    given = {name: value for name in names if (value := getattr(options, name))}
    if given and frozen is None:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{option} needs --frozen PATTERN: without a pattern no layer is guarded")
    return cast("GuardOptions", given)
