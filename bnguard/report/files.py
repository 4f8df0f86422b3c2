"""Print a report on the terminal, and write the files that were asked for: JSON, pictures, an HTML page."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from bnguard.report import json as json_file
from bnguard.report import terminal
from bnguard.report.document import Document
from bnguard.report.formats import Format, formatted

if TYPE_CHECKING:
    from bnguard.report.picture import Picture


def no_pictures() -> list[Picture]:
    """The pictures of a report that has none."""
    return []


class WrittenFile(NamedTuple):
    """A file that was asked for.

    Attributes:
        path: Its path.
        problem: Why it could not be written; empty if it was.
    """

    path: Path
    problem: str = ""


class Outputs(NamedTuple):
    """The files to write; None writes no file.

    Attributes:
        json: Everything, for other programs.
        plot: The pictures in one file.
        html: A page with the tables and the pictures.
        findings: The findings in ``format``.
        format: The format of that file, or of what is printed if there is no such file.
    """

    json: Path | None = None
    plot: Path | None = None
    html: Path | None = None
    findings: Path | None = None
    format: Format = "text"

    @property
    def paths(self) -> list[Path]:
        """The paths of the files to write."""
        return [path for path in (self.json, self.plot, self.html, self.findings) if path is not None]

    def write(
        self, document: Document, content: Mapping[str, Any], pictures: Callable[[], list[Picture]] = no_pictures
    ) -> list[WrittenFile]:
        """Writes all files. One that cannot be written does not keep the others from being written.

        Args:
            document: The content of the page, and of the file with the findings.
            content: The content of the JSON file.
            pictures: Returns the pictures; called only if they are needed.

        Returns:
            The files, in the order of writing, and why one could not be written.
        """
        drawn: list[Picture] = []

        def save() -> None:
            from bnguard.report.plots import save  # needs an extra

            save(drawn, cast("Path", self.plot))

        def save_page() -> None:
            from bnguard.report.html import write

            write(cast("Path", self.html), document, drawn)

        def save_findings() -> None:
            text = formatted(document, self.format)
            cast("Path", self.findings).write_text(f"{text}\n" if text else "", encoding="utf-8")

        if self.plot is not None or self.html is not None:
            drawn += pictures()
        return write_files(
            (self.json, lambda: json_file.write(cast("Path", self.json), content)),
            (self.plot, save),
            (self.html, save_page),
            (self.findings, save_findings),
        )


def write_files(*writers: tuple[Path | None, Callable[[], None]]) -> list[WrittenFile]:
    """Writes files. One that cannot be written does not keep the others from being written.

    Args:
        *writers: The path of each file, and what writes it; a file without a path is left out.
    """
    files = []
    for path, write in writers:
        if path is not None:
            problem = ""
            try:
                write()
            except Exception as error:  # the results of a run must not be lost because one file failed
                problem = str(error) if isinstance(error, OSError) else f"{path}: {error}"
            files.append(WrittenFile(path, problem))
    return files


def problem_with(path: Path) -> str | None:
    """Why a file cannot be written to ``path``; None if it can."""
    folder = path.absolute().parent
    if path.is_dir():
        return f"expected a file, got {str(path)!r}, which is a folder"
    if not folder.is_dir():
        return f"expected a file in an existing folder, got {str(path)!r}: there is no {str(path.parent)!r}"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"expected a file that can be written, got {str(path)!r}: permission denied"
    return None


def publish(
    document: Document,
    content: Mapping[str, Any],
    outputs: Outputs,
    command: str,
    pictures: Callable[[], list[Picture]] = no_pictures,
) -> bool:
    """Prints a report, or its findings in the format that was asked for, and writes the files.

    Args:
        document: The report.
        content: The content of the JSON file.
        outputs: The files to write.
        command: The command that made the report.
        pictures: Returns the pictures; called only if they are needed.

    Returns:
        Whether all files could be written; problems are printed to stderr.
    """
    apart = command == "run"  # from what the script has printed
    is_text = outputs.format == "text" or outputs.findings is not None
    if is_text:
        more = "More: --html FILE has all of it, --json FILE for programs."
        has_more = document.tables and not outputs.paths
        terminal.show(document._replace(more=more if has_more else ""), apart=apart)
    else:
        text = formatted(document, outputs.format)
        if text:
            terminal.show_text(text, apart=apart)
        for note in document.notes:  # which that format does not have
            print(note, file=sys.stderr)
    files = outputs.write(document, content, pictures)
    return tell_files(files, command, has_stdout=is_text)


def tell_files(files: Sequence[WrittenFile], command: str, *, has_stdout: bool = True) -> bool:
    """Prints which files were written, and to stderr which could not be. Returns whether all were.

    Args:
        files: The files.
        command: The command that made them.
        has_stdout: Whether stdout is for people, and no program reads it.
    """
    written = [f"Written: {file.path}" for file in files if not file.problem]
    if has_stdout and written:
        terminal.show_text("\n".join(written), apart=True)
    problems = [file.problem for file in files if file.problem]
    for problem in problems:
        print(f"bnguard {command}: {problem}", file=sys.stderr)
    return not problems
