"""Recognise layers with running statistics: which buffers hold them, and when a forward updates them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor, nn
from torch.jit import ScriptModule as _ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnguard.errors import BNGuardError
from bnguard.torch_internals.known_forwards import is_known, only_reads
from bnguard.torch_internals.release import INSTANCE_NORM_ROUNDS

_STATISTIC: Final = re.compile(
    r"(?:running|moving)_(?:\w+_)?(?:mean|var|variance|std|cov|covar|covariance|wm|projection)(?:_\w+)?"
    r"|num_batches_tracked|ra_mean|ra_var"
)
_OBSERVERS: Final = ("torch.ao.quantization.", "torchao.quantization.")
_COUNTER: Final = re.compile(r"(?:\w*_)?(?:n|num|counts?|counter|steps?|total|seen|samples|batches|updates)(?:_\w+)?")
_PAIRED: Final = {
    "_mean": ("_var", "_std"),
    "_var": ("_mean",),
    "_std": ("_mean",),
}  # by themselves they may be constants


def _never(module: Any) -> bool:
    return False


_EVAL: Final = {"training": False}


class LayerKind(NamedTuple):
    """When the layers of one family update their statistics, and how an update can be prevented.

    Attributes:
        predict: Given the layer, returns whether a forward would update it, from its flags alone; None where this takes
            a comparison after the forward.
        hold: How a forward runs without changing the statistics. ``"scratch"``: one call of ``F.batch_norm``, which
            writes to scratch tensors; ``"swap"``: the layer's own forward, with other statistics in ``_buffers``;
            ``"none"``: not possible, because the layer's forward is not run in Python.
        counts: Whether ``num_batches_tracked`` counts the updates.
        reads_in_eval: Given the layer, returns whether its forward in eval mode only reads the statistics.
        rounds_in_eval: Whether its forward in eval mode may change the last bits of the statistics nevertheless.
        keeps_mode: Whether the layer ignores ``eval()``.
        eval_flags: The attributes with which its forward normalises with the running statistics, whatever they are.
        exit_only: Why the layer is protected only by the comparison at the end of a block; empty otherwise.
    """

    predict: Callable[[nn.Module], bool] | None = None
    hold: Literal["scratch", "swap", "none"] = "swap"
    counts: bool = True
    reads_in_eval: Callable[[Any], bool] = _never
    rounds_in_eval: bool = False
    keeps_mode: bool = False
    eval_flags: Mapping[str, bool] = _EVAL
    exit_only: str = ""


class StatsLayer:
    """A module that owns running statistics.

    Attributes:
        module: The layer.
        names: Key prefixes in ``model.state_dict()``; ``""`` is the model itself.
        buffers: Names of its buffers that hold running statistics, in the order of registration.
        kind: The family that it belongs to.
    """

    __slots__ = ("buffers", "kind", "module", "names")

    def __init__(self, module: nn.Module, names: tuple[str, ...], buffers: tuple[str, ...], kind: LayerKind) -> None:
        self.module = module
        self.names = names
        self.buffers = buffers
        self.kind = kind


class _Rule(NamedTuple):
    buffers: tuple[str, ...]
    kind: LayerKind


class LayerRegistration:
    """Handle returned by ``register_layer``, to remove the registration. Removing it twice does nothing."""

    __module__ = "bnguard"  # as a user imports it

    def __init__(self, cls: type[nn.Module], rule: _Rule) -> None:
        self._cls = cls
        self._rule = rule

    def remove(self) -> None:
        """Removes the registration, unless a later one for the same class has replaced it."""
        if registered_rules.get(self._cls) is self._rule:
            del registered_rules[self._cls]


registered_rules: Final[dict[type[nn.Module], _Rule]] = {}  # by register_layer, by class


def register_layer(
    cls: type[nn.Module], buffers: Sequence[str], *, updates: Callable[[Any], bool] | None = None
) -> LayerRegistration:
    """Registers a layer whose running statistics have other names.

    Buffers called ``running_*`` or ``moving_*`` (mean, var, variance, std, covariance, ...) and
    ``num_batches_tracked`` are found without a registration. It applies to subclasses too, to guards entered
    afterwards, and in this process only.

    Args:
        cls: The layer's class.
        buffers: Names of the buffers that hold running statistics; a buffer that a layer does not have, or that is
            None, is skipped. A model in which a parameter or a plain attribute has the name is refused with a
            ``BNGuardError`` when it is guarded or looked at.
        updates: Given the layer, returns whether a forward would update it, from its flags and without reading a tensor
            (``lambda layer: layer.training``). With it, ``on_change="raise"`` needs no comparison after each forward.
            Leave it out if the flags do not determine this.

    Returns:
        A handle whose ``remove()`` removes the registration.

    Raises:
        TypeError: ``cls`` is not a subclass of ``torch.nn.Module``, ``buffers`` is not a sequence of strings, or
            ``updates`` is not callable.
        ValueError: ``buffers`` is empty.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer() takes a subclass of torch.nn.Module, got {cls!r}")
    several = isinstance(buffers, (list, tuple, set, frozenset))
    if not several or not all([isinstance(name, str) for name in buffers]):
        raise TypeError(f"buffers must be a sequence of buffer names, such as ['ema_mean'], got {buffers!r}")
    if not buffers:
        raise ValueError(f"buffers is empty: name at least one buffer of {cls.__name__} that holds running statistics")
    if updates is not None and not callable(updates):
        raise TypeError(f"updates must be callable, as in updates=lambda layer: layer.training, got {updates!r}")
    rule = _Rule(tuple(buffers), LayerKind(updates))
    registered_rules[cls] = rule
    return LayerRegistration(cls, rule)


