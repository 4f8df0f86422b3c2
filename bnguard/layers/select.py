"""Select the layers that a guard protects: ``include`` and ``exclude``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from bnguard.layers.kinds import StatsLayer
from bnguard.layers.tree import walk_names
from bnguard.words import first_of, short_repr

Selector: TypeAlias = str | nn.Module | type[nn.Module] | Callable[[str, nn.Module], bool]
"""One entry of ``include`` or ``exclude``: a pattern on names, a module, a class of layers, or a predicate."""


def as_selectors(option: str, value: Any) -> tuple[Selector, ...]:
    """Checks the value of ``include`` or ``exclude``, which is one selector or a collection of them.

    Raises:
        TypeError: A selector is neither a pattern, a module, a class of modules nor a predicate.
        ValueError: The collection is empty.
    """
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for selector in several:
        is_other_class = isinstance(selector, type) and not issubclass(selector, nn.Module)
        if is_other_class or not (isinstance(selector, (str, nn.Module)) or callable(selector)):
            raise TypeError(
                f"{option} takes glob patterns on layer names, modules, classes of layers (nn.BatchNorm2d), predicates "
                f"(name, module) -> bool, or a list of them, got {short_repr(selector)}"
            )
    if not several:
        raise ValueError(f"{option} is an empty list; leave it out to mean every layer")
    return tuple(several)


def is_within(layer: StatsLayer, paths: Sequence[str]) -> bool:
    """Whether a layer is one of the submodules at ``paths`` or inside one; always True if ``paths`` is empty."""
    return not paths or any([f"{name}.".startswith(f"{path}.") for name in layer.names for path in paths])


def is_selected(
    layer: StatsLayer, include: Sequence[Selector], exclude: Sequence[Selector], within: Sequence[str] = ()
) -> bool:
    """Whether ``include``, ``exclude`` and ``within`` select a layer."""
    if not is_within(layer, within):
        return False
    is_included = not include or any([_selects(selector, layer) for selector in include])
    return is_included and not any([_selects(selector, layer) for selector in exclude])


def select_layers(
    model: nn.Module,
    layers: list[StatsLayer],
    include: Sequence[Selector],
    exclude: Sequence[Selector],
    within: Sequence[str] = (),
) -> list[StatsLayer]:
    """Lists the layers that ``include``, ``exclude`` and ``within`` select.

    Raises:
        ValueError: A selector matches no layer, or no layer remains.
    """
    if within:
        layers = [layer for layer in layers if is_within(layer, within)]
    if not layers:
        return []
    for option, selectors in (("include", include), ("exclude", exclude)):
        for selector in selectors:
            if not any([_selects(selector, layer) for layer in layers]):
                raise ValueError(_no_match_text(model, layers, option, selector))
    if not (include or exclude):
        return layers
    left = [layer for layer in layers if is_selected(layer, include, exclude)]
    if not left:
        raise ValueError(f"include and exclude leave none of the {len(layers)} layers with running statistics")
    return left


def _selects(selector: Selector, layer: StatsLayer) -> bool:
    if isinstance(selector, nn.Module):
        return any(module is layer.module for module in selector.modules())
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    if isinstance(selector, str):
        return any(matches(selector, name) for name in layer.names)
    return any(selector(name, layer.module) for name in layer.names)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob pattern matches the name of a layer or of a container around it."""
    if fnmatchcase(name or "(root)", pattern) or fnmatchcase(name, pattern):
        return True
    return any(fnmatchcase(name[:end], pattern) for end, char in enumerate(name) if char == ".")


def _no_match_text(model: nn.Module, layers: list[StatsLayer], option: str, selector: Selector) -> str:
    number = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
    if isinstance(selector, nn.Module):
        inside = any(module is selector for module in model.modules())
        what = "has no layer with running statistics in it" if inside else "is not a part of the model"
        return f"{option}: the given {type(selector).__name__} {what}"
    if isinstance(selector, type):
        kinds = first_of(sorted({type(layer.module).__name__ for layer in layers}))
        what = f"selects none of the {number} with running statistics"
        return f"{option}={selector.__name__} {what}; their classes are {kinds}"
    if not isinstance(selector, str):
        return f"{option}: the predicate selects none of the {number} with running statistics"
    if any(matches(selector, name) for name in walk_names(model)):
        return f"{option}={selector!r} matches modules, but none of the {number} with running statistics"
    names = [name for layer in layers for name in layer.names]
    containers = [name[:end] for name in names for end, char in enumerate(name) if char == "."]
    hint = names_hint(selector, names, containers)
    return f"{option}={selector!r} matches none of the {number} with running statistics; {hint}"


def names_hint(pattern: str, names: Sequence[str], more: Sequence[str] = ()) -> str:
    """Which names are close to a pattern that matches none of them, or of some more; else which are the first ones."""
    nearest = difflib.get_close_matches(pattern, dict.fromkeys([*names, *more]), n=3, cutoff=0.4)
    return f"close names are {', '.join(nearest)}" if nearest else f"the first ones are {', '.join(names[:3])}"
