"""Two threads at the same point at the same moment: what each lock is for.

In each test both threads are made to meet at the point in question, if they can: with the lock the second one cannot
get there, and the first goes on after a moment.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, KeysView
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.guard import affine as _affine
from bnguard.guard import attach as _attach
from bnguard.guard import hold as _hold
from bnguard.guard import layer_guard as _sentry
from bnguard.guard import policy as _claims
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

    class SlowClaim(_claims.Claim):
        @property
        def spent(self) -> int:
            value: int = self.__dict__.get("spent_so_far", 0)
            meeting.wait()
            return value

        @spent.setter
        def spent(self, value: int) -> None:
            self.__dict__["spent_so_far"] = value

    claim = SlowClaim(None, 0, "restore", 1)
    verdicts: list[str] = []
    run_both(*[lambda: verdicts.append(_claims.settle([claim]).stance)] * 2)
    assert sorted(verdicts) == ["restore", "stand"]


def test_no_claim_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks that open on one layer at the same moment both have their claim on it; both gone, it is clean."""
    meeting, set_claims = Meeting(), _sentry.Sentry.set_claims

    def slow(sentry: _sentry.Sentry, *claims: Any) -> None:
        meeting.wait()
        set_claims(sentry, *claims)

    norm = nn.BatchNorm2d(3)
    layer = _tree.find_layers(norm)[0]
    claims = [_claims.Claim(None, 0, "restore", 0) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(_sentry.Sentry, "set_claims", slow)
        run_both(*[lambda claim=claim: _attach.attach([layer], [claim]) for claim in claims])
        assert set(_sentry.sentries[id(norm)].claims) == set(claims)
        meeting = Meeting()
        run_both(*[lambda claim=claim: _attach.detach([layer], [claim], norm) for claim in claims])
    assert id(norm) not in _sentry.sentries
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


def test_exchange_is_undone_by_the_last_one() -> None:
    """Two forwards that exchange the statistics at the same moment put them back once, when both are through."""
    meeting = Meeting()

    class SlowState(dict[str, Any]):
        def __iter__(self) -> Any:
            return super().__iter__()

        def keys(self) -> KeysView[str]:
            meeting.wait()
            return super().keys()

    layer = nn.BatchNorm2d(3)
    buffers, seen = layer._buffers, []
    exchanges = []
    for _ in range(2):
        exchange = _hold.Exchange(layer, {"running_mean": torch.ones(3)}, None, lambda: seen.append(layer.running_mean))
        exchange._state = SlowState(exchange._state)
        exchanges.append(exchange)
    run_both(*[exchange.forward for exchange in exchanges])
    assert layer._buffers is buffers
    assert len(seen) == 2
    assert not any(tensor is buffers["running_mean"] for tensor in seen)


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
