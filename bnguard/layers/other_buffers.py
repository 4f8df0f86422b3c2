"""Find the buffers that forwards may move besides running statistics: codebooks, queues, observers, normalisers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from bnguard.layers.kinds import EXPORTED, OTHER_BUFFERS, OWN_FORWARD, StatsLayer, kind_of
from bnguard.layers.select import Selector, is_selected, matches, names_hint, select_layers
from bnguard.layers.tree import walk_modules
from bnguard.words import short_repr

ALL = "all"


def as_patterns(value: Any) -> tuple[str, ...]:
    """Checks the value of ``buffers``: ``"all"``, a pattern, or a collection of them.

    Raises:
        TypeError: It is anything else.
        ValueError: The collection is empty.
    """
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for pattern in several:
        if not isinstance(pattern, str):
            raise TypeError(
                'buffers takes "all", a glob pattern on the names of buffers in state_dict(), or a list of patterns, '
                f"got {short_repr(pattern)}"
            )
    if not several:
        raise ValueError('buffers is an empty list; leave it out, or give "all" for every buffer of the state dict')
    return tuple(several)


def other_buffers(model: nn.Module, layers: Iterable[StatsLayer]) -> list[StatsLayer]:
    """Lists the modules with buffers in ``state_dict()`` that are no running statistics, each with these buffers alone.

    Args:
        model: The model.
        layers: Its layers with running statistics.
    """
    known = {id(layer.module): layer.buffers for layer in layers}
    found: dict[int, StatsLayer] = {}
    for name, module in walk_modules(model):
        if id(module) in found:
            layer = found[id(module)]
            layer.names = tuple(dict.fromkeys((*layer.names, name)))
            continue
        omitted = {*known.get(id(module), ()), *module._non_persistent_buffers_set}
        names = [key for key, tensor in module._buffers.items() if tensor is not None and key not in omitted]
        if names:
            kind = kind_of(module)
            kind = kind if kind.hold == "none" or kind is EXPORTED else OTHER_BUFFERS
            found[id(module)] = StatsLayer(module, (name,), tuple(names), kind)
    return list(found.values())


def select_with_buffers(
    model: nn.Module,
    layers: Sequence[StatsLayer],
    patterns: Sequence[str],
    include: Sequence[Selector] = (),
    exclude: Sequence[Selector] = (),
    within: Sequence[str] = (),
) -> list[StatsLayer]:
    """Lists the layers that ``include``, ``exclude`` and ``within`` select, and what has buffers that patterns select.

    ``"all"`` selects the buffers of those modules that ``include`` selects; a pattern is about names alone.

    Args:
        model: The model.
        layers: Its layers with running statistics.
        patterns: The patterns.
        include: As in ``select_layers``, like the next two.
        exclude: See there.
        within: See there.

    Raises:
        ValueError: A pattern matches no buffer, a selector no layer, or no layer remains.
    """
    others = {id(layer.module): layer for layer in other_buffers(model, layers)}
    all_names = [full_name(name, key) for layer in others.values() for name in layer.names for key in layer.buffers]
    for pattern in patterns:
        if pattern != ALL and not any([matches(pattern, name) for name in all_names]):
            raise ValueError(_no_match_text(pattern, all_names))
    known = {id(layer.module) for layer in layers}
    everything = [*layers, *[layer for key, layer in others.items() if key not in known]]
    chosen = {id(layer.module) for layer in select_layers(model, everything, include, exclude, within)}
    result = []
    for layer in everything:
        key = id(layer.module)
        names: tuple[str, ...] = layer.buffers if key in chosen and key in known else ()
        kind = layer.kind
        more = [
            name
            for name in (others[key].buffers if key in others else ())
            if any([key in chosen if pattern == ALL else _matches(pattern, layer, name) for pattern in patterns])
        ]
        if more and (key in chosen or is_selected(layer, (), exclude, within)):
            # The prediction of a kind is about statistics alone.
            kind = others[key].kind if not names else OWN_FORWARD if kind.hold != "none" else kind
            names = (*names, *more)
        if names:
            result.append(StatsLayer(layer.module, layer.names, names, kind))
    return result


def full_name(name: str, buffer: str) -> str:
    """The name in ``state_dict()`` of a buffer of the module ``name``."""
    return f"{name}.{buffer}" if name else buffer


def _matches(pattern: str, layer: StatsLayer, buffer: str) -> bool:
    return any([matches(pattern, full_name(name, buffer)) for name in layer.names])


def _no_match_text(pattern: str, names: Sequence[str]) -> str:
    if not names:
        return f"buffers={pattern!r}: the model has no other buffers in state_dict() than its running statistics"
    what = f"buffers={pattern!r} matches none of the {len(names)} buffers besides running statistics"
    return f"{what}; {names_hint(pattern, names)}"
