"""The public records: what guards, watches, audits and comparisons return. Importing this module imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from bnguard.words import layer_text, ranks_text, sentence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FEW_VALUES",
    "Drift",
    "DriftSeries",
    "Finding",
    "GuardedLayer",
    "Mode",
    "Recalibration",
    "Severity",
    "StatsChange",
    "StatsDiff",
    "StatsUpdates",
    "UpdateSeries",
]

FEW_VALUES: Final = 8  # a batch with fewer values per channel is small
Severity = Literal["error", "warning", "note"]


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
        updates: Forwards that updated the layer, or that ``on_change="raise"`` stopped; 0 if the statistics were
            written by something other than a forward.
        where: The user's line of the first update, ``"train.py:42 in train_step"``: the line that called the model;
            None if no update was seen.
        mean_shift: Largest shift of a channel's mean, in standard deviations at entry
            (``|new - old| / sqrt(running_var + eps)``); None if nothing moved or the layer has no mean and variance.
        prevented: True if the update was stopped before it happened and nothing moved.
        inside: The line in the model that ran the layer, ``"nets.py:35 in forward"``, if that is another one.
        model: Of ``watch``, the name of the model if several were watched; empty otherwise.
    """

    names: tuple[str, ...]
    type: str
    buffers: tuple[str, ...]
    updates: int
    where: str | None
    mean_shift: float | None
    prevented: bool = False
    inside: str | None = None
    model: str = ""

    @property
    def place(self) -> str:
        """Both lines, ``"train.py:42 in train_step (nets.py:35 in forward)"``."""
        return f"{self.where}" if self.inside is None else f"{self.where} ({self.inside})"


