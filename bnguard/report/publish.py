"""Show a report on the terminal, and write the files that were asked for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bnguard.report import terminal
from bnguard.report.document import Document
from bnguard.report.files import Outputs, no_pictures

if TYPE_CHECKING:
    from bnguard.report.plots import Picture

__all__ = ["publish"]


def publish(
    document: Document,
    content: Mapping[str, Any],
    outputs: Outputs,
    command: str,
    pictures: Callable[[], list[Picture]] = no_pictures,
) -> bool:
    """Prints a report, and writes the files.

    Args:
        document: The report.
        content: All of it, for the JSON file.
        outputs: What to write.
        command: Whose report it is.
        pictures: Gives the pictures; asked only where there are some to be drawn.

    Returns:
        Whether all of it could be written; else what could not is told on stderr.
    """
    if outputs.paths:
        more = "\n".join([f"Written: {path}" for path in outputs.paths])
    else:
        more = "More: --html FILE has all of it, --json FILE for programs."
    shown = dataclasses.replace(document, more=more if document.tables or outputs.paths else "")
    terminal.show(shown, apart=command == "run")  # from what the script has printed
    problems = outputs.write(document, content, pictures)
    for problem in problems:
        print(f"bnguard {command}: {problem}", file=sys.stderr)
    return not problems
