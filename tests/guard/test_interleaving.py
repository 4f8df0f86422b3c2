"""Between any two lines of ours another block may end in the same thread: one in a generator that nobody uses any more.

The garbage collector closes it whenever it runs; a signal handler may do the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import bnguard
from bnguard.guard import affine as _affine
from tests.asserts import assert_clean, assert_same_bits, join_threads, start_threads, state_of

PACKAGE = str(Path(bnguard.__file__).parent)
IMAGES = torch.arange(72.0).reshape(4, 2, 3, 3)

Guard = Callable[[nn.Module], AbstractContextManager[Any]]


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def with_forward(norm: nn.Module) -> nn.Module:
    """The layer with a forward on the instance."""
    norm.forward = norm.forward  # type: ignore[method-assign]
    return norm


class Branches(nn.ModuleList):
    """Layers that all get the same."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(input) for layer in self]).sum(0)


def make_net() -> Branches:
    """Layers of each way to be held."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(2), OwnForward(2), with_forward(nn.BatchNorm2d(2))]
    return Branches([*norms, nn.InstanceNorm2d(2, track_running_stats=True)])


class Between:
    """Calls something before the ``target``-th line of bnguard, of those that run for the first time; counts them."""

    def __init__(self, action: Callable[[], None], target: int | None) -> None:
        self._action = action
        self._target = target
        self._seen: set[tuple[str, int]] = set()

    def __enter__(self) -> set[tuple[str, int]]:
        sys.settrace(self._enters)
        return self._seen

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enters(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in self._seen:
            if len(self._seen) == self._target:
                sys.settrace(None)
                self._action()
            self._seen.add(place)
        return self._line


GUARDS: dict[str, Guard] = {
    "raise": lambda net: bnguard.frozen(net, updates=2),
    "restore": lambda net: bnguard.frozen(net, "restore"),
    "budget": lambda net: bnguard.frozen(net, "restore", updates=1),
    "running": lambda net: bnguard.frozen(net, use_running_stats=True),
    "affine": lambda net: bnguard.frozen(net, "restore", affine=True),
    "recompute": bnguard.recompute_frozen,
    "watch": lambda net: bnguard.watch(net, every=1),
    "watch-all": lambda net: bnguard.watch(),
}
HOLDING = {"restore", "running", "affine"}
PAIRS = [
    *[(name, name) for name in GUARDS],
    ("restore", "watch-all"),
    ("watch", "watch-all"),
    ("raise", "budget"),
    ("budget", "raise"),
    ("restore", "running"),
    ("running", "affine"),
    ("affine", "recompute"),
]
SLOW = pytest.mark.slow


def batches(guard: AbstractContextManager[Any]) -> Iterator[int]:
    """Yields in a block."""
    with guard:
        yield 0


def run(name: str, other: str, target: int | None, *, is_same: bool = False) -> tuple[nn.Module, int]:
    """A step inside a block, in the midst of which another block ends; the net, and how many lines there were."""
    net = make_net()
    guard = GUARDS[name](net)
    abandoned = batches(guard if is_same else GUARDS[other](net))
    next(abandoned)
    between = Between(abandoned.close, target)
    with between as seen, guard:
        net(IMAGES.clone().requires_grad_()).sum().backward()
    abandoned.close()
    return net, len(seen)


def assert_sound(net: nn.Module, *, is_held: bool) -> None:
    """Nothing is left, and each layer is as before, or as after one update where it may."""
    assert_clean(net)
    before, after = states()
    for layer, old, new in zip(net.children(), before, after, strict=True):
        assert same(state_of(layer), old) or (not is_held and same(state_of(layer), new)), layer
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not torch_module._global_forward_pre_hooks
    assert not _affine._held


@cache
def states() -> list[list[dict[str, torch.Tensor]]]:
    """Those of the layers before and after one update."""
    before, after = make_net(), make_net()
    after(IMAGES)
    return [[state_of(layer) for layer in net.children()] for net in (before, after)]


def same(one: Any, other: Any) -> bool:
    """Whether they have the same bits."""
    try:
        assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "other"), [("watch", "restore"), *[pytest.param(*pair, marks=SLOW) for pair in PAIRS]]
)
def test_another_block_may_end_between_any_lines(name: str, other: str) -> None:
    """Nothing hangs, nothing is left, and a guard that holds does."""

    def every_line() -> None:
        _, lines = run(name, other, None)
        assert lines > 50
        for target in range(lines):
            net, _ = run(name, other, target)
            assert_sound(net, is_held=name in HOLDING)

    join_threads(start_threads(every_line), 100)


@pytest.mark.parametrize("name", ["affine", *[pytest.param(name, marks=SLOW) for name in ("restore", "budget")]])
def test_another_block_of_the_same_guard_may_end_between_any_lines(name: str) -> None:
    """The two end in the order in which they began: the later one is left first, whoever leaves it."""

    def every_line() -> None:
        _, lines = run(name, name, None, is_same=True)
        for target in range(lines):
            net, _ = run(name, name, target, is_same=True)
            assert_sound(net, is_held=name in HOLDING)

    join_threads(start_threads(every_line), 100)
