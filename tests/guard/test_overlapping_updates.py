"""Updates within a budget by forwards of several threads: whatever they leave together is what the block protects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.guard import updating
from bnguard.guard.block import Block
from tests.asserts import assert_clean, assert_same_bits, state_of, warns


class Scaled(nn.BatchNorm1d):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def in_thread(function: Callable[[], Any], seconds: float) -> threading.Thread:
    """Runs a function in a thread, and waits for its end, but not for longer than that."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(seconds)
    return thread


@pytest.mark.parametrize("begins_in", ["another thread", "this thread"])
def test_forward_that_begins_while_another_one_is_accepted(begins_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits; else one of the two would seem to have built on what nobody had accepted.

    A forward of this thread overlaps with one of another thread, whose end is the first to be accepted.
    """
    net = nn.Sequential(nn.BatchNorm1d(3))
    threads: list[threading.Thread] = []
    allowed, normalise = Block.allowed, updating.normalise_and_update

    def forward() -> None:
        net(torch.randn(4, 3))

    def late(block: Block, *args: Any) -> None:
        is_this = threading.current_thread() is threading.main_thread()
        if is_this is (begins_in == "this thread") and len(threads) == 1:
            threads.append(in_thread(forward, 0.2))
        allowed(block, *args)

    def overlapped(*args: Any) -> Any:
        if not threads:
            threads.append(threading.current_thread())
            in_thread(forward, 10)
        return normalise(*args)

    for _ in range(2):
        with bnguard.frozen(net, updates=100):
            forward()
    monkeypatch.setattr(Block, "allowed", late)
    monkeypatch.setattr(updating, "normalise_and_update", overlapped)
    with bnguard.frozen(net, updates=100) as guard:
        forward()
        threads[1].join(10)
        left = state_of(net)
    assert guard.changes == ()
    assert_same_bits(state_of(net), left)
    assert_clean(net)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, Scaled])
def test_forwards_of_three_threads_share_a_budget(layer: Any) -> None:
    """As many as they like to run at once."""
    net = nn.Sequential(layer(3))
    with bnguard.frozen(net, updates=450) as guard:
        threads = [threading.Thread(target=lambda: [net(torch.randn(4, 3)) for _ in range(150)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = state_of(net)
    assert guard.changes == ()
    assert_same_bits(state_of(net), left)


def test_one_of_several_forwards_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another thread gets to the next layer before the first one has said anything."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    change, calls = Block._change, []

    def late(block: Block, layer: Any) -> Any:
        calls.append(layer)
        if len(calls) == 1:
            in_thread(lambda: net(torch.randn(4, 3)), 10)
        return change(block, layer)

    monkeypatch.setattr(Block, "_change", late)
    with warns("net(torch.randn(8, 3))"), bnguard.frozen(net, "warn") as guard:
        net(torch.randn(8, 3))
    assert [change.updates for change in guard.changes] == [2, 2]
