"""Layers that a model runs without having them among its modules: in plain lists, dicts and objects.

A block neither holds nor restores them. Its end says, once for each, which of them moved.

To look for them takes long, so a model is searched at its first block, and again at the beginning of a block if one of
its modules has got or lost an attribute since, or a list, dict or set among its attributes an item. What is counted is
cheap. One list in the place of another, or an item of a list within a list, goes unnoticed until then; and a model that
changes all the time is not searched more than ``_MOST`` times.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from torch import nn

from bnguard.errors import BNGuardWarning
from bnguard.guard.hold import guards
from bnguard.guard.phrases import Phrases
from bnguard.layers.bits import is_valueless
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.kinds import StatsLayer, statistics_of
from bnguard.layers.search import TABLES, named_modules_beside, named_modules_in
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.tree import Tree, find_layers, parts_of
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.tracing import unseen
from bnguard.words import first_of

_MOST: Final = 16
_ATTRIBUTES: Final = attrgetter("__dict__")
_GROWING: Final = frozenset({list, dict, set})


class Search(NamedTuple):
    """What a search has found.

    Attributes:
        references: The layers, by place.
        containers: Attributes of modules that may come to hold a layer: those that are empty, or hold one already.
        size: The number of attributes, and of items in these, at the search.
        searches: How many searches there have been.
    """

    references: tuple[tuple[str, weakref.ref[nn.Module]], ...]
    containers: tuple[tuple[weakref.ref[Any], str], ...]
    size: int
    searches: int


_known: Final[ByIdentity[Search]] = ByIdentity()  # of a model or another object
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


def bystanders_of(owner: Any, models: Sequence[nn.Module], tree: Tree | None = None) -> Bystanders | None:
    """The layers that an object holds beside its models, unless another block guards them; None if there are none.

    Args:
        owner: A model, or another object, such as a trainer.
        models: The models of which the block guards all or some layers.
        tree: The modules of the owner, if it is a model.
    """
    known = _known.get(owner)
    if known is None or _has_grown(known, owner, tree):
        parts = [owner] if tree is None else tree.modules
        references = _search(owner, models)
        containers = tuple([(weakref.ref(part), key) for part in parts for key in _containers_of(part)])
        known = Search(references, containers, 0, 1 if known is None else known.searches + 1)
        known = known._replace(size=_size(known, owner, tree))
        try:
            _known.put(owner, known)
        except TypeError:  # it has slots
            return None
    layers = []
    # A layer that was beside the models when they were searched may be one of theirs now.
    own = {id(part) for model in models for part in parts_of(model)} if known.references else ()
    for name, place in known.references:
        module = place()
        if module is not None and id(module) not in guards and id(module) not in own and not _told.get(module):
            buffers, kind = statistics_of(module)
            if buffers:
                layers.append(StatsLayer(module, (name,), buffers, kind))
    return Bystanders(layers) if layers else None


def is_alone(model: nn.Module, tree: Tree) -> bool:
    """Whether a model was found to hold no layers beside its modules, and nothing was added since."""
    known = _known.get(model)
    return known is not None and not (known.references or _has_grown(known, model, tree))


# The last search of a model: what another one finds may have been there before, uncounted.
search_of: Final[Callable[[nn.Module], Search | None]] = _known.get


def has_grown(model: nn.Module, tree: Tree) -> bool:
    """Whether a model was searched, and is to be searched again."""
    known = _known.get(model)
    return known is not None and _has_grown(known, model, tree)


def _has_grown(known: Search, owner: Any, tree: Tree | None) -> bool:
    return known.searches < _MOST and known.size != _size(known, owner, tree)


def _size(known: Search, owner: Any, tree: Tree | None) -> int:
    if tree is None:
        size = len(getattr(owner, "__dict__", ()))
    else:
        layers = [layer.module for layer in tree.layers]
        size = sum(map(len, map(_ATTRIBUTES, tree.modules))) - sum(map(len, map(_ATTRIBUTES, layers)))
    return size + sum(map(len, containers_in(known))) if known.containers else size


def containers_in(search: Search | None) -> list[Collection[Any]]:
    """The containers that are counted, as far as they are still there."""
    containers = () if search is None else search.containers
    values: list[Any] = [getattr(place(), "__dict__", {}).get(key) for place, key in containers]
    return [value for value in values if type(value) in _GROWING]


def _containers_of(part: Any) -> list[str]:
    """The attributes that are counted. A list with other items than layers is data, which may grow at every step."""
    attributes = getattr(part, "__dict__", {}).items()
    return [
        key
        for key, value in attributes
        if type(value) in _GROWING and key not in TABLES and (not value or named_modules_in(value, key))
    ]


@unseen
def _search(owner: Any, models: Sequence[nn.Module]) -> tuple[tuple[str, weakref.ref[nn.Module]], ...]:
    return tuple(_references(owner, models))


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
