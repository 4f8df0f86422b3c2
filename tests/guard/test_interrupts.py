"""Wherever Python may raise KeyboardInterrupt while a block begins, runs or ends: nothing is left behind."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import bnguard
from bnguard.guard import affine as _affine
from bnguard.guard.block import Block
from bnguard.guard.hooks import guard_of
from tests.asserts import assert_clean, assert_same_bits, state_of

PACKAGE = str(Path(bnguard.__file__).parent)
IMAGES = torch.arange(72.0).reshape(4, 2, 3, 3)


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place where bnguard can be interrupted; counts the places.

    Python raises it at the beginning of a function, and after a call of one that is written in C. Each place counts the
    first time that it is reached. No garbage is collected meanwhile: Python drops what is raised then.
    """

    def __init__(self, target: int | None = None) -> None:
        self._target = target
        self.places: dict[tuple[str, int, str], None] = {}

    def __enter__(self) -> Interrupt:
        gc.disable()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_return") or frame.f_code is Interrupt.__exit__.__code__:
            return
        callers = [frame] if event == "c_return" else [frame, frame.f_back]
        if any(caller is not None and caller.f_code.co_filename.startswith(PACKAGE) for caller in callers):
            place = (frame.f_code.co_filename, frame.f_lineno, getattr(argument, "__qualname__", event))
            if place not in self.places:
                self.places[place] = None
                if len(self.places) - 1 == self._target:
                    raise KeyboardInterrupt


