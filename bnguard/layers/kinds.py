"""Which modules carry running statistics, under which names, and how each updates them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor, nn
from torch.jit import ScriptModule as _ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = [
    "LayerKind",
    "LayerRegistration",
    "StatsLayer",
    "is_statistic",
    "is_torch_source_known",
    "register_layer",
    "registered_rules",
    "statistics_of",
    "tensor_table",
    "tensor_tables",
]

_STATISTIC: Final = re.compile(
    r"(?:running|moving)_(?:\w+_)?(?:mean|var|variance|std|cov|covar|covariance|wm|projection)(?:_\w+)?"
    r"|num_batches_tracked"
)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How the layers of one family update, and how an update is kept away from them.

    Attributes:
        predict: Tells on the host, from flags alone, whether a forward now would update; None where only a
            comparison after the call can tell.
        hold: How a forward runs without touching the statistics. ``"scratch"``: ``F.batch_norm`` with statistics
            nobody reads; ``"stand-in"``: the layer's own forward on a stand-in for the layer; ``"exchange"``: a forward
            that somebody put on the instance, with the layer's buffers exchanged; ``"none"``: no way to hold it.
    """

    predict: Callable[[nn.Module], bool] | None
    hold: Literal["scratch", "stand-in", "exchange", "none"]


@dataclass(slots=True)
class StatsLayer:
    """A module that owns running statistics.

    Attributes:
        module: The layer.
        names: Key prefixes in ``model.state_dict()``; ``""`` is the model itself.
        buffers: Names of the buffers that are guarded, in the order of registration.
        kind: How it updates.
    """

    module: nn.Module
    names: tuple[str, ...]
    buffers: tuple[str, ...]
    kind: LayerKind


@dataclass(frozen=True, slots=True)
class _Rule:
    buffers: tuple[str, ...]
    kind: LayerKind


class LayerRegistration:
    """What ``register_layer`` returns: ``remove()`` takes the registration back, once or often."""

    def __init__(self, cls: type[nn.Module], rule: _Rule) -> None:
        self._cls = cls
        self._rule = rule

    def remove(self) -> None:
        """Takes the registration back, unless a later one for the same class has replaced it."""
        if _registered.get(self._cls) is self._rule:
            del _registered[self._cls]


_registered: dict[type[nn.Module], _Rule] = {}


def register_layer(
    cls: type[nn.Module], buffers: Sequence[str], *, updates: Callable[[Any], bool] | None = None
) -> LayerRegistration:
    """Teaches bnguard a layer that names its running statistics otherwise.

    Buffers called ``running_*`` or ``moving_*`` (mean, var, variance, std, covariance, ...) and
    ``num_batches_tracked`` are found without this. Applies to subclasses too, to guards entered from now on, and in
    this process.

    Args:
        cls: The layer's class.
        buffers: Names of the buffers that hold running statistics; one that a layer does not have, or that is None
            there, is passed over.
        updates: Given the layer, tells from its flags, without reading a tensor, whether a forward now would update
            (``lambda layer: layer.training``). With it, ``on_change="raise"`` needs no comparison after each forward.
            Leave it out where that cannot be known.

    Returns:
        A registration whose ``remove()`` takes it back.

    Raises:
        TypeError: ``cls`` is no subclass of ``torch.nn.Module``, ``buffers`` is no sequence of strings, or
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
    rule = _Rule(tuple(buffers), LayerKind(updates, "stand-in"))
    _registered[cls] = rule
    return LayerRegistration(cls, rule)


# By id of the module: the true buffers of layers that run with others at the moment.
exchanged_buffers: Final[dict[int, dict[str, Tensor | None]]] = {}


def tensor_table(module: nn.Module, table: Literal["_buffers", "_parameters"]) -> dict[str, Tensor | None]:
    """The module's true buffers or parameters by name: the dictionary itself, but for a ScriptModule a copy."""
    if not isinstance(module, _ScriptModule):
        if exchanged_buffers and table == "_buffers" and id(module) in exchanged_buffers:
            return exchanged_buffers[id(module)]
        tensors: dict[str, Tensor | None] = module.__dict__[table]
        return tensors
    return dict(module.named_buffers(recurse=False) if table == "_buffers" else module.named_parameters(recurse=False))


def tensor_tables(
    modules: Sequence[nn.Module], table: Literal["_buffers", "_parameters"]
) -> list[dict[str, Tensor | None]]:
    """The same of several modules."""
    if exchanged_buffers or any([issubclass(cls, _ScriptModule) for cls in set(map(type, modules))]):
        return [tensor_table(module, table) for module in modules]
    return list(map(_GETTERS[table], modules))


_GETTERS: Final = {table: operator.attrgetter(table) for table in ("_buffers", "_parameters")}


