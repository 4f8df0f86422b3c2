"""What a watch has recorded as scalars over the steps, for TensorBoard and for whatever else has ``add_scalar()``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from bnguard.records import Drift, DriftSeries, UpdateSeries
from bnguard.words import name_text


class ScalarWriter(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` is."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any:
        """Writes one value."""


@dataclass(slots=True, eq=False, repr=False)
class ScalarLog:
    """What was written to one writer so far, so that nothing is written twice.

    Attributes:
        measured: The last step at which the drift was written.
        counted: The step before which the updates were written.
    """

    measured: int = -1
    counted: int = 0

    def write_drift(self, writer: ScalarWriter, prefix: str, series: DriftSeries) -> None:
        """Writes the divergence of each layer, and the shift of its mean, at each step that is new."""
        for row, step in enumerate(series.steps):
            if step > self.measured:
                values = zip(
                    series.layers, series.divergence[row].tolist(), series.mean_shift[row].tolist(), strict=True
                )
                for layer, divergence, shift in values:
                    _write_layer(writer, prefix, layer, divergence, shift, step)
        self.measured = max([self.measured, *series.steps])

    def write_end(self, writer: ScalarWriter, prefix: str, drift: tuple[Drift, ...], step: int) -> None:
        """Writes the drift at the end, if it is not measured on the way."""
        if step > self.measured:
            for one in drift:
                shift = float(one.mean_shift.max())
                _write_layer(writer, prefix, name_text(one.names[0], one.model), one.largest, shift, step)
            self.measured = step

    def write_updates(self, writer: ScalarWriter, prefix: str, series: UpdateSeries, end: int) -> None:
        """Writes the updates per layer and step of each line in each span that is new and ends by the step ``end``."""
        ends = [*series.steps[1:], series.end][: len(series.steps)]
        for start, stop, rates in zip(series.steps, ends, series.rates.tolist(), strict=True):
            if start >= self.counted and stop <= end:
                for line, rate in zip(series.lines, rates, strict=True):
                    writer.add_scalar(f"{prefix}/updates/{line}", rate, start)
                self.counted = stop


def _write_layer(writer: ScalarWriter, prefix: str, layer: str, divergence: float, shift: float, step: int) -> None:
    for name, value in (("divergence", divergence), ("mean_shift", shift)):
        if not math.isnan(value):  # the layer did not exist yet
            writer.add_scalar(f"{prefix}/{name}/{layer}", value, step)