GUARDS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "affine": lambda net: bnguard.frozen(net, "restore", affine=True),
    "raise": lambda net: bnguard.frozen(net, updates=2),
    "warn": lambda net: bnguard.frozen(net, "warn"),
    "restore": lambda net: bnguard.frozen(net, "restore"),
    "rollback": lambda net: bnguard.frozen(net, "rollback"),
    "budget": lambda net: bnguard.frozen(net, "restore", updates=1),
    "running": lambda net: bnguard.frozen(net, use_running_stats=True),
    "deferred": lambda net: bnguard.frozen(net, "rollback", check="deferred"),
    "recompute": bnguard.recompute_frozen,
    "watch": lambda net: bnguard.watch(net, every=1),
    "watch-all": lambda net: bnguard.watch(),
}
KEPT: dict[str, Callable[[nn.Module], bnguard.frozen]] = {
    "raise": lambda net: bnguard.frozen(net),
    "updates": lambda net: bnguard.frozen(net, updates=2),
    "warn": lambda net: bnguard.frozen(net, "warn"),
    "restore": lambda net: bnguard.frozen(net, "restore"),
    "rollback": lambda net: bnguard.frozen(net, "rollback"),
    "running": lambda net: bnguard.frozen(net, use_running_stats=True, affine=True),
    "deferred": lambda net: bnguard.frozen(net, "rollback", check="deferred"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in KEPT if name != "raise"]
MOVES = {"raise", "warn", "budget", "recompute", "watch", "watch-all"}


def make_net() -> nn.Sequential:
    """A layer of each way to be held, with gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(2), OwnForward(2), nn.InstanceNorm2d(2, affine=True, track_running_stats=True))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return net


def interrupted(name: str, target: int | None = None) -> tuple[nn.Module, dict[str, torch.Tensor], list[Any]]:
    """A forward in a block that is interrupted at the n-th place; the net, its earlier state, and the places."""
    net = make_net()
    before, interrupt = state_of(net), Interrupt(target)
    with suppress(KeyboardInterrupt), interrupt, GUARDS[name](net):
        net(IMAGES)
    return net, before, list(interrupt.places)


@pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a generator of torch's is dropped
@pytest.mark.parametrize(
    "name", ["affine", *[pytest.param(name, marks=pytest.mark.slow) for name in GUARDS if name != "affine"]]
)
def test_interrupted_block_leaves_nothing(name: str) -> None:
    """Not even where the interrupt arrives before the first line of ``__exit__``, once the exception is handled."""
    interrupted(name)  # imports what is imported when it is first needed
    _, _, places = interrupted(name)
    assert len(places) > 50
    for target, place in enumerate(places):
        net, before, _ = interrupted(name, target)
        assert_clean(net)
        if name not in MOVES:
            assert_same_bits(state_of(net), before)
        for parameter in net.parameters():
            assert parameter.requires_grad, place
            assert_same_bits(parameter.grad, torch.ones_like(parameter))
        assert torch.is_grad_enabled(), place
        assert not torch_module._global_forward_pre_hooks, place
        assert not _affine._held, place
    other = threading.Thread(target=lambda: interrupted(name), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive(), "a lock was left behind"


@pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["raise", *SLOW])
def test_interrupted_guard_can_be_used_again(name: str) -> None:
    """What it has copied of the layers before an interrupt is not what they are compared with later."""
    net = make_net()
    guard = KEPT[name](net)
    for target in range(1000):
        interrupt = Interrupt(target)
        with suppress(KeyboardInterrupt), interrupt, guard:
            net.train(name != "raise")(IMAGES)
        guard.stop()
        net.train()(IMAGES + target)
        twin = copy.deepcopy(net).eval()
        with warnings.catch_warnings(), guard:
            warnings.simplefilter("error", bnguard.BNGuardWarning)
            assert_same_bits(net.eval()(IMAGES), twin(IMAGES))
        assert_same_bits(state_of(net), state_of(twin))
        if len(interrupt.places) <= target:
            break
    assert target > 50


def test_interrupted_watch_reports_what_it_has_seen() -> None:
    """An end that did not measure does not make a change of every layer."""
    net = make_net()
    record = bnguard.watch(net)
    with pytest.raises(KeyboardInterrupt), record:
        net(IMAGES)
        record._recorder.close = interrupt  # type: ignore[method-assign]
    assert_clean(net)
    assert not torch_module._global_forward_pre_hooks
    assert [update.count for update in record.updates] == [1, 1, 1]
    assert record.unexplained == ()
    assert len(record.drift) == 3
    with record:  # and it can record again
        pass
    assert record.updates == ()


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def test_guard_that_was_started_outlives_its_reference() -> None:
    """Only the block of a ``with`` statement ends with its guard."""
    net = make_net()
    before = state_of(net)
    bnguard.frozen(net, "restore").start()
    gc.collect()
    net(IMAGES)
    assert_same_bits(state_of(net), before)
    guard = guard_of(net[0])
    assert guard is not None
    block = guard.ruling.entries[0].block
    assert isinstance(block, Block)
    block.abandon()
    assert_clean(net)


def test_guard_whose_end_never_began_ends_with_it() -> None:
    """What is held in between is held; the statistics are put back."""
    net = make_net()
    before = state_of(net)
    guard = bnguard.frozen(net, "rollback", affine=True)
    guard.__enter__()
    net(IMAGES)
    del guard
    assert_clean(net)
    assert_same_bits(state_of(net), before)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_guard_whose_end_never_began_can_be_stopped() -> None:
    """As a guard that is kept in a variable, and whose ``__exit__`` was interrupted."""
    net = make_net()
    before = state_of(net)
    guard = bnguard.frozen(net, "rollback")
    guard.__enter__()
    net(IMAGES)
    assert "open" in repr(guard)
    guard.stop()
    assert_clean(net)
    assert_same_bits(state_of(net), before)


@pytest.mark.parametrize("how", ["kept", "stack", "generator", "decorated"])
def test_guard_in_use_is_not_ended_by_its_references(how: str) -> None:
    """A block lasts as long as the statement, the stack, the generator or the call that has it."""
    net = make_net()
    before = state_of(net)

    def check() -> None:
        gc.collect()
        net(IMAGES)
        assert_same_bits(state_of(net), before)
        assert "forward" in net[0].__dict__

    def steps() -> Iterator[None]:
        with bnguard.frozen(net, "restore"):
            yield

    if how == "kept":
        with bnguard.frozen(net, "restore"):
            check()
    elif how == "stack":
        with ExitStack() as stack:
            stack.enter_context(bnguard.frozen(net, "restore"))
            check()
    elif how == "generator":
        generator = steps()
        next(generator)
        check()
        generator.close()
    else:
        bnguard.frozen(net, "restore")(check)()
    assert_clean(net)
