"""How far running statistics have moved."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from bnguard._aside import aside

__all__ = ["largest_mean_shift"]

_VARIANCES: Final = ("var", "variance")


@aside()
def largest_mean_shift(before: dict[str, Tensor], after: dict[str, Tensor], eps: float) -> float | None:
    """Largest shift of a channel's mean, in standard deviations before: ``max |new - old| / sqrt(var_old + eps)``.

    Args:
        before: Statistics of one layer by buffer name, each of shape ``(C,)``.
        after: The same, later.
        eps: Added to the variance, as the layer itself does.

    Returns:
        The shift, without a unit; NaN where a statistic is; None where the layer keeps no mean with a variance.
    """
    shifts = []
    for name in before:
        variance = next((key for part in _VARIANCES if (key := name.replace("mean", part)) in before), None)
        if "mean" not in name or variance is None or name not in after:
            continue
        old, new, var = (tensor.detach().double().cpu() for tensor in (before[name], after[name], before[variance]))
        if old.shape == new.shape == var.shape and old.numel():
            shifts.append(((new - old).abs() / (var + eps).sqrt()).max().item())
    return max(shifts) if shifts else None
