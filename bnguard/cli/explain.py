"""The command ``explain``: what a code means, why it hurts, and what to do."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING, Final

from bnguard.cli.options import Commands, add_outputs, code
from bnguard.findings.codes import CODES
from bnguard.report.terminal import show_text

if TYPE_CHECKING:
    from bnguard.report.files import Outputs

_WIDEST: Final = 88  # columns


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "explain",
        help="say what a code means, why it hurts, and what to do",
        description="Says what a code means, why it hurts, what to do, and when it is fine; without a code, lists all.",
    )
    parser.add_argument("code", type=code, nargs="?", metavar="CODE", help="the code of a finding, such as BN003")
    add_outputs(parser)
    parser.set_defaults(execute=_explain)


def _explain(options: argparse.Namespace, outputs: Outputs) -> int:
    if options.code is None:
        show_text("\n".join([f"{code}  {spec.title}" for code, spec in CODES.items()]))
    else:
        show_text(_text_of(options.code, min(_WIDEST, shutil.get_terminal_size().columns)))
    return 0


def _text_of(code: str, width: int) -> str:
    from bnguard.findings.explanations import explanation_of

    explanation = explanation_of(code)
    remedies = [_wrapped(remedy, width, "  - ", "    ") for remedy in explanation.remedies]
    ignoring = [
        f"--ignore {code}",
        f"--ignore {code}:FILE:LINE, if the finding names a line",
        f"# bnguard: ignore[{code}]  as a comment on that line",
    ]
    parts = [
        f"{code} {CODES[code].title}",
        _wrapped(explanation.meaning, width),
        f"Why it hurts:\n{_wrapped(explanation.harm, width, '  ', '  ')}",
        f"An example:\n{textwrap.indent(explanation.example, '  ')}",
        "\n".join(["What to do:", *remedies]),
        f"When it is fine:\n{_wrapped(explanation.fine, width, '  ', '  ')}",
        "\n  ".join(["Then ignore it:", *ignoring]),
    ]
    return "\n\n".join(parts)


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
