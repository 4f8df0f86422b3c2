"""What a guard has to say about one layer: how it is protected, and what changed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GuardedLayer", "StatsChange"]


@dataclass(frozen=True, slots=True)
class GuardedLayer:
    """One layer whose running statistics a guard protects.

    Attributes:
        names: Key prefixes in ``model.state_dict()``, e.g. ``("stem.bn",)``; ``("",)`` is the model itself.
        type: The class name, e.g. ``"BatchNorm2d"``.
        buffers: The guarded buffers, e.g. ``("running_mean", "running_var", "num_batches_tracked")``.
        protection: How it is protected, in words, e.g. ``"held in its forward; compared at exit"``.
    """

    names: tuple[str, ...]
    type: str
    buffers: tuple[str, ...]
    protection: str


@dataclass(frozen=True, slots=True)
class StatsChange:
    """One guarded layer whose running statistics changed inside a block, or were about to.

    Attributes:
        names: Key prefixes in ``model.state_dict()``, e.g. ``("stem.bn",)``; ``("",)`` is the model itself.
        type: The class name, e.g. ``"BatchNorm2d"``.
        buffers: The buffers that differ, or would have, e.g. ``("running_mean", "running_var")``.
        updates: Forwards that updated the layer, or that ``on_change="raise"`` stopped; 0 when the write came from
            elsewhere.
        where: The user's line of the first update, ``"train.py:42 in train_step"``, or None when nobody saw it.
        mean_shift: Largest shift of a channel's mean, in standard deviations at entry
            (``|new - old| / sqrt(running_var + eps)``); None where nothing moved or the layer keeps no mean and
            variance.
        prevented: True if the update was stopped before it happened and nothing moved.
    """

    names: tuple[str, ...]
    type: str
    buffers: tuple[str, ...]
    updates: int
    where: str | None
    mean_shift: float | None
    prevented: bool = False
