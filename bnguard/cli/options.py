"""Options that several commands share, and the types of arguments."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypedDict

from bnguard.cli.exit_codes import ALL
from bnguard.cli.parser import Parser, one_of
from bnguard.findings.codes import checked_code
from bnguard.findings.ignores import Ignore, parse_ignore
from bnguard.report.formats import FORMATS

if TYPE_CHECKING:
    from bnguard.report.files import Outputs


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

COMMAND_LINE: Final = "command line"  # where an option was written
_OUTPUTS: Final = {
    "json": "write everything as JSON; docs/json.md has the schema",
    "plot": "write the figures: .png, .svg, .pdf (extra 'plot')",
    "html": "write one self-contained page with tables and figures (extra 'plot')",
}
# The packages that each extra installs, by import name.
_EXTRAS: Final = {"demo": {"sklearn": "scikit-learn", "rich": "rich"}, "plot": {"matplotlib": "matplotlib"}}


class GuardOptions(TypedDict, total=False):
    """The options of ``frozen`` that the command line has."""

    on_change: Literal["raise", "warn", "restore"]
    affine: bool
    use_running_stats: bool
    updates: int


def add_outputs(command: argparse.ArgumentParser, *names: str) -> None:
    """Adds the options for output files. The result has an attribute for each of the three, None without the option."""
    for name, text in _OUTPUTS.items():
        if name in names:
            command.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
        else:
            command.set_defaults(**{name: None})
    command.set_defaults(has_figures="plot" in names, extras=(), output_format="text", output_file=None)


def add_output_format(command: argparse.ArgumentParser) -> None:
    """Adds the options for the format of the findings, for a command that has some."""
    command.add_argument(
        "--output-format",
        type=one_of(FORMATS),
        choices=FORMATS,
        default="text",
        help="print the whole report as text, or the findings alone: as annotations of GitHub, or as SARIF "
        "(default: text)",
    )
    command.add_argument(
        "--output-file",
        type=Path,
        metavar="FILE",
        help="write what --output-format says to a file, and print the report as text",
    )


def checked_outputs(command: Parser, options: argparse.Namespace) -> Outputs:
    """The output files of a command. Ends the process with a usage error if one cannot be written.

    Paths are absolute: a script may change its working directory.
    """
    from bnguard.report.files import Outputs, problem_with

    paths: dict[str, Any] = {name: getattr(options, name) for name in (*_OUTPUTS, "output_file")}
    for name, path in paths.items():
        problem = None if path is None else problem_with(path)
        if problem is None and name == "plot" and path is not None:
            from bnguard.report.plots import problem_with_format

            problem = problem_with_format(path)
        if problem is not None:
            command.error(f"argument --{name.replace('_', '-')}: {problem}")
    files = {name: None if path is None else path.absolute() for name, path in paths.items()}
    return Outputs(findings=files.pop("output_file"), format=options.output_format, **files)


def missing_packages(options: argparse.Namespace) -> str | None:
    """One sentence that names the packages that a command needs and that are not installed, or None."""
    draws = options.plot is not None or (options.html is not None and options.has_figures)
    absent = {
        extra: [title for name, title in _EXTRAS[extra].items() if importlib.util.find_spec(name) is None]
        for extra in [*options.extras, *["plot"] * draws]
    }
    wanted = [extra for extra, titles in absent.items() if titles]
    if not wanted:
        return None
    packages = " and ".join(title for extra in wanted for title in absent[extra])
    return f"needs {packages}: pip install 'bnguard[{','.join(wanted)}]'"


def positive_integer(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return number


def seed(text: str) -> int:
    """A seed of torch and NumPy."""
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {2**32 - 1}, got {text!r}")
    return number


def code(text: str) -> str:
    """The code of a finding."""
    try:
        return checked_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def codes(text: str) -> frozenset[str]:
    """Codes of findings, separated by commas, or ``all``."""
    try:
        return checked_codes(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def checked_codes(named: Iterable[str]) -> frozenset[str]:
    """Codes of findings, in upper case, and ``all``.

    Raises:
        ValueError: There is no such code.
    """
    stripped = [code.strip() for code in named]
    return frozenset([ALL if code.lower() == ALL else checked_code(code) for code in stripped])


def ignores(text: str) -> tuple[Ignore, ...]:
    """Entries that ignore findings, separated by commas."""
    try:
        return tuple([parse_ignore(entry, COMMAND_LINE) for entry in text.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_ignore(command: argparse.ArgumentParser) -> None:
    """Adds the option that ignores findings. Without the option, the result's attribute is None."""
    command.add_argument(
        "--ignore",
        type=ignores,
        action="append",
        metavar="CODE:FILE:LINE",
        help="ignore findings that are meant: BN003, BN003:gan.py, BN003:gan.py:40 or gan.py:40; may be given several "
        "times. In a file, '# bnguard: ignore[BN003]' on the line does the same (default: ignore in [tool.bnguard] of "
        "pyproject.toml)",
    )


def chosen_ignores(options: argparse.Namespace) -> tuple[Ignore, ...] | None:
    """All entries of the option; None without it."""
    return None if options.ignore is None else tuple(chain.from_iterable(options.ignore))
