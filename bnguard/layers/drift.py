"""How far running statistics have moved between two points in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from bnguard.guard.messages import layer_text
from bnguard.torch_internals.tracing import aside

__all__ = [
    "Drift",
    "DriftSample",
    "DriftSeries",
    "drift_between",
    "eps_of",
    "largest_mean_shift",
    "sample_of",
    "series_of",
]

_VARIANCES: Final = ("var", "variance")


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """How far the running mean and variance of one layer have moved.

    Every channel is taken for a normal distribution with the layer's mean and variance, ``eps`` added to the variance
    as the layer itself does.

    Attributes:
        names: Key prefixes in ``model.state_dict()``, e.g. ``("stem.bn",)``; ``("",)`` is the model itself.
        type: The class name, e.g. ``"BatchNorm2d"``.
        mean_shift: Shape ``(C,)``: ``|mean_new - mean_old| / std_old``, in standard deviations at the earlier point.
        variance_ratio: Shape ``(C,)``: ``var_new / var_old``, without a unit.
        divergence: Shape ``(C,)``, in nats: the Kullback-Leibler divergence of the later distribution from the earlier,
            ``(log(var_old / var_new) + (var_new + (mean_new - mean_old)**2) / var_old - 1) / 2``. That is the closed
            form for two normal distributions (Kullback and Leibler 1951).
        worst: The channel with the largest divergence; NaN counts as the largest.
        means: Running means at the earlier and the later point, each of shape ``(C,)``.
        variances: Running variances at both, with ``eps`` added, each of shape ``(C,)``.
        model: Class of the model, where several were watched: ``"Generator"``, or ``"Generator 2"`` for the second one.
    """

    names: tuple[str, ...]
    type: str
    mean_shift: Tensor
    variance_ratio: Tensor
    divergence: Tensor
    worst: int
    means: tuple[Tensor, Tensor]
    variances: tuple[Tensor, Tensor]
    model: str = ""

    @property
    def has_moved(self) -> bool:
        """Whether any channel has."""
        return bool((self.divergence != 0).any())

    @property
    def largest(self) -> float:
        """The divergence of the worst channel, to sort by; infinite where that is NaN."""
        value = float(self.divergence[self.worst])
        return math.inf if math.isnan(value) else value

    def __str__(self) -> str:
        shift, ratio, nats = (values[self.worst] for values in (self.mean_shift, self.variance_ratio, self.divergence))
        what = f"moved by {shift:.3g} standard deviations, variance x {ratio:.3g}, {nats:.3g} nats"
        return f"{layer_text(self.names, self.type, self.model)}: channel {self.worst} {what}"


def eps_of(module: nn.Module, default: float = 0.0) -> float:
    """What a layer adds to its variance; ``default`` where it does not say."""
    eps = getattr(module, "eps", None)
    return eps if isinstance(eps, float) else default


@aside()
def drift_between(
    names: tuple[str, ...],
    type_name: str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    eps: float,
    model: str = "",
) -> Drift | None:
    """The drift of one layer.

    Args:
        names: Of the layer, as in ``Drift``.
        type_name: Of the layer.
        before: Its statistics by buffer name, each of shape ``(C,)``.
        after: The same, later.
        eps: Added to the variances.
        model: As in ``Drift``.

    Returns:
        The drift, on the CPU in float64; None where the layer keeps no mean with a variance, or their shapes changed.
    """
    pairs = _pairs(before, after)
    if not pairs:
        return None
    old_mean, new_mean = (torch.cat([pair[part] for pair in pairs]) for part in (0, 1))
    old_var, new_var = (torch.cat([pair[part] for pair in pairs]) + eps for part in (2, 3))
    shift, ratio, divergence = measures(old_mean, new_mean, old_var, new_var)
    worst = int(divergence.nan_to_num(nan=torch.inf).argmax())
    return Drift(names, type_name, shift, ratio, divergence, worst, (old_mean, new_mean), (old_var, new_var), model)


def measures(old_mean: Tensor, new_mean: Tensor, old_var: Tensor, new_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift of the mean, ratio of the variances and divergence, by channel; see ``Drift``. Reads nothing."""
    shift = (new_mean - old_mean).abs() / old_var.sqrt()
    ratio = new_var / old_var
    return shift, ratio, (ratio + shift.square() - 1 - ratio.log()) / 2