@dataclass(frozen=True, slots=True)
class Mode:
    """How a forward ran that updated running statistics.

    Attributes:
        training: The layer was in train mode. An InstanceNorm with ``track_running_stats`` off updates in eval mode.
        grad: Autograd was recording.
        inference: In ``torch.inference_mode()``.
        autocast: In ``torch.autocast`` for the device of the input.
        recompute: Inside a backward pass: activation checkpointing ran the forward again.
        calibration: Inside ``torch.optim.swa_utils.update_bn`` or ``recalibrate``.
        compiled: In a compiled graph; the other fields are unknown then.
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
        last_step: Steps that the layer's optimizer had made before the last of them.
        batch_shape: Shape of the input of the first; None if unknown.
        fewest_values: Fewest values per channel in one of them: the numbers a variance is estimated from.
        small_batches: Updates from fewer than eight values per channel.
        model: Name of the model if several were watched: the user's variable, ``"ema"``, else its class and the line of
            its first call, ``"ResNet at train.py:31"``; empty otherwise.
        ranks: In a distributed run, the ranks that recorded this; empty for a single process.
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


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake in how running statistics are treated.

    Attributes:
        code: ``"BN001"`` to ``"BN019"``.
        title: What the code is about.
        severity: ``"error"``: results are wrong; ``"warning"``: they very likely are not what was meant; ``"note"``:
            worth knowing.
        layers: First names of the layers concerned, in the order of ``state_dict()``.
        where: The user's line, ``"train.py:42 in train_epoch"``; None if the finding has no line.
        what: What happened, in one sentence with the numbers.
        fix: What to do, in one sentence.
        verdict: What happened and what to do about it, in one line.
        ranks: In a distributed run, the ranks concerned; empty for a single process.
    """

    code: str
    title: str
    severity: Severity
    layers: tuple[str, ...]
    where: str | None
    what: str
    fix: str
    verdict: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = "" if self.where is None else f" at {self.where}"
        where = f" on {ranks_text(self.ranks)}" if self.ranks else ""
        return f"{self.code} {self.title}{place}{where}\n  {self.what}.\n  {sentence(self.fix)}"


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """How far the running mean and variance of one layer have moved.

    Every channel is taken as a normal distribution with the layer's mean and variance, ``eps`` added to the variance
    as the layer itself does.

    Attributes:
        names: Key prefixes in ``model.state_dict()``, e.g. ``("stem.bn",)``; ``("",)`` is the model itself.
        type: The class name, e.g. ``"BatchNorm2d"``.
        mean_shift: Shape ``(C,)``: ``|mean_new - mean_old| / std_old``, in standard deviations at the earlier point.
        variance_ratio: Shape ``(C,)``: ``var_new / var_old``, dimensionless.
        divergence: Shape ``(C,)``, in nats: the Kullback-Leibler divergence of the later distribution from the earlier,
            ``(log(var_old / var_new) + (var_new + (mean_new - mean_old)**2) / var_old - 1) / 2``, the closed form for
            two normal distributions (Kullback and Leibler 1951).
        worst: The channel with the largest divergence; NaN counts as the largest.
        means: Running means at the earlier and the later point, each of shape ``(C,)``.
        variances: Running variances at the earlier and the later point, ``eps`` added, each of shape ``(C,)``.
        model: Name of the model if several were watched: the user's variable, ``"ema"``, else its class and the line of
            its first call, ``"ResNet at train.py:31"``; empty otherwise.
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
        """Whether any channel has moved."""
        return bool((self.divergence != 0).any())

    @property
    def largest(self) -> float:
        """The divergence of the worst channel, to sort by; infinite if it is NaN."""
        value = float(self.divergence[self.worst])
        return math.inf if math.isnan(value) else value

    def __str__(self) -> str:
        shift, ratio, nats = (values[self.worst] for values in (self.mean_shift, self.variance_ratio, self.divergence))
        what = f"moved by {shift:.3g} standard deviations, variance x {ratio:.3g}, {nats:.3g} nats"
        return f"{layer_text(self.names, self.type, self.model)}: channel {self.worst} {what}"


@dataclass(frozen=True, slots=True, eq=False)
class DriftSeries:
    """The drift of each layer at several steps, each measured from the beginning.

    Attributes:
        steps: Optimizer steps at which it was measured, ``S`` of them.
        layers: Names of the layers, ``L`` of them, in the order of ``state_dict()``, model by model; preceded by the
            name of the model if several were watched.
        mean_shift: Shape ``(S, L)``: largest shift of a channel's mean, in standard deviations at the beginning; NaN
            where the layer did not exist yet, infinite where its statistics are broken.
        divergence: Shape ``(S, L)``: largest divergence of a channel, in nats, see ``Drift``; NaN and infinity as in
            ``mean_shift``.
    """

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    mean_shift: Tensor
    divergence: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class UpdateSeries:
    """How many updates came from each line, over the optimizer steps.

    Attributes:
        steps: First optimizer step of each span, ``S`` of them, equally spaced: at most 256, so that memory does not
            grow with the run.
        end: The step after the last one in which something was updated.
        lines: The calling lines, ``L`` of them, in the order in which they first updated something.
        layers: How many layers each of them has updated.
        counts: Shape ``(S, L)``, integers: updates in each span, of all layers together.
        by_layer: For each layer, in the order of ``state_dict()``, model by model: the positions in ``lines`` of those
            that have updated it.
    """

    steps: tuple[int, ...]
    end: int
    lines: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Tensor
    by_layer: tuple[tuple[int, ...], ...] = ()

    @property
    def rates(self) -> Tensor:
        """Updates per layer and optimizer step, of shape ``(S, L)``. Plain training has 1."""
        edges = self.counts.new_tensor([*self.steps, self.end]).double()
        return self.counts / edges.diff()[:, None] / self.counts.new_tensor(self.layers).double()


@dataclass(frozen=True, slots=True, eq=False)
class StatsDiff:
    """What moved between two states of a model.

    Attributes:
        moved: Layers with other statistics, in the order of the later state: how far, for those with a mean and a
            variance of one shape.
        changed: Names of all layers with other statistics.
        unchanged: Names of layers with the same bits.
        missing: Names of layers that only the earlier state has, or some of whose statistics only it has.
        added: Names of layers that only the later state has, or some of whose statistics only it has.
        broken_before: Names of layers with NaN, infinity or a negative variance in the earlier state.
        broken_after: Names of layers with NaN, infinity or a negative variance in the later state.
    """

    moved: tuple[Drift, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    broken_before: tuple[str, ...]
    broken_after: tuple[str, ...]
    _text: str = field(default="", repr=False)

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs and nothing is broken."""
        return not (self.changed or self.missing or self.added or self.broken_before or self.broken_after)

    def report(self) -> str:
        """All of it as text, the layers that moved most first."""
        return self._text


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What ``recalibrate`` has done. Names are key prefixes in ``model.state_dict()``; ``""`` is the model itself.

    Attributes:
        layers: Names of the layers that have new statistics, in the order of ``state_dict()``.
        held: Names of selected layers that kept theirs: an open block of ``frozen`` holds them, or they never update.
        unused: Names of selected layers that kept theirs because no batch reached them.
        batches: How many batches there were; under ``reduce=True``, on all ranks together.
    """

    layers: tuple[str, ...]
    held: tuple[str, ...]
    unused: tuple[str, ...]
    batches: int


# As a user imports them: repr(), help() and pickles name them so.
for _class in [one for one in list(globals().values()) if isinstance(one, type) and one.__module__ == __name__]:
    _class.__module__ = "bnguard"
