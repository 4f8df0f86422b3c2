"""How often the host waits for the device: never at entry and inside, once at exit.

Counted on an emulated device, which sees every operation, and on a GPU where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_same_bits, state_of
from tests.devices import EmulatedDevice, emulated_device
from tests.nets import OwnForward, deep_net, images

POLICIES: dict[str, dict[str, Any]] = {
    **{policy: {"on_change": policy} for policy in ("raise", "warn", "restore", "rollback")},
    "running": {"use_running_stats": True},
    "running-restore": {"on_change": "restore", "use_running_stats": True},
}
EACH_POLICY = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES.keys())
EACH_DEPTH = pytest.mark.parametrize("layers", [1, 50])


@dataclass
class Reads:
    """How often the host waited for the device."""

    at_entry: int = 0
    inside: int = 0
    at_exit: int = 0


def count_reads(
    net: nn.Module, options: dict[str, Any], work: Callable[[nn.Module, Tensor], object], *, entries: int = 1
) -> Reads:
    """Runs ``work`` in a block on an emulated device; of a guard that is used again, counts in the last block."""
    with emulated_device() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        guard, input = bnguard.frozen(put_on(device, net), **options), images()
        device.put(input)
        for _ in range(entries):
            reads = Reads()
            device.reads.clear()
            guard.__enter__()
            reads.at_entry = device.reads.total()
            with suppress(bnguard.StatsChangedError):
                work(net, input)
            reads.inside = device.reads.total() - reads.at_entry
            with suppress(bnguard.StatsChangedError):
                guard.__exit__(None, None, None)
            reads.at_exit = device.reads.total() - reads.at_entry - reads.inside
    return reads


def put_on(device: EmulatedDevice, net: nn.Module) -> nn.Module:
    """Puts parameters and buffers of a net on the device."""
    device.put(*net.parameters(), *net.buffers())
    return net


def train(net: nn.Module, input: Tensor) -> None:
    """A train step."""
    net.train()(input).sum().backward()


def evaluate(net: nn.Module, input: Tensor) -> None:
    """An evaluation."""
    with torch.no_grad():
        net.eval()(input)


def write(net: nn.Module, input: Tensor) -> None:
    """A write that no hook sees."""
    next(net.buffers()).data.add_(1)


@EACH_DEPTH
@pytest.mark.parametrize("entries", [1, 3])
@EACH_POLICY
def test_block_reads_once_at_exit(options: dict[str, Any], entries: int, layers: int) -> None:
    """Whatever the policy and however deep the net, a block that finds nothing waits once, at its end."""
    assert count_reads(deep_net(layers), options, evaluate, entries=entries) == Reads(at_exit=1)


@EACH_DEPTH
@pytest.mark.parametrize("policy", POLICIES)
def test_training_step_reads_once_at_exit(policy: str, layers: int) -> None:
    """So does a train step: held, stopped, with updates that are kept, and with updates that are put back."""
    assert count_reads(deep_net(layers), POLICIES[policy], train) == Reads(at_exit=1)


@EACH_DEPTH
@EACH_POLICY
def test_finding_reads_no_layer_by_itself(options: dict[str, Any], layers: int) -> None:
    """What no hook saw takes one more: all values at once, to say what has changed and to put it back."""
    reads = count_reads(deep_net(layers), options, write)
    assert (reads.at_entry, reads.inside) == (0, 0)
    assert 1 <= reads.at_exit <= 2


@pytest.mark.parametrize("options", [POLICIES["restore"], POLICIES["running"]], ids=["restore", "running"])
def test_held_layer_with_a_forward_of_its_own_reads_once_at_exit(options: dict[str, Any]) -> None:
    """A layer whose updates cannot be predicted is not read inside either where it is held."""
    assert count_reads(nn.Sequential(OwnForward(2), OwnForward(2)), options, train) == Reads(at_exit=1)


@EACH_DEPTH
@pytest.mark.parametrize(
    "options",
    [
        {"affine": True},
        {"updates": 1},
        {"updates": 1, "on_change": "restore"},
        {"updates": 1, "on_change": "warn"},
        {"updates": 20},
        {"buffers": "all"},
    ],
    ids=str,
)
def test_other_options_read_no_more(options: dict[str, Any], layers: int) -> None:
    """Frozen weights and updates within a budget are compared together with the statistics."""
    for work in (evaluate, *[train] * ("updates" in options)):
        assert count_reads(deep_net(layers), options, work) == Reads(at_exit=1)
    assert count_reads(deep_net(layers), options, write).at_exit == 2


def test_write_before_an_update_within_the_budget_is_found_on_a_device() -> None:
    """The update built on what somebody else had written: it is put back, as on the CPU."""
    net, twin = deep_net(2), deep_net(2)
    with emulated_device() as device:
        guard, input = bnguard.frozen(put_on(device, net), updates=1), images()
        device.put(input)
        with pytest.raises(bnguard.StatsChangedError, match="running_mean"), guard:
            write(net, input)
            net(input)
    assert [change.names for change in guard.changes] == [("0",)]
    assert_same_bits(state_of(net[0]), state_of(twin[0]))
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("on_change", ["raise", "restore", "warn"])
def test_counters_on_the_host_are_compared_as_well(on_change: Any) -> None:
    """Where a model has some statistics on the device and others not."""
    net = deep_net(2)
    with emulated_device() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        device.put(*[buffer for buffer in net.buffers() if buffer.dim()])
        guard = bnguard.frozen(net, on_change)
        with suppress(bnguard.StatsChangedError), guard:
            net[1].num_batches_tracked.add_(1)
    assert [change.buffers for change in guard.changes] == [("num_batches_tracked",)]
    assert net[1].num_batches_tracked == (1 if on_change == "warn" else 0)


@EACH_POLICY
def test_emulated_device_gives_the_same_results(options: dict[str, Any]) -> None:
    """On the way that a device takes, statistics and findings are those of the CPU."""
    results = []
    for place in (emulated_device, no_device):
        net = deep_net(3)
        with place() as device, warnings.catch_warnings():
            warnings.simplefilter("ignore", bnguard.BNGuardWarning)
            guard, input = bnguard.frozen(put_on(device, net), **options), images()
            device.put(input)
            with suppress(bnguard.StatsChangedError), guard:
                with suppress(bnguard.StatsChangedError):
                    train(net, input)
                net[1].running_var.data[0] = float("nan")
                net[2].running_mean = torch.full((2,), 3.0)
        results.append((state_of(net), [repr(change) for change in guard.changes]))
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("on_change", ["raise", "restore", "warn"])
@pytest.mark.parametrize("returns", [False, True])
def test_conversion_between_updates_within_a_budget_is_found_as_on_the_cpu(on_change: Any, returns: bool) -> None:
    """The second update begins with statistics of another dtype than those that the first one has left.

    These may return afterwards, in the memory that they were in.
    """
    results = []
    for place in (emulated_device, no_device):
        net = deep_net(2)
        with place() as device, warnings.catch_warnings():
            warnings.simplefilter("ignore", bnguard.BNGuardWarning)
            guard, input = bnguard.frozen(put_on(device, net), on_change, updates=2), images()
            device.put(input)
            with suppress(bnguard.StatsChangedError), guard:
                net(input)
                old = {buffer: buffer.data for buffer in net[0].buffers() if buffer.is_floating_point()}
                for buffer, data in old.items():
                    buffer.data = data.double()
                with suppress(RuntimeError):  # of torch
                    net(input)
                for buffer, data in old.items() if returns else ():
                    buffer.data = data
        results.append((state_of(net), [repr(change) for change in guard.changes]))
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@contextmanager
def no_device() -> Iterator[EmulatedDevice]:
    """The CPU; what is put on the device stays there."""
    yield EmulatedDevice()


def test_emulated_device_counts() -> None:
    """The meter itself: each way to read a tensor of the device is seen once, and none of the host."""
    ways: list[Callable[[Tensor], object]] = [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: int(tensor[0]),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.equal(tensor, tensor + 1),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 1],
    ]
    for way in ways:
        with emulated_device() as device:
            way(torch.ones(3))
            assert not device.reads
            tensor = torch.ones(3)
            device.put(tensor)
            way(tensor * 2)
            assert device.reads.total() == 1
            copy = tensor.cpu()
            assert copy.is_cpu
            assert not tensor.is_cpu
            with pytest.raises(AssertionError, match="on the host and on the device"):
                torch.equal(copy, tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EACH_DEPTH
@EACH_POLICY
def test_gpu_waits_once_at_exit(options: dict[str, Any], layers: int) -> None:
    """The same on a GPU, by what torch says of each synchronisation."""
    net, input = deep_net(layers).cuda(), images().cuda()
    net.train()(input)
    counts = []

    @contextmanager
    def counted() -> Iterator[None]:
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))

    guard = bnguard.frozen(net, **options)
    with counted():
        guard.__enter__()
    with counted(), suppress(bnguard.StatsChangedError):
        train(net, input)
    with counted(), suppress(bnguard.StatsChangedError):
        guard.__exit__(None, None, None)
    assert counts == [0, 0, 1]
