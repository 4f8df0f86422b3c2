"""One model of the zoo: how to build it, and what to feed it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Case", "Inputs", "by_turns", "call", "images"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One model.

    Attributes:
        name: Unique in its library.
        build: Makes it with random weights, in train mode or not.
        inputs: Given the model, the ways to make its inputs; the first that its forward takes is used. They are called
            after seeding, so that each call makes the same.
        skip: Why it cannot be run at all, if so.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Iterable[Callable[[], Inputs]]]
    skip: str = ""


def call(*args: Any, **kwargs: Any) -> Inputs:
    """The inputs of ``model(*args, **kwargs)``."""
    return Inputs(args, kwargs)


def images(*sizes: int, channels: int = 3, batch: int = 2) -> Callable[[nn.Module], Iterator[Callable[[], Inputs]]]:
    """A batch of square images, of the first of ``sizes`` that the model takes."""

    def inputs(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
        for size in sizes:
            yield lambda size=size: call(torch.randn(batch, channels, size, size))

    return inputs


def by_turns(names: Iterable[str], family: Callable[[str], str]) -> list[str]:
    """The names, the first of each family first, then the second: a run cut short has seen most kinds."""
    seen: Counter[str] = Counter()
    turns = []
    for name in names:
        turns.append((seen[family(name)], name))
        seen[family(name)] += 1
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]
