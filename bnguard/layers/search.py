"""Find the models in arguments and other values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import Parameter

LARGEST: Final = 256  # entries of a container, and containers: data is not searched
_CONTAINERS: Final = (list, tuple, set, frozenset, dict)
TABLES: Final = frozenset(nn.Module().__dict__)  # attributes of every module
_MODULE: Final = itemgetter(1)
_NO_CONTAINERS: Final = frozenset({bool, bytes, complex, float, int, str, type(None), FunctionType, Tensor, Parameter})


def modules_in(values: Sequence[Any]) -> list[nn.Module]:
    """Lists the modules among values and in nested lists, tuples, sets and dicts, each once.

    A container of more than ``LARGEST`` entries is data, and is not searched. A module is recognised by its type;
    ``isinstance()`` would accept a mock that has ``nn.Module`` as its spec.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    seen: set[int] = set()
    for value in values if len(values) <= LARGEST else ():
        cls = type(value)
        if cls in _NO_CONTAINERS:
            continue
        if issubclass(cls, nn.Module):
            found.setdefault(id(value), ("", value))
        elif issubclass(cls, _CONTAINERS):
            _search(value, "", found, seen)
    return list(map(_MODULE, found.values()))


def named_modules_in(value: Any, name: str) -> list[tuple[str, nn.Module]]:
    """Lists the modules in a value as ``modules_in`` does, each with its place, such as ``"norms.0"``."""
    found: dict[int, tuple[str, nn.Module]] = {}
    _search(value, name, found, set())
    return list(found.values())


def named_modules_beside(owner: Any, name: str = "") -> list[tuple[str, nn.Module]]:
    """Lists the modules among the attributes of an object and, one level deep, in those of objects that it holds.

    The tables of a module that is the owner are left out.
    """
    found: list[tuple[str, nn.Module]] = []
    prefix = f"{name}." if name else ""
    for key, value in list(getattr(owner, "__dict__", {}).items()):
        if type(value) in _NO_CONTAINERS or key in TABLES:
            continue
        found += _in_or_beside(value, prefix + key)
    return found


def modules_reachable_from(values: Iterable[Any]) -> list[nn.Module]:
    """Lists the modules in values, in collections, and one level deep in the attributes of other objects."""
    found = {id(module): module for value in values for _, module in _in_or_beside(value, "")}
    return list(found.values())


def roots_of(models: list[nn.Module]) -> list[nn.Module]:
    """Lists the models that are not a submodule of another one in the list."""
    parts = {id(part) for model in models for part in model.modules() if part is not model}
    return [model for model in models if id(model) not in parts] or models[:1]


def _search(value: Any, name: str, found: dict[int, tuple[str, nn.Module]], seen: set[int]) -> None:
    cls = type(value)
    if issubclass(cls, nn.Module):
        found.setdefault(id(value), (name, value))
    elif issubclass(cls, _CONTAINERS) and id(value) not in seen and len(seen) < LARGEST:
        seen.add(id(value))
        try:
            items = list(value.items() if issubclass(cls, dict) else enumerate(value)) if len(value) <= LARGEST else ()
        except Exception:  # a subclass may raise anything when it is measured or iterated
            return
        for key, item in items:
            if type(item) not in _NO_CONTAINERS:
                _search(item, f"{name}.{key}", found, seen)


def _in_or_beside(value: Any, name: str) -> list[tuple[str, nn.Module]]:
    """The modules in a value, else those among its attributes."""
    inside = named_modules_in(value, name)
    if not inside and not issubclass(type(value), (type, ModuleType)):
        inside = named_modules_in(_attributes(value), name)
    return inside


def _attributes(value: Any) -> dict[str, Any]:
    """The values of an object's attributes by name, without those that raise when they are read."""
    own: dict[str, Any] = {}
    with suppress(Exception):
        own.update(vars(value))
    for name in _fields_of(type(value)):  # a dataclass with slots has no __dict__
        with suppress(Exception):
            own[name] = getattr(value, name)
    return own


def _fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
