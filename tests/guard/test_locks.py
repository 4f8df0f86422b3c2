"""Two threads at the same point at the same moment: what each lock is for.

In each test both threads are made to meet at the point in question, if they can: with the lock the second one cannot
get there, and the first goes on after a moment.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.guard import affine as _affine
from bnguard.guard import hooks as _hooks
from bnguard.guard import policy as _policy
from bnguard.layers import swaps as _swaps
from bnguard.layers import tree as _tree
from tests.asserts import assert_clean, assert_same_bits, state_of


class Meeting:
    """A point where threads wait for each other, but not for long."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def wait(self) -> None:
        """Goes on when both are here, or after a moment."""
        with contextlib.suppress(threading.BrokenBarrierError):
            self._barrier.wait(0.3)


def run_both(*functions: Callable[[], Any]) -> None:
    """Runs the functions in a thread each; raises what any of them raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_budget_is_never_spent_twice() -> None:
    """Two threads that ask at the same moment share a budget of one: one update stands."""
    meeting = Meeting()

    class SlowCount(_policy.UpdateCount):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            meeting.wait()
            return value

    entry = _policy.PolicyEntry(None, _policy.POLICIES["restore"], 1, _policy.Counts({0: SlowCount()}))
    actions: list[str] = []
    run_both(*[lambda: actions.append(_policy.decide_and_count([entry], 0).action)] * 2)
    assert sorted(actions) == ["hold", "update"]


def test_no_entry_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks that open on one layer at the same moment both have their entry on it; both gone, it is clean."""
    meeting, sync = Meeting(), _hooks.LayerGuard.sync

    def slow(guard: _hooks.LayerGuard, rulings: _policy.Rulings) -> None:
        meeting.wait()
        sync(guard, rulings)

    norm = nn.BatchNorm2d(3)
    layer = _tree.find_layers(norm)[0]
    entries = [_policy.PolicyEntry(None, _policy.POLICIES["restore"]) for _ in range(2)]
    guards: list[list[_hooks.LayerGuard]] = [[], []]
    with monkeypatch.context() as patch:
        patch.setattr(_hooks.LayerGuard, "sync", slow)
        run_both(*[lambda i=i: _hooks.add_entry([layer], entries[i], guards[i]) for i in range(2)])
        guard = _hooks.guard_of(norm)
        assert guard is not None
        assert set(guard.ruling.entries) == set(entries)
        meeting = Meeting()
        run_both(*[lambda i=i: _hooks.drop_entry(guards[i], entries[i], norm) for i in range(2)])
    assert _hooks.guard_of(norm) is None
    assert_clean(norm)


def test_affine_parameter_is_held_until_the_last_one_lets_go() -> None:
    """Two holds taken at the same moment: the first release changes nothing, the second gives all back."""
    meeting = Meeting()

    class SlowParameter:
        def __init__(self) -> None:
            self.flag = True
            self.grad: torch.Tensor | None = torch.ones(2)
            self.shape, self.dtype, self.device = self.grad.shape, self.grad.dtype, self.grad.device

        @property
        def requires_grad(self) -> bool:
            flag = self.flag
            meeting.wait()
            return flag

        @requires_grad.setter
        def requires_grad(self, value: bool) -> None:
            self.flag = value

    parameter: Any = SlowParameter()
    gradient = parameter.grad
    holds = [_affine.AffineHold() for _ in range(2)]
    run_both(*[lambda hold=hold: hold.take([parameter]) for hold in holds])
    holds[0].release()
    assert (parameter.flag, parameter.grad) == (False, None)
    holds[1].release()
    assert parameter.flag
    assert parameter.grad is gradient


def test_swap_is_undone_by_the_last_one() -> None:
    """Two forwards that swap the statistics at the same moment put them back once, when both are through."""
    meeting = Meeting()

    class SlowTensors(dict[str, torch.Tensor]):
        def __iter__(self) -> Any:
            meeting.wait()
            return super().__iter__()

    layer = nn.BatchNorm2d(3)
    mean, seen = layer.running_mean, []

    def run() -> None:
        with _swaps.swapped(layer, SlowTensors(running_mean=torch.ones(3))):
            seen.append(layer.running_mean)
            assert _swaps.own_tensors(layer, "_buffers")["running_mean"] is mean

    run_both(run, run)
    assert layer.running_mean is mean
    assert len(seen) == 2
    assert not any(tensor is mean for tensor in seen)


@pytest.mark.parametrize("is_late", [False, True])
def test_interrupted_swap_is_undone(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before or after putting back does not leave other statistics in the layer."""
    layer = nn.BatchNorm2d(3)
    mean, leave = layer.running_mean, _swaps.end_swap
    interrupts = [KeyboardInterrupt()]

    def interrupted(module: nn.Module, user: object) -> None:
        if is_late or not interrupts:
            leave(module, user)
        if interrupts:
            raise interrupts.pop()

    monkeypatch.setattr(_swaps, "end_swap", interrupted)
    with pytest.raises(KeyboardInterrupt), _swaps.swapped(layer, {"running_mean": torch.ones(3)}, {"training": False}):
        assert not layer.training
    assert layer.running_mean is mean
    assert layer.training
    assert not _swaps.swaps


def test_guards_of_many_threads_leave_nothing_behind() -> None:
    """Blocks that open and close all the time in several threads lose none of each other's claims."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before, interval = state_of(net), sys.getswitchinterval()

    def run() -> None:
        for _ in range(150):
            with bnguard.frozen(net, "restore", affine=True):
                net(torch.ones(2, 2))

    sys.setswitchinterval(1e-6)
    try:
        run_both(*[run] * 4)
    finally:
        sys.setswitchinterval(interval)
    assert_same_bits(net.state_dict(), before)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert_clean(net)
