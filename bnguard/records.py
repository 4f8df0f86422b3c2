"""What a guard has to say about one layer: how it is protected, and what changed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "GuardedLayer",
    "Mode",
    "StatsChange",
    "StatsUpdates",
]


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


@dataclass(frozen=True, slots=True)
class Mode:
    """How a forward ran that updated running statistics.

    Attributes:
        training: The layer was in train mode. An InstanceNorm with ``track_running_stats`` off updates in eval mode.
        grad: Autograd recorded.
        inference: In ``torch.inference_mode()``.
        autocast: In ``torch.autocast`` for the device of the input.
        recompute: Inside a backward pass: activation checkpointing ran the forward again.
        calibration: Inside ``torch.optim.swa_utils.update_bn``.
        compiled: In a compiled graph; how it ran is not known then.
    """

    training: bool = True
    grad: bool = True
    inference: bool = False
    autocast: bool = False
    recompute: bool = False
    calibration: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        if self.compiled:
            return "compiled"
        words = ["train" if self.training else "eval"]
        if not self.grad and not self.inference:
            words.append("no_grad")
        words += [name for name in ("inference", "autocast", "recompute", "calibration") if getattr(self, name)]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class StatsUpdates:
    """All updates of one layer that came from one line in one mode.

    Attributes:
        names: Key prefixes in ``model.state_dict()``, e.g. ``("stem.bn",)``; ``("",)`` is the model itself.
        type: The class name, e.g. ``"BatchNorm2d"``.
        where: The user's line that called the model, ``"train.py:42 in train_epoch"``; None for a compiled graph.
        mode: How those forwards ran.
        count: How many updates there were.
        first_step: Steps that the layer's optimizer had made before the first of them.
        last_step: The same before the last one.
        batch_shape: Shape of the input of the first; None where that is not known.
        fewest_values: Fewest values per channel that one of them had: the numbers a variance is estimated from.
        small_batches: Updates from fewer than eight values per channel.
        model: Class of the model, where several were watched: ``"Generator"``, or ``"Generator 2"`` for the second one.
        ranks: Of a distributed run, the ranks on which it was so; empty where there is one process.
    """

    names: tuple[str, ...]
    type: str
    where: str | None
    mode: Mode
    count: int
    first_step: int = 0
    last_step: int = 0
    batch_shape: tuple[int, ...] | None = None
    fewest_values: int | None = None
    small_batches: int = 0
    model: str = ""
    ranks: tuple[int, ...] = ()
