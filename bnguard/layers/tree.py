"""Walk a model to find its layers with running statistics and their names, and detect changes since the walk."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import compress
from operator import attrgetter, call, is_, not_
from typing import Any, Final, TypeAlias

from torch import nn

from bnguard.layers.kinds import StatsLayer, refuse_misregistered, registered_rules, statistics_of
from bnguard.torch_internals.wrappers import WRAPPERS

_FORWARD: Final = attrgetter("forward")
_BUFFERS: Final = attrgetter("_buffers")
_MODULES: Final = attrgetter("_modules")
_MODULE: Final = attrgetter("module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around it."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        model = inner
        names = WRAPPERS.get(type(model).__name__)
        inner = None if names is None else getattr(model, names[0], None)
    return model


# In place of a module, while what is kept of its model refers to it weakly.
_RELEASED: Final = nn.Module()

# Of the modules of a tree: weak references; of those that have children, their places, with names and places of the
# children, -1 for None; the places of the layers.
_Outline: TypeAlias = tuple[list[weakref.ref[nn.Module]], list[tuple[int, tuple[str, ...], tuple[int, ...]]], list[int]]


class Tree:
    """The modules of a model at the time of the walk.

    Attributes:
        layers: The layers that own running statistics, in the order of ``state_dict()``. A layer that is reached under
            several names is listed once, with all of them.
        model: The model itself.
        modules: All of its modules, each once, itself the first.
    """

    __slots__ = (
        "_branches", "_buffer_counts", "_buffer_tables", "_can_stay", "_classes", "_forwards", "_is_leaf", "_leaves",
        "_missing", "_module_tables", "_outline", "_rules", "_types", "layers", "model", "modules",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        found: dict[int, StatsLayer] = {}
        modules = {id(model): model}
        buffers, kind = statistics_of(model)
        if buffers:
            found[id(model)] = StatsLayer(model, ("",), buffers, kind)
        _visit(model, "", found, modules, set())
        self.model = model
        self.layers = list(found.values())
        self.modules: list[Any] = list(modules.values())
        self._rules = dict(registered_rules)
        if self._rules:
            _refuse_misregistered(self.modules)
        # False: a layer without a forward may get one, and a ScriptModule makes new dictionaries at each access.
        self._can_stay = not any([layer.kind.hold == "none" for layer in self.layers])
        self._types = [type(layer.module) for layer in self.layers]
        self._classes = list(dict.fromkeys(self._types)) if self._can_stay else []  # a ScriptModule has no forward
        self._forwards = list(map(_FORWARD, self._classes))
        self._buffer_tables: list[Any] = list(map(_BUFFERS, self.modules))
        self._buffer_counts = list(map(len, self._buffer_tables))
        # Registered as None: a layer that does not track yet.
        self._missing = [
            (table, name) for table in self._buffer_tables for name, tensor in table.items() if tensor is None
        ]
        self._module_tables: list[Any] = list(map(_MODULES, self.modules))
        self._branches = [(table, tuple(table.keys()), tuple(table.values())) for table in self._module_tables if table]
        self._is_leaf = list(map(not_, self._module_tables))
        self._leaves = list(compress(self._module_tables, self._is_leaf))
        self._outline: _Outline | None = None  # once there was a release()

    def release(self) -> None:
        """Refers to the modules weakly from now on, and to no model, until ``recover()``."""
        if self._outline is None:
            self._outline = _outline_of(self.modules, self._module_tables, self.layers)
        self.modules, self._module_tables, self._branches, self._leaves = [], [], [], []
        self.model = _RELEASED
        for layer in self.layers:
            layer.module = _RELEASED

    def recover(self) -> bool:
        """Refers to the modules as at the walk; False if one is gone. What else has changed, ``is_current`` tells."""
        if self._outline is None:
            return True
        references, branches, layers = self._outline
        modules: list[Any] = list(map(call, references))
        try:
            self._module_tables = list(map(_MODULES, modules))
        except AttributeError:  # of None
            return False
        self.model, self.modules = modules[0], modules
        child = [*modules, None].__getitem__
        for place, keys, children in branches:
            self._branches.append((self._module_tables[place], keys, tuple(map(child, children))))
        self._leaves = list(compress(self._module_tables, self._is_leaf))
        for layer, place in zip(self.layers, layers, strict=True):
            layer.module = modules[place]
        return True

    def has_other_buffers(self) -> bool:
        """Whether the modules have buffers that are no running statistics."""
        return sum(self._buffer_counts) > sum([len(layer.buffers) for layer in self.layers])

    def is_plain(self) -> bool:
        """Whether a new walk can be spared as long as nothing is replaced, and all buffers are running statistics."""
        tables = [*self._module_tables, *self._buffer_tables]
        return (
            self._can_stay and not self._missing and not self.has_other_buffers() and set(map(type, tables)) == {dict}
        )

    def is_current(self) -> bool:
        """Whether a new walk would give the same result."""
        if not self.has_same_structure():
            return False
        for layer in self.layers:
            buffers = layer.module._buffers
            for name in layer.buffers:
                if buffers.get(name) is None:
                    return False
        return True

    def has_same_structure(self) -> bool:
        """Whether a new walk would find the same layers, if they still have their statistics."""
        modules = self.modules
        if not (
            self._can_stay
            and self.has_same_modules()
            and self._rules == registered_rules
            and all(map(is_, map(_BUFFERS, modules), self._buffer_tables))
            and all(map(is_, map(type, map(_MODULE, self.layers)), self._types))
        ):
            return False
        for table, name in self._missing:
            if table.get(name) is not None:
                return False
        # Somebody may have replaced the forward of a class.
        return all(map(is_, map(_FORWARD, self._classes), self._forwards))

    def has_same_modules(self) -> bool:
        """Whether no module was added, removed or moved since the walk, and no module has more or fewer buffers."""
        if list(map(len, self._buffer_tables)) != self._buffer_counts or any(self._leaves):
            return False
        # A new table, as Sequential makes one when an item is deleted: the old one says nothing any more.
        if self._can_stay and not all(map(is_, map(_MODULES, self.modules), self._module_tables)):
            return False
        for table, keys, children in self._branches:
            if tuple(table.keys()) != keys or not all(map(is_, table.values(), children)):
                return False
        return True


def _outline_of(modules: list[nn.Module], tables: list[Any], layers: list[StatsLayer]) -> _Outline:
    places = {key: place for place, key in enumerate(map(id, modules))}
    branches = [
        (place, tuple(table.keys()), tuple([places.get(id(child), -1) for child in table.values()]))
        for place, table in enumerate(tables)
        if table
    ]
    return list(map(weakref.ref, modules)), branches, [places[id(layer.module)] for layer in layers]


def find_layers(model: nn.Module) -> list[StatsLayer]:
    """Lists the layers of ``model`` that own running statistics, in the order of ``state_dict()``.

    A layer that is reached under several names is listed once, with all of them.
    """
    return Tree(model).layers


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model, each once. Unlike torch's ``modules()`` it needs no hash of theirs."""
    found = {id(model)}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found.add(id(child))
                waiting.append(child)


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model; a shared one as often as it is there."""
    return (one for part in parts_of(model) for one in part._parameters.values() if one is not None)


def ancestors_of(layer: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules of a model around one of its layers, the smallest first; of a layer in several places, the first."""
    parents: dict[int, nn.Module] = {}
    for module in parts_of(model):
        for child in module._modules.values():
            parents.setdefault(id(child), module)
    found = []
    while layer is not model:
        layer = parents[id(layer)]
        found.append(layer)
    return found


