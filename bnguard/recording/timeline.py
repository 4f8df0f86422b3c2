"""How the updates of each line are spread over the optimizer steps, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Timeline", "UpdateSeries", "updates_over_steps"]

_MOST_SPANS: Final = 256


class Timeline:
    """The updates of one line, counted in spans of equally many optimizer steps: the longer the run, the wider.

    Attributes:
        counts: Updates in each span, of all layers together.
        width: Optimizer steps in a span; a power of two.
    """

    __slots__ = ("counts", "width")

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.width = 1

    def add(self, step: int) -> None:
        """Takes in one update."""
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
        """The counts in spans of another width, a multiple of its own."""
        size = width // self.width
        return [sum(self.counts[start : start + size]) for start in range(0, len(self.counts), size)]

    def _widen(self) -> None:
        self.width *= 2
        self.counts = [sum(self.counts[start : start + 2]) for start in range(0, len(self.counts), 2)]


@dataclass(frozen=True, slots=True, eq=False)
class UpdateSeries:
    """How many updates came from each line, over the optimizer steps.

    Attributes:
        steps: First optimizer step of each span, ``S`` of them, equally far from each other: at most 256, so that a run
            of any length takes as much memory.
        end: The step after the last one in which something was updated.
        lines: The calling lines, ``L`` of them, in the order in which they first updated something.
        layers: How many layers each of them has updated.
        counts: Shape ``(S, L)``, whole numbers: updates in each span, of all layers together.
        rates: Shape ``(S, L)``: updates per layer and optimizer step. Plain training has 1.
    """

    steps: tuple[int, ...]
    end: int
    lines: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Tensor

    @property
    def rates(self) -> Tensor:
        """Updates per optimizer step, ``(points, layers)``."""
        edges = torch.tensor([*self.steps, self.end], dtype=torch.float64, device="cpu")
        return self.counts / edges.diff()[:, None] / torch.tensor(self.layers, dtype=torch.float64, device="cpu")


def updates_over_steps(lines: Sequence[tuple[str, int, int, Timeline]]) -> UpdateSeries:
    """Puts the timelines of several lines beside each other.

    Args:
        lines: Of each its text, how many layers it has updated, the last step at which it did, and its timeline.
    """
    width = max([timeline.width for *_, timeline in lines], default=1)
    columns = [timeline.in_spans_of(width) for *_, timeline in lines]
    spans = max([len(column) for column in columns], default=0)
    counts = torch.zeros(spans, len(lines), dtype=torch.int64, device="cpu")
    for number, column in enumerate(columns):
        counts[: len(column), number] = torch.tensor(column, device="cpu")
    steps = tuple(range(0, spans * width, width))
    end = max([last + 1 for _, _, last, _ in lines], default=0)
    return UpdateSeries(
        steps, end, tuple([line for line, *_ in lines]), tuple([layers for _, layers, *_ in lines]), counts
    )
