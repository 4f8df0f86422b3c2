"""Measure how far running statistics have moved between two points in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn

from bnguard.layers.bits import are_alike
from bnguard.torch_internals.tracing import outside_modes

if TYPE_CHECKING:
    from bnguard.records import Drift, DriftSeries

_VARIANCES: Final = ("var", "variance")


def eps_of(module: nn.Module, default: float = 0.0) -> float:
    """The ``eps`` that a layer adds to its variance; ``default`` if it has none."""
    eps = getattr(module, "eps", None)
    return eps if isinstance(eps, float) else default


@outside_modes
def drift_between(
    names: tuple[str, ...],
    type_name: str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    eps: float,
    model: str = "",
) -> Drift | None:
    """Computes the drift of one layer.

    Args:
        names: The layer's names, as in ``Drift``.
        type_name: The layer's class name.
        before: Its statistics by buffer name, each of shape ``(C,)``.
        after: Its later statistics by buffer name, each of shape ``(C,)``.
        eps: Added to the variances.
        model: The name of the model, as in ``Drift``.

    Returns:
        The drift, on the CPU in float64; None if the layer has no mean with a variance, their shapes changed, or
        they are no real numbers.
    """
    from bnguard.records import Drift

    pairs = _pairs(before, after, torch.device("cpu"))
    if not pairs:
        return None
    old_mean, new_mean = (torch.cat([pair[part] for pair in pairs]) for part in (0, 1))
    old_var, new_var = (torch.cat([pair[part] for pair in pairs]) + eps for part in (2, 3))
    shift, ratio, divergence = measures(old_mean, new_mean, old_var, new_var)
    worst = int(divergence.nan_to_num(nan=torch.inf).argmax())
    return Drift(names, type_name, shift, ratio, divergence, worst, (old_mean, new_mean), (old_var, new_var), model)


def measures(old_mean: Tensor, new_mean: Tensor, old_var: Tensor, new_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes mean shift, variance ratio and divergence per channel, see ``Drift``, without a device sync."""
    shift = (new_mean - old_mean).abs() / old_var.sqrt()
    ratio = new_var / old_var
    return shift, ratio, (ratio + shift.square() - 1 - ratio.log()) / 2


class DriftSample(NamedTuple):
    """One measurement of a series, not yet copied to the CPU.

    Attributes:
        step: The optimizer step.
        columns: The positions of the measured layers.
        values: Mean shift and divergence: one tensor of shape ``(2, number of layers)`` per device, in the order of
            ``columns``.
    """

    step: int
    columns: tuple[int, ...]
    values: list[Tensor]


@outside_modes
def sample_of(
    step: int, layers: Sequence[tuple[int, Mapping[str, Tensor], Mapping[str, Tensor], float]]
) -> DriftSample:
    """Measures the drift of several layers in one batch per device, without a device sync.

    Args:
        step: The optimizer step.
        layers: For each layer its position, its statistics at the beginning and now, and its ``eps``.
    """
    groups: dict[torch.device, list[tuple[int, list[Tensor]]]] = {}
    for position, before, now, eps in layers:
        for old_mean, new_mean, old_var, new_var in _pairs(before, now)[:1]:
            columns = [old_mean, new_mean, old_var + eps, new_var + eps]
            groups.setdefault(old_mean.device, []).append((position, columns))
    values = []
    for group in groups.values():
        old_mean, new_mean, old_var, new_var = (torch.cat([columns[part] for _, columns in group]) for part in range(4))
        sizes = [columns[0].numel() for _, columns in group]
        shift, _, divergence = measures(old_mean, new_mean, old_var, new_var)
        largest = [torch.stack([part.max() for part in some.split(sizes)]) for some in (shift, divergence)]
        values.append(torch.stack(largest))
    return DriftSample(step, tuple([position for group in groups.values() for position, _ in group]), values)


class DriftColumns(NamedTuple):
    """What copies of the statistics of several layers are compared with, and how they are arranged.

    Attributes:
        positions: The positions of the layers.
        sizes: How many channels each has.
        dtype: Of the copies: all means, then all variances.
        old_mean: The means at the beginning.
        old_var: The variances at the beginning, with ``eps``.
        eps: For each channel.
    """

    positions: tuple[int, ...]
    sizes: list[int]
    dtype: torch.dtype
    old_mean: Tensor
    old_var: Tensor
    eps: Tensor

    def fit(self, copies: Tensor) -> bool:
        """Whether copies are those of the same layers."""
        old = self.old_mean
        return copies.dtype is self.dtype and copies.device == old.device and copies.numel() == 2 * old.numel()

    @outside_modes
    def samples(self, steps: Sequence[int], copies: Sequence[Tensor]) -> list[DriftSample]:
        """Measures the drift at several steps, each with the same bits as ``sample_of`` does."""
        new_mean, new_var = torch.stack([*copies]).to(self.old_mean.dtype).chunk(2, dim=1)
        shift, _, divergence = measures(self.old_mean, new_mean, self.old_var, new_var + self.eps)
        largest = [torch.stack([part.amax(1) for part in some.split(self.sizes, 1)], 1) for some in (shift, divergence)]
        table = torch.stack(largest, 1)  # of shape (number of steps, 2, number of layers)
        return [DriftSample(step, self.positions, [values.clone()]) for step, values in zip(steps, table, strict=True)]