def any_layer(model: nn.Module) -> bool:
    """Whether at least one layer of ``model`` owns running statistics."""
    if registered_rules:
        _refuse_misregistered(model.modules())
    seen, waiting = {id(model)}, [model]
    if model._buffers and statistics_of(model)[0]:
        return True
    for module in waiting:  # which gets longer: the top of the model first
        for child in module._modules.values():
            if child is None or id(child) in seen:
                continue
            if child._buffers and statistics_of(child)[0]:
                return True
            seen.add(id(child))
            waiting.append(child)
    return False


def _refuse_misregistered(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        refuse_misregistered(module)


def walk_names(model: nn.Module) -> Iterator[str]:
    """Yields the names of all modules, without wrapper prefixes, in the order of ``named_modules()``."""
    yield from [name for name, _ in walk_modules(model)]


def walk_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules with their names as ``walk_names`` does; a shared one under each of its names."""
    yield from _walk(model, "", set())


def _walk(module: nn.Module, name: str, path: set[int]) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    path.add(id(module))
    prefix, omitted = _prefix(module, name)
    for key, child in module._modules.items():
        if child is not None and id(child) not in path:
            yield from _walk(child, name if key in omitted else prefix + key, path)
    path.discard(id(module))


def _prefix(module: nn.Module, name: str) -> tuple[str, tuple[str, ...]]:
    """The prefix of a module's children, and the keys of the wrapped child, which has the module's own name."""
    return f"{name}." if name else "", WRAPPERS.get(type(module).__name__, ())


def _visit(
    module: nn.Module, name: str, found: dict[int, StatsLayer], modules: dict[int, nn.Module], path: set[int]
) -> None:
    """Adds all submodules to ``modules``, and those with running statistics to ``found``."""
    path.add(id(module))
    prefix, omitted = _prefix(module, name)
    for key, child in module._modules.items():
        identity = id(child)
        if child is None or identity in path:
            continue
        child_name = name if key in omitted else prefix + key
        modules[identity] = child
        if child._buffers:
            known = found.get(identity)
            if known is None:
                buffers, kind = statistics_of(child)
                if buffers:
                    found[identity] = StatsLayer(child, (child_name,), buffers, kind)
            else:
                known.names = tuple(dict.fromkeys((*known.names, child_name)))
        if child._modules:
            _visit(child, child_name, found, modules, path)
    path.discard(id(module))
