"""What moves beside the statistics that a block guards, and is told of once at its end.

Layers that a model runs without having them among its modules, in plain lists, dicts and objects; and buffers of the
model that are no running statistics. A block neither holds nor restores them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from torch import Tensor, nn

from bnguard.errors import BNGuardWarning
from bnguard.guard.hold import guards
from bnguard.guard.options import Settings
from bnguard.guard.phrases import Phrases
from bnguard.layers.bits import has_values
from bnguard.layers.kinds import StatsLayer, is_observer, statistics_of
from bnguard.layers.other_buffers import other_buffers
from bnguard.layers.search import named_modules_beside
from bnguard.layers.select import is_selected
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree, find_layers
from bnguard.torch_internals.callsite import call_site
from bnguard.words import first_of

_References = tuple[tuple[str, "weakref.ref[nn.Module]"], ...]

# By the id of the model or other object, as long as it lives: they are looked for once.
_known: Final[dict[int, tuple[weakref.ref[Any], _References]]] = {}
_SHOWN: Final = 3
_LARGEST: Final = 1 << 20  # values of a buffer that is looked at
# Layers of which a user has been told, by id.
_told: Final[dict[int, weakref.ref[nn.Module]]] = {}


class Bystanders:
    """The statistics of such layers at the beginning of a block.

    Args:
        layers: The layers, with their places as names.
    """

    __slots__ = ("_layers", "_statistics")

    def __init__(self, layers: Sequence[StatsLayer]) -> None:
        self._layers = layers
        self._statistics = Snapshot([layer.module for layer in layers], [layer.buffers for layer in layers])

    def tell(self, phrases: Phrases) -> None:
        """Warns about those that have moved in train mode. A copy that an average is written to is in eval mode."""
        moved = [self._layers[difference.owner] for difference in self._statistics.changed()]
        moved = [layer for layer in moved if layer.module.training and id(layer.module) not in _told]
        if not moved:
            return
        for layer in moved:
            key = id(layer.module)
            _told[key] = weakref.ref(layer.module, partial(_forget, key))
        described = [(layer.names[0], type(layer.module).__name__) for layer in moved]
        warnings.warn(_bystanders_text(described, phrases), BNGuardWarning, stacklevel=call_site().stacklevel)


def bystanders_of(owner: Any, models: Iterable[nn.Module]) -> Bystanders | None:
    """The layers that an object holds beside its models, unless another block guards them; None if there are none.

    Args:
        owner: A model, or another object, such as a trainer.
        models: The models of which the block guards all or some layers.
    """
    key = id(owner)
    known = _known.get(key)
    if known is None or known[0]() is not owner:
        try:
            reference = weakref.ref(owner, partial(_forget, key))
        except TypeError:  # it has slots
            return None
        known = _known[key] = reference, tuple(_references(owner, list(models)))
    layers = []
    for name, place in known[1]:
        module = place()
        if module is not None and id(module) not in guards and id(module) not in _told:
            buffers, kind = statistics_of(module)
            if buffers:
                layers.append(StatsLayer(module, (name,), buffers, kind))
    return Bystanders(layers) if layers else None


def _references(owner: Any, models: Sequence[nn.Module]) -> Iterable[tuple[str, weakref.ref[nn.Module]]]:
    parts = {id(part) for model in models for part in model.modules()}
    shared = {place for model in models for buffer in model.buffers() for place in _places_of(buffer)}
    roots = set(map(id, models))
    owners = [(name, part) for name, part in owner.named_modules()] if isinstance(owner, nn.Module) else [("", owner)]
    for name, part in owners:
        for place, module in named_modules_beside(part, name):
            if not roots.isdisjoint(map(id, module.modules())):
                continue  # what holds the model is no part of it
            for layer in find_layers(module):
                if id(layer.module) in parts:
                    continue
                parts.add(id(layer.module))
                buffers = [layer.module._buffers[name] for name in layer.buffers]
                if not all([shared.intersection(_places_of(buffer)) for buffer in buffers]):  # else compared already
                    path = f"{place}.{layer.names[0]}" if layer.names[0] else place
                    yield path, weakref.ref(layer.module)


def _places_of(tensor: Any) -> tuple[int, ...]:
    """What tells that another tensor, or another object for it, has the same values."""
    try:
        return id(tensor), -tensor.data_ptr() or id(tensor)
    except (RuntimeError, ValueError):  # it has no memory, or none yet
        return (id(tensor),)


def _forget(key: int, _: object) -> None:
    _known.pop(key, None)
    _told.pop(key, None)


class UnguardedBuffers:
    """The buffers of a model that are no running statistics, at the beginning of a block.

    Args:
        layers: The modules that own them.
    """

    __slots__ = ("_layers", "_values")

    def __init__(self, layers: Sequence[StatsLayer]) -> None:
        self._layers = layers
        self._values = Snapshot([layer.module for layer in layers], [layer.buffers for layer in layers])

    def tell(self, phrases: Phrases) -> None:
        """Warns once about those that have moved in train mode. One that was removed has not."""
        moved = []
        for difference in [] if self._values.is_intact() else self._values.changed():
            layer = self._layers[difference.owner]
            key = id(layer.module)
            own = own_tensors(layer.module, "_buffers")
            names = [name for name in difference.names if own.get(name) is not None]
            if names and layer.module.training and key not in _told:
                _told[key] = weakref.ref(layer.module, partial(_forget, key))
                prefix = f"{layer.names[0]}." if layer.names[0] else ""
                moved += [prefix + name for name in names]
        if moved:
            warnings.warn(_others_text(moved, phrases), BNGuardWarning, stacklevel=call_site().stacklevel)


def unguarded_buffers(
    model: nn.Module, tree: Tree, guarded: Sequence[StatsLayer], settings: Settings
) -> UnguardedBuffers | None:
    """The buffers that a block does not guard, beside layers that it does; None if there are none to tell of.

    Where the block lets updates happen, or is for training with frozen statistics, they are meant to move; observers of
    quantisation are until they are disabled.

    Args:
        model: The model.
        tree: Its modules.
        guarded: What the block guards.
        settings: The options of the block.
    """
    policy = settings.policy
    if not guarded or settings.updates or not policy.puts_back or policy.normalises_with == "running":
        return None
    if not tree.has_other_buffers():
        return None
    names = {id(layer.module): layer.buffers for layer in guarded}
    layers = []
    for layer in other_buffers(model, tree.layers):
        is_meant = is_selected(layer, settings.include, settings.exclude, settings.within)
        if id(layer.module) in _told or is_observer(layer.module) or not is_meant:
            continue
        own = own_tensors(layer.module, "_buffers")
        left = [name for name in layer.buffers if name not in names.get(id(layer.module), ())]
        left = [name for name in left if (tensor := own[name]) is not None and _is_small(tensor)]
        if left:
            layers.append(replace(layer, buffers=tuple(left)))
    return UnguardedBuffers(layers) if layers else None


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor can be copied at each block: not a queue of a million values, nor what has none."""
    return has_values(tensor) and tensor.numel() <= _LARGEST


def _bystanders_text(layers: Sequence[tuple[str, str]], phrases: Phrases) -> str:
    """The warning about layers that are not among the modules of the model and moved."""
    shown = first_of([f"{place} ({name})" for place, name in layers], _SHOWN)
    return (
        f"also moved inside {phrases.place}, not guarded: {shown}.\n"
        "They are not among the modules of the guarded model: keep them in an nn.ModuleList or nn.ModuleDict, or as\n"
        "attributes of a module, or guard what they belong to as well."
    )


def _others_text(names: Sequence[str], phrases: Phrases) -> str:
    """The warning about buffers that are no running statistics and moved."""
    return (
        f"also moved inside {phrases.place}, not guarded: {first_of(names, _SHOWN)}.\n"
        "They are buffers, but no running statistics of a normalisation layer. To guard them, or some of them:\n"
        + "\n".join(phrases.choices(('buffers="all"', "or patterns on their names")))
    )
