"""Which layers of a model a guard is about: ``include`` and ``exclude``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from bnguard.layers.kinds import StatsLayer
from bnguard.layers.tree import walk_names
from bnguard.words import short_repr

__all__ = ["Selector", "as_selectors", "is_selected", "is_within", "select_layers"]

Selector: TypeAlias = "str | nn.Module | Callable[[str, nn.Module], bool]"


def as_selectors(option: str, value: Any) -> tuple[Selector, ...]:
    """Checks the value of ``include`` or ``exclude``; one selector or a list of them.

    Raises:
        TypeError: One is neither a pattern, a module nor a predicate.
        ValueError: The list is empty.
    """
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for selector in several:
        if isinstance(selector, type) or not (isinstance(selector, (str, nn.Module)) or callable(selector)):
            raise TypeError(
                f"{option} takes glob patterns on layer names, modules, predicates (name, module) -> bool, "
                f"or a list of them, got {short_repr(selector)}"
            )
    if not several:
        raise ValueError(f"{option} is an empty list; leave it out to mean every layer")
    return tuple(several)


def is_within(layer: StatsLayer, paths: Sequence[str]) -> bool:
    """Whether a layer is in one of the submodules at these paths, or is one of them; without any, all are."""
    return not paths or any([f"{name}.".startswith(f"{path}.") for name in layer.names for path in paths])


def is_selected(
    layer: StatsLayer, include: Sequence[Selector], exclude: Sequence[Selector], within: Sequence[str] = ()
) -> bool:
    """Whether the selectors leave one layer."""
    if not is_within(layer, within):
        return False
    taken = not include or any([_selects(selector, layer) for selector in include])
    return taken and not any([_selects(selector, layer) for selector in exclude])


def select_layers(
    model: nn.Module,
    layers: list[StatsLayer],
    include: Sequence[Selector],
    exclude: Sequence[Selector],
    within: Sequence[str] = (),
) -> list[StatsLayer]:
    """Lists those of the model's layers that the selectors leave; of those within some submodules, where any are given.

    Raises:
        ValueError: A selector selects none of them, or nothing is left.
    """
    if within:
        layers = [layer for layer in layers if is_within(layer, within)]
    if not layers:
        return []
    for option, selectors in (("include", include), ("exclude", exclude)):
        for selector in selectors:
            if not any([_selects(selector, layer) for layer in layers]):
                raise ValueError(_nothing_text(model, layers, option, selector))
    if not (include or exclude):
        return layers
    left = [layer for layer in layers if is_selected(layer, include, exclude)]
    if not left:
        raise ValueError(f"include and exclude leave none of the {len(layers)} layers with running statistics")
    return left


def _selects(selector: Selector, layer: StatsLayer) -> bool:
    if isinstance(selector, nn.Module):
        return any(module is layer.module for module in selector.modules())
    if isinstance(selector, str):
        return any(_matches(selector, name) for name in layer.names)
    return any(selector(name, layer.module) for name in layer.names)


def _matches(pattern: str, name: str) -> bool:
    """Whether the pattern names the layer or a container around it."""
    if fnmatchcase(name or "(root)", pattern) or fnmatchcase(name, pattern):
        return True
    return any(fnmatchcase(name[:end], pattern) for end, char in enumerate(name) if char == ".")


def _nothing_text(model: nn.Module, layers: list[StatsLayer], option: str, selector: Selector) -> str:
    number = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
    if isinstance(selector, nn.Module):
        inside = any(module is selector for module in model.modules())
        what = "has no layer with running statistics in it" if inside else "is not a part of the model"
        return f"{option}: the given {type(selector).__name__} {what}"
    if not isinstance(selector, str):
        return f"{option}: the predicate selects none of the {number} with running statistics"
    if any(_matches(selector, name) for name in walk_names(model)):
        return f"{option}={selector!r} matches modules, but none of the {number} with running statistics"
    names = [name for layer in layers for name in layer.names]
    containers = [name[:end] for name in names for end, char in enumerate(name) if char == "."]
    nearest = difflib.get_close_matches(selector, dict.fromkeys([*names, *containers]), n=3, cutoff=0.4)
    hint = f"; close names are {', '.join(nearest)}" if nearest else f"; the first ones are {', '.join(names[:3])}"
    return f"{option}={selector!r} matches none of the {number} with running statistics{hint}"
