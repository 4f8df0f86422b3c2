"""How the updates of each line are distributed over the optimizer steps, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

import torch

from bnguard.records import UpdateSeries

_MOST_SPANS: Final = 256


class Timeline:
    """The updates of one line, counted in spans of optimizer steps that become wider as the run becomes longer.

    Attributes:
        counts: Updates in each span, of all layers together.
        width: Optimizer steps in a span; a power of two.
    """

    __slots__ = ("counts", "width")

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.width = 1

    def add(self, step: int) -> None:
        """Adds one update."""
        counts = self.counts
        span = step // self.width
        if span >= len(counts):
            while span >= _MOST_SPANS:
                self._widen()
                span //= 2
            counts = self.counts
            counts += [0] * (span + 1 - len(counts))
        counts[span] += 1

    def in_spans_of(self, width: int) -> list[int]:
        """The counts in spans of ``width`` steps, a multiple of its own width."""
        size = width // self.width
        return [sum(self.counts[start : start + size]) for start in range(0, len(self.counts), size)]

    def _widen(self) -> None:
        self.width *= 2
        self.counts = [sum(self.counts[start : start + 2]) for start in range(0, len(self.counts), 2)]


class Site(Protocol):
    """The updates of one layer from one line in one mode."""

    site: str
    last_step: int


def updates_over_steps(timelines: Mapping[str, Timeline], sites: Iterable[Sequence[Site]]) -> UpdateSeries:
    """Puts the timelines of all lines side by side.

    Args:
        timelines: By line, in the order of the result.
        sites: For each layer, where its updates came from.
    """
    layers: Counter[str] = Counter()
    lines_of: list[set[str]] = []
    end = 0
    for of_layer in sites:
        lines_of.append({site.site for site in of_layer})
        layers.update(lines_of[-1])
        end = max([end, *[site.last_step + 1 for site in of_layer]])
    lines = tuple([line for line in timelines if layers[line]])
    width = max([timelines[line].width for line in lines], default=1)
    columns = [timelines[line].in_spans_of(width) for line in lines]
    spans = max([len(column) for column in columns], default=0)
    counts = torch.zeros(spans, len(lines), dtype=torch.int64, device="cpu")
    for number, column in enumerate(columns):
        counts[: len(column), number] = torch.tensor(column, device="cpu")
    steps = tuple(range(0, spans * width, width))
    by_layer = tuple([tuple([place for place, line in enumerate(lines) if line in own]) for own in lines_of])
    return UpdateSeries(steps, end, lines, tuple([layers[line] for line in lines]), counts, by_layer)
