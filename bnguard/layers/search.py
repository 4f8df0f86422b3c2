"""Find models in what other code hands around."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["modules_in", "modules_reachable_from", "roots_of"]


def modules_in(value: Any) -> list[nn.Module]:
    """Modules in a value, and inside lists, tuples, sets and dicts; each once.

    By their real type: a mock that says it is a module is none.
    """
    found: dict[int, nn.Module] = {}
    _search(value, found, set())
    return list(found.values())


def modules_reachable_from(values: Iterable[Any]) -> list[nn.Module]:
    """Modules in values, inside collections, and in the attributes of dataclasses and plain objects, one level deep."""
    found: dict[int, nn.Module] = {}
    for value in values:
        inside = modules_in(value)
        if not inside and not issubclass(type(value), (type, ModuleType)):
            inside = modules_in(_attributes(value))
        found.update((id(module), module) for module in inside)
    return list(found.values())


def roots_of(models: list[nn.Module]) -> list[nn.Module]:
    """``models`` without those that are a part of another one."""
    parts = {id(part) for model in models for part in model.modules() if part is not model}
    return [model for model in models if id(model) not in parts] or models[:1]


def _search(value: Any, found: dict[int, nn.Module], seen: set[int]) -> None:
    cls = type(value)
    if issubclass(cls, nn.Module):
        found[id(value)] = value
    elif issubclass(cls, (list, tuple, set, frozenset, dict)) and id(value) not in seen:
        seen.add(id(value))
        with suppress(Exception):  # a subclass may do anything
            for item in list(value.values()) if issubclass(cls, dict) else list(value):
                _search(item, found, seen)


def _attributes(value: Any) -> list[Any]:
    """What hangs on an object, as far as it lets itself be looked at."""
    own: list[Any] = []
    with suppress(Exception):
        own += vars(value).values()
    for name in _fields_of(type(value)):  # which may have slots instead
        with suppress(Exception):
            own.append(getattr(value, name))
    return own


def _fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
