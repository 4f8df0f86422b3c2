"""Find the models in arguments and other values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any

from torch import nn


def modules_in(value: Any) -> list[nn.Module]:
    """Lists the modules in a value and in nested lists, tuples, sets and dicts, each once.

    A module is recognised by its type; ``isinstance()`` would accept a mock that has ``nn.Module`` as its spec.
    """
    found: dict[int, nn.Module] = {}
    _search(value, found, set())
    return list(found.values())


def modules_reachable_from(values: Iterable[Any]) -> list[nn.Module]:
    """Lists the modules in values, in collections, and one level deep in the attributes of other objects."""
    found: dict[int, nn.Module] = {}
    for value in values:
        inside = modules_in(value)
        if not inside and not issubclass(type(value), (type, ModuleType)):
            inside = modules_in(_attributes(value))
        found.update((id(module), module) for module in inside)
    return list(found.values())


def roots_of(models: list[nn.Module]) -> list[nn.Module]:
    """Lists the models that are not a submodule of another one in the list."""
    parts = {id(part) for model in models for part in model.modules() if part is not model}
    return [model for model in models if id(model) not in parts] or models[:1]


def _search(value: Any, found: dict[int, nn.Module], seen: set[int]) -> None:
    cls = type(value)
    if issubclass(cls, nn.Module):
        found[id(value)] = value
    elif issubclass(cls, (list, tuple, set, frozenset, dict)) and id(value) not in seen:
        seen.add(id(value))
        with suppress(Exception):  # a subclass may raise anything when it is iterated
            for item in list(value.values()) if issubclass(cls, dict) else list(value):
                _search(item, found, seen)


def _attributes(value: Any) -> list[Any]:
    """The values of an object's attributes, without those that raise when they are read."""
    own: list[Any] = []
    with suppress(Exception):
        own += vars(value).values()
    for name in _fields_of(type(value)):  # a dataclass with slots has no __dict__
        with suppress(Exception):
            own.append(getattr(value, name))
    return own


def _fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
