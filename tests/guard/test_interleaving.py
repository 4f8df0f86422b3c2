"""Between any two lines of ours another block may end in the same thread: one in a generator that nobody uses any more.

The garbage collector closes it whenever it runs; a signal handler may do the same.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import bnguard
from bnguard.guard import affine as _affine
from bnguard.guard import hooks as _hooks
from tests.asserts import GuardedThread, assert_clean, assert_same_bits, join_threads, start_threads, state_of

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
    """Calls something before the n-th line of bnguard, of those that run for the first time; counts them.

    Then whatever traced before goes on, as a debugger or the measurement of coverage does.

    Args:
        actions: What to call, by n.
    """

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        self._actions = actions
        self._seen: set[tuple[str, int]] = set()

    def __enter__(self) -> set[tuple[str, int]]:
        self._previous = sys.gettrace()
        sys.settrace(self._enters)
        return self._seen

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _enters(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in self._seen:
            if (action := self._actions.get(len(self._seen))) is not None:
                sys.settrace(None)
                action()
                sys.settrace(self._enters)
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
    between = Between({} if target is None else {target: abandoned.close})
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


def overlap(layer: nn.Module, begins: int | None, ends: int | None) -> int:
    """Runs a forward of a layer, and another one from one of its lines to a later one; how many lines there were."""
    inside, may_end = threading.Event(), threading.Event()
    other = GuardedThread(lambda: layer(IMAGES))
    waits = 0.01  # the first forward may hold a lock that the other one needs

    def check(_: torch.Tensor) -> None:
        if threading.current_thread() is other:
            inside.set()
            may_end.wait()

    def begin() -> None:
        other.start()
        inside.wait(waits)

    def end() -> None:
        may_end.set()
        other.join(waits)

    layer._check_input_dim = check  # type: ignore[assignment]  # of this layer: the other forward waits in it
    if begins is None:
        begin()
    places = {} if ends is None else {ends: end}
    with Between(places if begins is None else {begins: begin, **places}) as seen:
        layer(IMAGES)
    may_end.set()
    join_threads([other])
    return len(seen)


@pytest.mark.parametrize("begins", ["before", pytest.param("anywhere", marks=SLOW)])
@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_overlapping_forward_may_begin_and_end_between_any_lines(kind: Callable[[int], nn.Module], begins: str) -> None:
    """Two forwards that normalise with the running statistics take turns as they like: neither updates."""
    layer = kind(2)
    before = state_of(layer)
    with bnguard.frozen(layer, use_running_stats=True):
        lines = overlap(layer, None, None)
        assert lines > 10
        for first in (None, *range(lines)) if begins == "anywhere" else (None,):
            for last in range(0 if first is None else first + 1, lines):
                overlap(layer, first, last)
                assert_same_bits(state_of(layer), before)
    assert_clean(layer)


@pytest.mark.parametrize("name", ["affine", *[pytest.param(name, marks=SLOW) for name in ("restore", "budget")]])
def test_another_block_of_the_same_guard_may_end_between_any_lines(name: str) -> None:
    """The two end in the order in which they began: the later one is left first, whoever leaves it."""

    def every_line() -> None:
        _, lines = run(name, name, None, is_same=True)
        for target in range(lines):
            net, _ = run(name, name, target, is_same=True)
            assert_sound(net, is_held=name in HOLDING)

    join_threads(start_threads(every_line), 100)


# Places in the middle of a line, which need no trace function.


class Watched(nn.Parameter):
    """A parameter that has something run whenever its flag is read or set, once."""

    action: Callable[[], None] | None = None

    def run(self) -> None:
        action, self.action = self.action, None
        if action is not None:
            action()

    @property
    def requires_grad(self) -> bool:
        self.run()
        return bool(super().requires_grad)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.run()
        torch.Tensor.requires_grad.__set__(self, value)


@pytest.mark.parametrize("is_short", [False, True])
def test_parameter_may_be_frozen_while_its_flag_is_read(is_short: bool) -> None:
    """By another block, which ends first, or in the middle as well: the last release restores flag and gradient."""
    parameter, holds = Watched(torch.ones(2)), [_affine.AffineHold() for _ in range(2)]
    parameter.grad = gradient = torch.ones(2)

    def take() -> None:
        holds[1].take([parameter])
        parameter.action = holds[1].release if is_short else None

    parameter.action = take
    holds[0].take([parameter])
    for hold in reversed(holds):
        assert (parameter.requires_grad, parameter.grad) == (False, None)
        hold.release()
    assert parameter.requires_grad
    assert parameter.grad is gradient
    assert not _affine._held


def test_parameter_may_be_frozen_while_it_is_released() -> None:
    """By another block: it stays frozen, and gets flag and gradient back from that one."""
    parameter, holds = Watched(torch.ones(2)), [_affine.AffineHold() for _ in range(2)]
    parameter.grad = gradient = torch.ones(2)
    holds[0].take([parameter])
    parameter.action = lambda: holds[1].take([parameter])
    holds[0].release()
    assert (parameter.requires_grad, parameter.grad) == (False, None)
    holds[1].release()
    assert parameter.requires_grad
    assert parameter.grad is gradient
    assert not _affine._held


def once(action: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``; before its first call ``action`` runs."""
    actions = [action]

    def wrapped(*args: Any) -> Any:
        if actions:
            actions.pop()()
        return function(*args)

    return wrapped


