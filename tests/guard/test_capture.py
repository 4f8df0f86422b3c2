"""A CUDA graph is being captured, where there is no GPU: torch says so, and that the net's tensors are on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import pytest
import torch
from torch import nn

import bnguard
from bnguard.guard.auto_guard import AutoGuard
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.phrases import FROZEN
from bnguard.guard.requests import GuardRequests
from tests.asserts import assert_clean, assert_same_bits, statistics, told, values
from tests.nets import OwnForward, images, warmed
from tests.policies import EVERY_POLICY, POLICIES

Capture: TypeAlias = Callable[[], AbstractContextManager[None]]

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
    "own": OwnForward,
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """A block in which a CUDA graph is captured, as far as torch tells Python."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)

    @contextmanager
    def during() -> Iterator[None]:
        capturing.append(True)
        try:
            yield
        finally:
            capturing.pop()

    return during


@EVERY_NORM
@EVERY_POLICY
def test_no_block_begins_in_a_capture(policy: str, norm: str, capture: Capture) -> None:
    """It would have to copy statistics, which would become part of the graph."""
    net = nn.Sequential(warmed(NORMS[norm](2)))
    guard = bnguard.frozen(net, **POLICIES[policy])
    with (
        capture(),
        pytest.raises(bnguard.BNGuardError, match=r"^frozen.. cannot begin.* while a CUDA graph is captured"),
        guard,
    ):
        pytest.fail("the block has begun")
    assert_clean(net)
    with guard:  # it can be used again
        pass


@EVERY_NORM
@EVERY_POLICY
def test_block_that_ends_in_a_capture_leaves_nothing(policy: str, norm: str, capture: Capture) -> None:
    """It cannot compare, and says so; the guards are gone all the same."""
    net = nn.Sequential(warmed(NORMS[norm](2)))
    guard = bnguard.frozen(net, **POLICIES[policy]).start()
    with capture(), pytest.raises(bnguard.BNGuardError, match=r"cannot begin, compare or end"):
        guard.stop()
    assert_clean(net)


def test_check_in_a_capture_is_refused_and_the_block_goes_on(capture: Capture) -> None:
    """What moves afterwards is still found."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2)))
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore") as guard:
        with capture(), pytest.raises(bnguard.BNGuardError, match="CUDA graph"):
            guard.check()
        net[0].running_mean.add_(1)
    assert_same_bits(statistics(net), before)
    assert len(said.warnings) == 1


@EVERY_NORM
def test_forward_in_a_capture_under_raise(norm: str, capture: Capture) -> None:
    """A layer of torch raises, which ends the capture; what another one writes is put back at the end."""
    net = nn.Sequential(warmed(NORMS[norm](2)))
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net):
        with capture():
            net(images())
        assert norm == "own"
        assert str(statistics(net)) != str(before), "a graph has to hold what the layer does"
    assert said.error is not None
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_NORM
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("raise", "budget")])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_graph_holds_the_plain_forward(mode: str, policy: str, norm: str, capture: Capture) -> None:
    """Nothing of the guard is in the graph; what the forward wrote is put back at the end, or warned about."""
    net, twin = (nn.Sequential(warmed(NORMS[norm](2))).train(mode == "train") for _ in range(2))
    before, x = values(statistics(net)), images()
    with told() as said, bnguard.frozen(net, **POLICIES[policy]):
        with capture():
            output = net(x)
        assert_same_bits(output, twin(x))
        assert_same_bits(statistics(net), statistics(twin))
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)
    assert bool(said.warnings) == (str(statistics(twin)) != str(before))
    assert_clean(net)


def test_model_that_first_runs_in_a_capture_is_guarded_at_its_next_forward(capture: Capture) -> None:
    """Guards of every model, as ``bnguard run --frozen`` puts them, wait for the end of the capture in silence."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2)))
    before = values(statistics(net))
    requests = GuardRequests()
    guard = AutoGuard(requests, Settings("restore", frontend=Frontend(FROZEN, is_outermost=True)))
    guard.begin()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with capture(), torch.no_grad():
                net.eval()(images())
            net.train()(images())
        assert_same_bits(statistics(net), before)
    finally:
        guard.end(for_good=True)
        requests.end(None)
