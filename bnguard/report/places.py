"""The file and the line in ``train.py:42 in train_step``, which is how records name a line of the user's code."""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class Place(NamedTuple):
    """One line of a file.

    Attributes:
        file: Its path, relative to the working directory if it is inside.
        line: Line number, from 1.
    """

    file: str
    line: int


def place_of(where: str | None) -> Place | None:
    """The place that ``Finding.where`` or ``StatsChange.where`` names; None if it names none."""
    found = re.match(r"(?P<file>.+?):(?P<line>\d+) in ", where or "")
    return None if found is None else Place(found["file"], int(found["line"]))


def path_from(folder: str, path: str) -> str:
    """A path as ``Place.file`` has it: relative to the working directory ``folder`` if it is inside."""
    relative = os.path.relpath(path, folder) if path else path
    return path if relative.startswith(os.pardir) else relative


def library_line(where: str | None) -> str:
    """The line of the installed package that calls the model: ``train.py:12 in main (trainer/loop.py:9 in step)``."""
    found = re.search(r" \((.+:\d+ in \S+)\)$", where or "")
    return "" if found is None else found[1]