@dataclass(frozen=True, slots=True, eq=False)
class DriftSeries:
    """The drift of each layer at several steps, each measured from the beginning.

    Attributes:
        steps: Optimizer steps at which it was measured, ``S`` of them.
        layers: Names of the layers, ``L`` of them, in the order of ``state_dict()``, model by model; with the class of
            the model before them where several were watched.
        mean_shift: Shape ``(S, L)``: largest shift of a channel's mean, in standard deviations at the beginning; NaN
            where a layer was not yet there, infinite where its statistics are broken.
        divergence: Shape ``(S, L)``: largest divergence of a channel, in nats, see ``Drift``; NaN and infinite alike.
    """

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    mean_shift: Tensor
    divergence: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DriftSample:
    """One step of a series, on the device: nothing has been read.

    Attributes:
        step: The optimizer step.
        columns: Which layers, by their position.
        values: Mean shift and divergence, for each device a tensor of shape ``(2, layers there)``, side by side.
    """

    step: int
    columns: tuple[int, ...]
    values: list[Tensor]


@aside()
def sample_of(
    step: int, layers: Sequence[tuple[int, Mapping[str, Tensor], Mapping[str, Tensor], float]]
) -> DriftSample:
    """Measures several layers at once, one group for each device.

    Args:
        step: The optimizer step.
        layers: Of each its position, its statistics at the beginning and now, and its ``eps``.
    """
    groups: dict[torch.device, list[tuple[int, list[Tensor]]]] = {}
    for position, before, now, eps in layers:
        for mean, variance in _names(before)[:1]:
            if mean not in now or variance not in now or now[mean].shape != before[mean].shape:
                continue
            device = now[mean].device
            dtype = torch.float32 if device.type == "mps" else torch.float64  # which that has not
            four = (before[mean], now[mean], before[variance], now[variance])
            columns = [tensor.detach().to(device, dtype).reshape(-1) for tensor in four]
            columns[2:] = [column + eps for column in columns[2:]]
            groups.setdefault(device, []).append((position, columns))
    values = []
    for group in groups.values():
        old_mean, new_mean, old_var, new_var = (torch.cat([columns[part] for _, columns in group]) for part in range(4))
        sizes = [columns[0].numel() for _, columns in group]
        shift, _, divergence = measures(old_mean, new_mean, old_var, new_var)
        largest = [torch.stack([part.max() for part in some.split(sizes)]) for some in (shift, divergence)]
        values.append(torch.stack(largest))
    return DriftSample(step, tuple([position for group in groups.values() for position, _ in group]), values)


@aside()
def series_of(samples: Sequence[DriftSample], layers: Sequence[str]) -> DriftSeries:
    """Puts samples together, and reads them."""
    table = torch.full((2, len(samples), len(layers)), torch.nan, dtype=torch.float64, device="cpu")
    for row, sample in enumerate(samples):
        if sample.values:
            values = torch.cat([values.cpu() for values in sample.values], dim=1)
            table[:, row, list(sample.columns)] = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return DriftSeries(tuple([sample.step for sample in samples]), tuple(layers), table[0], table[1])


@aside()
def largest_mean_shift(before: Mapping[str, Tensor], after: Mapping[str, Tensor], eps: float) -> float | None:
    """Largest shift of a channel's mean, in standard deviations before: ``max |new - old| / sqrt(var_old + eps)``.

    Args:
        before: Statistics of one layer by buffer name, each of shape ``(C,)``.
        after: The same, later.
        eps: Added to the variance, as the layer itself does.

    Returns:
        The shift, without a unit; NaN where a statistic is; None where the layer keeps no mean with a variance.
    """
    shifts = []
    for name, variance in _names(before):
        if name not in after:
            continue
        old, new, var = (tensor.detach().double().cpu() for tensor in (before[name], after[name], before[variance]))
        if old.shape == new.shape == var.shape and old.numel():
            shifts.append(((new - old).abs() / (var + eps).sqrt()).max().item())
    return max(shifts) if shifts else None


def _names(statistics: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The buffers that are a mean, each with that of its variance."""
    found = [(name, name.replace("mean", part)) for name in statistics if "mean" in name for part in _VARIANCES]
    return [(mean, variance) for mean, variance in found if variance in statistics]


def _pairs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Means and variances that belong together: mean before and after, variance before and after, in float64."""
    pairs = []
    for mean, variance in _names(before):
        if mean in after and variance in after:
            both = (before[mean], after[mean], before[variance], after[variance])
            four = [tensor.detach().double().cpu().reshape(-1) for tensor in both]
            if len({tensor.shape for tensor in both}) == 1 and both[0].numel():
                pairs.append((four[0], four[1], four[2], four[3]))
    return pairs