def statistics_of(module: nn.Module) -> tuple[tuple[str, ...], LayerKind]:
    """The buffers of a module that hold running statistics, in the order of registration, and the kind of the layer."""
    buffers = module._buffers
    if not buffers:
        return (), OWN_FORWARD
    if registered_rules:
        rule = _registered_rule(module)
        if rule is not None:
            return tuple([name for name in rule.buffers if buffers.get(name) is not None]), rule.kind
    cls = type(module)
    if cls in BATCH_NORMS and cls.forward is _BATCH_NORM_FORWARD and tuple(buffers) == BATCH_NORM_STATISTICS:
        mean, var, count = buffers.values()  # the most common case
        if mean is not None and var is not None and count is not None and is_known(_BATCH_NORM_FORWARD):
            return BATCH_NORM_STATISTICS, BATCH_NORM
    present = tuple([name for name, tensor in buffers.items() if tensor is not None])
    names = _statistics_among(present)
    kind = kind_of(module) if names else OWN_FORWARD
    if names and kind is OWN_FORWARD and not module._modules and len(names) < len(present):
        # What such a layer counts its batches with: held alone, its mean would have another weight afterwards.
        names = tuple([name for name in present if name in names or _is_counter(name, buffers[name])])
    return names, kind


def _registered_rule(module: nn.Module) -> _Rule | None:
    return next((registered_rules[base] for base in type(module).__mro__ if base in registered_rules), None)


def refuse_misregistered(module: nn.Module) -> None:
    """Refuses a registered layer that has a tensor of the registered name which is no buffer: it could not be held.

    Raises:
        BNGuardError: There is such a tensor.
    """
    rule = _registered_rule(module)
    for name in rule.buffers if rule is not None else ():
        is_parameter = module._parameters.get(name) is not None
        if is_parameter or isinstance(module.__dict__.get(name), Tensor):
            what = "an nn.Parameter" if is_parameter else "a plain attribute"
            raise BNGuardError(
                f"{name!r} of {type(module).__name__} is registered as a running statistic, but is {what}, which "
                f"bnguard cannot hold: make it a buffer, with register_buffer({name!r}, ...)"
            )


