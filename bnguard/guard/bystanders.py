"""Layers that a model runs without having them among its modules: in plain lists, dicts and objects.

A block neither holds nor restores them. Its end says, once for each, which of them moved.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import nn

from bnguard.errors import BNGuardWarning
from bnguard.guard.hold import guards
from bnguard.guard.phrases import Phrases
from bnguard.layers.bits import is_valueless
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.kinds import StatsLayer, statistics_of
from bnguard.layers.search import named_modules_beside
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.tree import find_layers
from bnguard.torch_internals.callsite import call_site
from bnguard.words import first_of

_References = tuple[tuple[str, "weakref.ref[nn.Module]"], ...]

_known: Final[ByIdentity[_References]] = ByIdentity()  # of a model or another object: they are looked for once
_told: Final[ByIdentity[bool]] = ByIdentity()  # layers of which a user has been told


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
        moved = [layer for layer in moved if layer.module.training and not _told.get(layer.module)]
        if not moved:
            return
        for layer in moved:
            _told.put(layer.module, value=True)
        described = [(layer.names[0], type(layer.module).__name__) for layer in moved]
        warnings.warn(_bystanders_text(described, phrases), BNGuardWarning, stacklevel=call_site().stacklevel)


def bystanders_of(owner: Any, models: Iterable[nn.Module]) -> Bystanders | None:
    """The layers that an object holds beside its models, unless another block guards them; None if there are none.

    Args:
        owner: A model, or another object, such as a trainer.
        models: The models of which the block guards all or some layers.
    """
    known = _known.get(owner)
    if known is None:
        known = tuple(_references(owner, list(models)))
        try:
            _known.put(owner, known)
        except TypeError:  # it has slots
            return None
    layers = []
    for name, place in known:
        module = place()
        if module is not None and id(module) not in guards and not _told.get(module):
            buffers, kind = statistics_of(module)
            if buffers:
                layers.append(StatsLayer(module, (name,), buffers, kind))
    return Bystanders(layers) if layers else None


def is_alone(owner: Any) -> bool:
    """Whether an object was found to hold no layers beside its models."""
    return _known.get(owner) == ()


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
        # torch warns of the pointer of a fake tensor.
        return (id(tensor),) if is_valueless(tensor) else (id(tensor), -tensor.data_ptr() or id(tensor))
    except (RuntimeError, ValueError):  # it has no memory
        return (id(tensor),)


def _bystanders_text(layers: Sequence[tuple[str, str]], phrases: Phrases) -> str:
    """The warning about layers that are not among the modules of the model and moved."""
    shown = first_of([f"{place} ({name})" for place, name in layers])
    return (
        f"also moved inside {phrases.place}, not guarded: {shown}.\n"
        "They are not among the modules of the guarded model: keep them in an nn.ModuleList or nn.ModuleDict, or as\n"
        "attributes of a module, or guard what they belong to as well."
    )
