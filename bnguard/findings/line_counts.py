"""Numbers by line of code, in memory that does not grow with the run."""

from __future__ import annotations

from typing import Final

_MOST_LINES: Final = 16


class LineCounts(dict[str, int]):
    """A number for each line, of the first sixteen lines."""

    __slots__ = ()

    def add(self, line: str, number: int = 1) -> None:
        """Adds to the number of a line."""
        if line in self or len(self) < _MOST_LINES:
            self[line] = self.get(line, 0) + number