def statistics_of(module: nn.Module) -> tuple[tuple[str, ...], LayerKind]:
    """The guarded buffers of one module, in the order of registration, and how it updates them."""
    buffers = module._buffers
    if not buffers:
        return (), OWN_FORWARD
    if _registered:
        for base in type(module).__mro__:
            rule = _registered.get(base)
            if rule is not None:
                return tuple([name for name in rule.buffers if buffers.get(name) is not None]), rule.kind
    cls = type(module)
    if cls in _BATCH_NORMS and cls.forward is _BATCH_NORM_FORWARD and tuple(buffers) == _BATCH_NORM_STATISTICS:
        mean, var, count = buffers.values()  # of all layers the most
        if mean is not None and var is not None and count is not None and is_torch_source_known(_BATCH_NORM_FORWARD):
            return _BATCH_NORM_STATISTICS, BATCH_NORM
    names = _statistics_among(tuple([name for name, tensor in buffers.items() if tensor is not None]))
    return names, _kind(module) if names else OWN_FORWARD


def is_statistic(name: str) -> bool:
    """Whether a buffer of this name is taken for a running statistic."""
    return _STATISTIC.fullmatch(name) is not None


def registered_rules() -> Mapping[type[nn.Module], object]:
    """What ``register_layer`` has taught so far."""
    return _registered


@functools.lru_cache(maxsize=4096)
def _statistics_among(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([name for name in names if _STATISTIC.fullmatch(name)])


def _kind(module: nn.Module) -> LayerKind:
    if isinstance(module, _ScriptModule):
        return SCRIPTED
    cls = type(module)
    forward = cls.forward
    kind = _STOCK.get(forward)
    if kind is not None and is_torch_source_known(forward):
        if kind is not INSTANCE_NORM:
            return kind
        apply = getattr(cls, "_apply_instance_norm", None)
        return kind if apply is _APPLY_INSTANCE_NORM and is_torch_source_known(apply) else OWN_FORWARD
    if forward is nn.Module.forward and "forward" not in module.__dict__:
        return NO_FORWARD
    unflatten = sys.modules.get("torch.export.unflatten")
    if unflatten is not None and isinstance(module, unflatten.InterpreterModule):
        return EXPORTED
    return OWN_FORWARD


def batch_norm_updates(module: Any) -> bool:
    """What ``_BatchNorm.forward`` and ``SyncBatchNorm.forward`` decide before they write."""
    if not (module.training and module.track_running_stats):
        return False
    buffers = module._buffers
    if buffers.get("num_batches_tracked") is not None:
        return True
    # Without a counter, momentum 0 writes old * 1 + batch * 0: the same bits, infinities and NaN aside.
    return module.momentum != 0 and (buffers.get("running_mean") is not None or buffers.get("running_var") is not None)


def _instance_norm_updates(module: Any) -> bool:
    """What ``_InstanceNorm.forward`` decides: the flag off makes it update in eval mode as well."""
    if not (module.training or not module.track_running_stats):
        return False
    # Momentum 0 is no exception: the mean over the batch's copies of the statistics rounds.
    return module._buffers.get("running_mean") is not None or module._buffers.get("running_var") is not None


BATCH_NORM: Final = LayerKind(batch_norm_updates, "scratch")
SYNC_BATCH_NORM: Final = LayerKind(batch_norm_updates, "stand-in")
INSTANCE_NORM: Final = LayerKind(_instance_norm_updates, "stand-in")
OWN_FORWARD: Final = LayerKind(None, "stand-in")
INSTANCE_FORWARD: Final = LayerKind(None, "exchange")
EXPORTED: Final = LayerKind(None, "stand-in")
SCRIPTED: Final = LayerKind(None, "none")
NO_FORWARD: Final = LayerKind(None, "none")

_BATCH_NORMS: Final = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
_BATCH_NORM_FORWARD: Final = _BatchNorm.forward
_BATCH_NORM_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
_APPLY_INSTANCE_NORM: Final = _InstanceNorm._apply_instance_norm
_STOCK: Final[dict[Callable[..., Any], LayerKind]] = {
    _BATCH_NORM_FORWARD: BATCH_NORM,
    nn.SyncBatchNorm.forward: SYNC_BATCH_NORM,
    _InstanceNorm.forward: INSTANCE_NORM,
}

# What torch decides before it writes is read off these functions. A torch whose source says something else is not
# believed: its layers are treated as layers with a forward of their own, which is slower and just as safe.
_KNOWN_SOURCES: Final = frozenset(
    {
        # torch 2.13
        "9886e47efe62f4d2",  # _BatchNorm.forward
        "534e3aacd9feed97",  # SyncBatchNorm.forward
        "9ca012652fe66334",  # _InstanceNorm.forward
        "d997b839a49b40e4",  # _InstanceNorm._apply_instance_norm
    }
)


@functools.cache
def is_torch_source_known(function: Callable[..., Any]) -> bool:
    """Whether the source of ``function`` is one whose behaviour bnguard was tested against."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return hashlib.sha256(" ".join(source.split()).encode()).hexdigest()[:16] in _KNOWN_SOURCES