@pytest.mark.parametrize("action", ["begins", "ends"])
@pytest.mark.parametrize("method", ["sync", "put_forward"])
def test_another_block_may_begin_or_end_while_layers_get_an_entry(
    action: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are held until both have ended."""
    net = make_net()
    before, other = state_of(net), bnguard.frozen(net, "restore")
    if action == "ends":
        other.start()
    function = getattr(_hooks.LayerGuard, method)
    monkeypatch.setattr(
        _hooks.LayerGuard, method, once(getattr(other, {"begins": "start", "ends": "stop"}[action]), function)
    )
    with bnguard.frozen(net, "restore"):
        other.stop()
        net(IMAGES)
    assert_same_bits(state_of(net), before)
    assert_clean(net)


def test_another_block_may_begin_while_a_layer_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are held until it ends."""
    net = make_net()
    before, other = state_of(net), bnguard.frozen(net, "restore")
    monkeypatch.setattr(_hooks.LayerGuard, "remove", once(other.start, _hooks.LayerGuard.remove))
    with bnguard.frozen(net, "restore"):
        pass
    net(IMAGES)
    other.stop()
    assert_same_bits(state_of(net), before)
    assert_clean(net)


def test_layer_that_cannot_be_let_go_of_keeps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes out; the other layers are free."""
    net, sync = make_net(), _hooks.LayerGuard.sync
    guard = bnguard.frozen(net, "restore").start()

    def fails(guard: _hooks.LayerGuard, rulings: Any) -> None:
        if guard.module is net[0]:
            raise ZeroDivisionError
        sync(guard, rulings)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(_hooks.LayerGuard, "sync", fails)
        guard.stop()
    for layer in net[1:]:
        assert_clean(layer)
    with bnguard.frozen(net):
        pass
    assert_clean(net)


@pytest.mark.parametrize("place", [(_hooks.LayerGuard, "sync"), (_affine.AffineHold, "release")], ids=str)
def test_interrupt_at_the_end_of_a_block_leaves_nothing(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a layer is let go of: the others are let go of too, then that one, and the interrupt comes out."""
    net, (owner, name) = make_net(), place
    before = state_of(net)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), bnguard.frozen(net, "restore", affine=True):
        net(IMAGES)
        monkeypatch.setattr(owner, name, once(interrupt, getattr(owner, name)))
    assert_sound(net, is_held=True)
    assert_same_bits(state_of(net), before)


@pytest.mark.parametrize("how", ["stop", "check"])
def test_block_may_be_ended_by_another_thread_meanwhile(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``stop()`` and ``check()`` of a block that ends while they look for it do nothing."""
    net = make_net()
    before, guard = state_of(net), bnguard.frozen(net, "restore").start()
    innermost, ends = bnguard.frozen._innermost, [guard.stop]

    def looks_before(guard: bnguard.frozen) -> Any:
        block = innermost(guard)
        if ends:
            ends.pop()()
        return block

    monkeypatch.setattr(bnguard.frozen, "_innermost", looks_before)
    getattr(guard, how)()
    assert_clean(net)
    assert_same_bits(state_of(net), before)