@functools.lru_cache(maxsize=4096)
def is_statistic(name: str) -> bool:
    """Whether a buffer with this name is treated as a running statistic."""
    return _STATISTIC.fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def _statistics_among(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([name for name in names if _STATISTIC.fullmatch(name) or not set(names).isdisjoint(_paired(name))])


def _paired(name: str) -> tuple[str, ...]:
    return _PAIRED.get(name, ())


def _is_counter(name: str, tensor: Any) -> bool:
    is_single = not is_lazy(tensor) and tensor.numel() == 1
    return is_single and (not tensor.is_floating_point() or _COUNTER.fullmatch(name) is not None)


def kind_of(module: nn.Module) -> LayerKind:
    """The kind of a module with running statistics."""
    if isinstance(module, _ScriptModule):
        return SCRIPTED
    cls = type(module)
    forward = cls.forward
    kind = _STOCK.get(forward)
    if kind is not None and is_known(forward):
        if kind is not INSTANCE_NORM:
            return kind
        apply = getattr(cls, "_apply_instance_norm", None)
        return kind if apply is _APPLY_INSTANCE_NORM and is_known(apply) else OWN_FORWARD
    if forward is nn.Module.forward and "forward" not in module.__dict__:
        return NO_FORWARD
    unflatten = sys.modules.get("torch.export.unflatten")
    if unflatten is not None and isinstance(module, unflatten.InterpreterModule):
        return EXPORTED
    if "weight" in module._buffers and only_reads(forward):  # elsewhere it is a parameter
        return FROZEN
    return OWN_FORWARD


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is of torch's BatchNorm family, or of a subclass, whatever its forward."""
    return isinstance(module, _BatchNorm)


def is_observer(module: nn.Module) -> bool:
    """Whether a module observes values for quantisation, which it does in eval mode, too."""
    return any([cls.__module__.startswith(_OBSERVERS) for cls in type(module).__mro__])


def moving_statistics(layer: StatsLayer) -> tuple[str, ...]:
    """The statistics that a predicted update moves, as long as the batch is finite."""
    kind, names = layer.kind, layer.buffers
    if not kind.counts:
        return tuple([name for name in names if name != "num_batches_tracked"])
    if kind.predict is batch_norm_updates and layer.module.momentum == 0 and "num_batches_tracked" in names:
        return ("num_batches_tracked",)  # old * 1 + batch * 0
    return names


def batch_norm_updates(module: Any) -> bool:
    """Whether ``_BatchNorm.forward`` or ``SyncBatchNorm.forward`` would update the statistics, according to flags."""
    if not (module.training and module.track_running_stats):
        return False
    buffers = module._buffers
    if buffers.get("num_batches_tracked") is not None:
        return True
    # Without a counter, momentum 0 writes old * 1 + batch * 0: the same bits, except for infinities and NaN.
    return module.momentum != 0 and (buffers.get("running_mean") is not None or buffers.get("running_var") is not None)


def _instance_norm_updates(module: Any) -> bool:
    """Whether ``_InstanceNorm.forward`` would update: also in eval mode, if ``track_running_stats`` is False."""
    if not (module.training or not module.track_running_stats):
        return False
    # Momentum 0 is no exception: the mean over the batch's copies of the statistics rounds.
    return module._buffers.get("running_mean") is not None or module._buffers.get("running_var") is not None


def _always(module: Any) -> bool:
    return True


def _tracks(module: Any) -> bool:
    tracks: bool = module.track_running_stats
    return tracks


BATCH_NORM: Final = LayerKind(batch_norm_updates, "scratch", reads_in_eval=_always)
SYNC_BATCH_NORM: Final = LayerKind(batch_norm_updates, reads_in_eval=_always)
INSTANCE_NORM: Final = LayerKind(
    _instance_norm_updates,
    counts=False,
    reads_in_eval=_never if INSTANCE_NORM_ROUNDS else _tracks,
    rounds_in_eval=INSTANCE_NORM_ROUNDS,
    eval_flags={"training": False, "track_running_stats": True},
)
OWN_FORWARD: Final = LayerKind()
OTHER_BUFFERS: Final = LayerKind(counts=False)  # the layer has no running statistics
FROZEN: Final = LayerKind(_never, counts=False, reads_in_eval=_always)
EXPORTED: Final = LayerKind(keeps_mode=True)
SCRIPTED: Final = LayerKind(hold="none", keeps_mode=True, exit_only="a ScriptModule runs no hooks")
NO_FORWARD: Final = LayerKind(hold="none", exit_only="it has no forward of its own, as in an exported program")

BATCH_NORMS: Final = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
_BATCH_NORM_FORWARD: Final = _BatchNorm.forward
BATCH_NORM_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
_APPLY_INSTANCE_NORM: Final = _InstanceNorm._apply_instance_norm
_STOCK: Final[dict[Callable[..., Any], LayerKind]] = {
    _BATCH_NORM_FORWARD: BATCH_NORM,
    nn.SyncBatchNorm.forward: SYNC_BATCH_NORM,
    _InstanceNorm.forward: INSTANCE_NORM,
}


def are_torch_layers_known() -> bool:
    """Whether this torch's own layers are ones whose updates can be predicted."""
    return all(map(is_known, (*_STOCK, _APPLY_INSTANCE_NORM)))
