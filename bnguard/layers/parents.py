"""Find the largest module that a module is registered in: torch knows the children of a module, not its parents."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import compress
from typing import Any, Final

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.tree import Tree


def registered_root(module: nn.Module) -> nn.Module:
    """The largest module of which a module is a part, at any depth; the module itself if it is not registered anywhere.

    A model that is never called itself, but by ``training_step()`` or part by part, is found as well: by one pass over
    all objects of the process, which takes some 50 ms.
    """
    parents: defaultdict[int, list[nn.Module]] = defaultdict(list)
    for found in _all_modules():
        for child in _children_of(found):
            parents[id(child)].append(found)
    return _root(module, lambda part: parents[id(part)])


def name_as_parts(layers: Iterable[Any], model: nn.Module) -> None:
    """Gives layers the names that they have in a model. Those that are no parts of it keep theirs.

    Args:
        layers: Objects with a ``module`` and ``names``.
        model: The model.
    """
    names = {id(layer.module): layer.names for layer in Tree(model).layers}
    for layer in layers:
        layer.names = names.get(id(layer.module), layer.names)


class Registrations:
    """Answers ``registered_root`` again and again, with one pass in all: it sees what is registered from then on.

    A part of a copy counts as registered nowhere, as a copy registers nothing. Models are held weakly.
    """

    def __init__(self) -> None:
        self._parents: ByIdentity[list[weakref.ref[nn.Module]]] = ByIdentity()
        self._handle: Any = None
        self._knows_earlier = False

    def begin(self) -> None:
        """Sees registrations from now on."""
        if self._handle is None:
            self._handle = register_module_module_registration_hook(self._register)

    def end(self) -> None:
        """Sees no more registrations, and forgets all. May be done again."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._knows_earlier, self._parents = None, False, ByIdentity()

    def root_of(self, module: nn.Module) -> nn.Module:
        """The ``registered_root`` of a module."""
        if self._handle is None:
            return registered_root(module)
        if not self._knows_earlier:
            self._knows_earlier = True
            for found in _all_modules():
                for child in _children_of(found):
                    self._register(found, "", child)
        return _root(module, self._parents_of)

    def _register(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        """The hook of torch: a module is about to get a child."""
        if child is None:
            return
        known = self._parents.get(child)
        if known is None:
            self._parents.put(child, [weakref.ref(module)])
        elif not any([parent() is module for parent in known]):
            known.append(weakref.ref(module))

    def _parents_of(self, module: nn.Module) -> list[nn.Module]:
        parents = [parent() for parent in self._parents.get(module) or ()]
        return [found for found in parents if found is not None and any([c is module for c in _children_of(found)])]


registrations: Final = Registrations()


def _root(module: nn.Module, parents_of: Callable[[nn.Module], Iterable[nn.Module]]) -> nn.Module:
    """The largest of the modules above a module that have no parents."""
    above = {id(module): module}
    waiting, roots = [module], []
    while waiting:
        part = waiting.pop()
        parents = list(parents_of(part))
        if not parents:
            roots.append(part)
        for parent in parents:
            if id(parent) not in above:
                above[id(parent)] = parent
                waiting.append(parent)
    if len(roots) == 1:
        return roots[0]
    return max(roots, key=lambda root: len(Tree(root).modules), default=module)


def _children_of(module: nn.Module) -> list[Any]:
    return list((module.__dict__.get("_modules") or {}).values())


def _all_modules() -> Iterator[nn.Module]:
    """All modules of the process. There may be a million objects: what is done with each is done in C.

    isinstance() would run code of proxies and mocks.
    """
    objects = gc.get_objects()
    classes = list(map(type, objects))
    keys = list(map(id, classes))
    is_module = {key for key, cls in dict(zip(keys, classes, strict=True)).items() if issubclass(cls, nn.Module)}
    return compress(objects, map(is_module.__contains__, keys))