@outside_modes
def columns_of(
    layers: Sequence[tuple[int, Mapping[str, Tensor], Mapping[str, Tensor], float]],
) -> DriftColumns | None:
    """Arranges those of several layers that can be measured; None without one, or if they are of several kinds.

    Args:
        layers: As in ``sample_of``.
    """
    found, kinds = [], set()
    for position, before, now, eps in layers:
        for old_mean, new_mean, old_var, _ in _pairs(before, now)[:1]:
            found.append((position, old_mean, old_var + eps, torch.full_like(old_mean, eps)))
            kinds.update([(new_mean.device, now[name].dtype) for name in mean_and_variance(before)[0]])
    if len(kinds) != 1:
        return None
    positions, old_means, old_vars, all_eps = zip(*found, strict=True)
    sizes = [mean.numel() for mean in old_means]
    return DriftColumns(positions, sizes, kinds.pop()[1], torch.cat(old_means), torch.cat(old_vars), torch.cat(all_eps))


@outside_modes
def series_of(samples: Sequence[DriftSample], layers: Sequence[str]) -> DriftSeries:
    """Copies the samples to the CPU and arranges them in one table."""
    from bnguard.records import DriftSeries

    table = torch.full((2, len(samples), len(layers)), torch.nan, dtype=torch.float64, device="cpu")
    for row, sample in enumerate(samples):
        if sample.values:
            values = torch.cat([values.cpu() for values in sample.values], dim=1)
            table[:, row, list(sample.columns)] = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return DriftSeries(tuple([sample.step for sample in samples]), tuple(layers), table[0], table[1])


def broken_spans(samples: Sequence[DriftSample], layers: int) -> dict[int, tuple[int, int]]:
    """When the statistics of layers broke that were broken at the last measurement.

    Returns:
        By the position of the layer, the steps of the last measurement of sound statistics, 0 if there is none, and of
        the first one of broken ones.
    """
    series = series_of(samples, [""] * layers)
    spans = {}
    for layer, column in enumerate(series.divergence.isinf().T.tolist()):
        sound = [row for row, is_broken in enumerate(column) if not is_broken]
        first = sound[-1] + 1 if sound else 0
        if first < len(column):
            spans[layer] = series.steps[first - 1] if first else 0, series.steps[first]
    return spans


@outside_modes
def largest_mean_shift(before: Mapping[str, Tensor], after: Mapping[str, Tensor], eps: float) -> float | None:
    """Computes the largest shift of a channel's mean: ``max |new - old| / sqrt(var_old + eps)``.

    Args:
        before: Statistics of one layer by buffer name, each of shape ``(C,)``.
        after: Its later statistics by buffer name, each of shape ``(C,)``.
        eps: Added to the variance, as the layer itself does.

    Returns:
        The shift in standard deviations of ``before``; NaN if a statistic is NaN; None if the layer has no mean with a
        variance, or they are no real numbers.
    """
    shifts = []
    for name, variance in mean_and_variance(before):
        if name in after and are_alike((before[name], after[name], before[variance])):
            old, new, var = (tensor.detach().double().cpu() for tensor in (before[name], after[name], before[variance]))
            shifts.append(((new - old).abs() / (var + eps).sqrt()).max().item())
    return max(shifts) if shifts else None


def mean_and_variance(statistics: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of the buffers that hold a mean, each paired with the name of its variance."""
    found = [(name, name.replace("mean", part)) for name in statistics if "mean" in name for part in _VARIANCES]
    return [(mean, variance) for mean, variance in found if variance in statistics]


def _pairs(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], device: torch.device | None = None
) -> list[list[Tensor]]:
    """For each mean that has a variance: mean before and after, variance before and after, in float64.

    Args:
        before: Statistics of one layer by buffer name.
        after: Its later statistics.
        device: Where to compute; None for where the later statistics are.
    """
    pairs = []
    for names in mean_and_variance(before):
        both = [statistics[name] for name in names for statistics in (before, after) if name in statistics]
        if len(both) == 4 and are_alike(both):
            place = device or both[1].device
            dtype = torch.float32 if place.type == "mps" else torch.float64  # MPS has no float64
            pairs.append([tensor.detach().to(place, dtype).reshape(-1) for tensor in both])
    return pairs
