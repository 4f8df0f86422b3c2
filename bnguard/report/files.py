"""The files that a command writes: JSON, pictures, a page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bnguard.report import html as page
from bnguard.report import json as json_file
from bnguard.report.document import Document

if TYPE_CHECKING:
    from bnguard.report.plots import Picture

__all__ = ["Outputs", "no_pictures", "problem_with"]


def no_pictures() -> list[Picture]:
    """What there is to draw of something that has no pictures."""
    return []


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where to write what; None writes nothing.

    Attributes:
        json: Everything, for programs.
        plot: The pictures, as one file.
        html: A page with the tables and the pictures.
    """

    json: Path | None = None
    plot: Path | None = None
    html: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Those that are to be written."""
        return [path for field in fields(self) if (path := getattr(self, field.name)) is not None]

    def write(
        self, document: Document, content: Mapping[str, Any], pictures: Callable[[], list[Picture]] = no_pictures
    ) -> list[str]:
        """Writes them, each as far as it can be.

        Args:
            document: For the page.
            content: For the JSON file.
            pictures: Gives the pictures; asked only where there are some to be drawn.

        Returns:
            Why some could not be written.
        """
        drawn: list[Picture] = []

        def save() -> None:
            from bnguard.report.plots import save  # needs an extra

            save(drawn, cast("Path", self.plot))

        writers: list[tuple[Path | None, Callable[[], None]]] = [
            (self.json, lambda: json_file.write(cast("Path", self.json), content)),
            (self.plot, save),
            (self.html, lambda: page.write(cast("Path", self.html), document, drawn)),
        ]
        problems = []
        if self.plot is not None or self.html is not None:
            drawn += pictures()
        for path, write in writers:
            if path is not None:
                try:
                    write()
                except Exception as error:  # what a run has shown must not be lost to one of them
                    problems.append(str(error) if isinstance(error, OSError) else f"{path}: {error}")
        return problems


def problem_with(path: Path) -> str | None:
    """Why nothing can be written to a path, or None."""
    folder = path.absolute().parent
    if path.is_dir():
        return f"{path} is a folder"
    if not folder.is_dir():
        return f"no folder {path.parent}"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"{path} cannot be written"
    return None
