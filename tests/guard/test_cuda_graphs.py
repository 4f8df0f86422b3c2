"""CUDA graphs: one captured before a block runs no Python in it, one captured inside is left clean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, statistics, told, values
from tests.nets import OwnForward, images, warmed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("_deterministic"),
]
POLICIES: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
}
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
NORMS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True, affine=True),
    "own": OwnForward,
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same kernels for the net and its twin, and an idle device afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    torch.cuda.synchronize()


def make_net(norm: str = "BatchNorm2d") -> nn.Sequential:
    """One layer, on the GPU."""
    return nn.Sequential(warmed(NORMS[norm](2)), nn.ReLU()).cuda()


def warm_up(net: nn.Module, input: Tensor) -> None:
    """Runs the net on a side stream, as torch wants it before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            net(input)
    torch.cuda.current_stream().wait_stream(stream)


def capture(net: nn.Module, input: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one forward, and the tensor that it writes its output to."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = net(input)
    return graph, output


def prepare(norm: str, training: bool = True) -> tuple[nn.Sequential, Tensor]:
    """A warm net, and its input."""
    net, x = make_net(norm), images().cuda()
    warm_up(net, x)
    return net.train(training), x


def settle(twin: nn.Module, before: dict[str, Tensor]) -> None:
    """Gives an unguarded twin the statistics that a guard has kept."""
    with torch.no_grad():
        for name, tensor in statistics(twin).items():
            tensor.copy_(before[name])


@EVERY_NORM
@EVERY_POLICY
def test_graph_captured_before_is_found_at_the_end(norm: str, policy: str) -> None:
    """Its replays pass every guard by: the end of the block finds what they did. Outputs are the twin's all along."""
    (net, x), (twin, x_twin) = prepare(norm), prepare(norm)
    (graph, output), (graph_twin, output_twin) = capture(net, x), capture(twin, x_twin)
    before, objects = values(statistics(net)), statistics(net)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        for _ in range(2):
            graph.replay()
            graph_twin.replay()
            assert_same_bits(output, output_twin)
    is_stopped = policy in ("raise", "running")
    assert (said.error is None) == (not is_stopped)
    assert len(said.warnings) == (not is_stopped)
    assert "running statistics of 1 layer changed inside frozen():" in (said.error or said.warnings[0])
    assert [change.names for change in guard.changes] == [("0",)]
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)
    assert_clean(net)
    # The memory that the graph knows is still that of the statistics.
    settle(twin, values(statistics(net)))
    graph.replay()
    graph_twin.replay()
    assert_same_bits(output, output_twin)
    assert_same_bits(statistics(net), statistics(twin))


@EVERY_NORM
@EVERY_POLICY
def test_graph_of_an_eval_mode_net_is_no_finding(norm: str, policy: str) -> None:
    """One that does not update may be captured and replayed anywhere."""
    (net, x), (twin, x_twin) = prepare(norm, training=False), prepare(norm, training=False)
    before = values(statistics(net))
    graph, output = capture(net, x)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        graph.replay()
        graph_inside, output_inside = capture(net, x)
        graph_inside.replay()
    graph_twin, output_twin = capture(twin, x_twin)
    graph_twin.replay()
    assert_same_bits([output, output_inside], [output_twin, output_twin])
    assert (said.error, said.warnings, guard.changes) == (None, [], ())
    assert_same_bits(statistics(net), before)


@EVERY_NORM
@pytest.mark.parametrize("policy", ["restore", "running"])
def test_graph_captured_inside_moves_nothing_there(norm: str, policy: str) -> None:
    """A capture inside runs nothing; what its replays do is held, or undone at the end. The net is clean afterwards."""
    net, x = prepare(norm)
    before, objects = values(statistics(net)), statistics(net)
    with told(), bnguard.frozen(net, **POLICIES[policy]):
        graph, _ = capture(net, x)
        assert_same_bits(statistics(net), before)
        for _ in range(2):
            graph.replay()
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_NORM
@pytest.mark.parametrize("policy", ["warn", "restore", "running"])
def test_graph_captured_inside_is_the_twins_afterwards_or_warned_about(norm: str, policy: str) -> None:
    """After the block it updates as the twin's; if the guard were captured with it, a warning would have to say so."""
    (net, x), (twin, x_twin) = prepare(norm), prepare(norm)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]):
        graph, output = capture(net, x)
    graph_twin, output_twin = capture(twin, x_twin)
    settle(twin, values(statistics(net)))
    graph.replay()
    graph_twin.replay()
    if not said.warnings:
        assert_same_bits(output, output_twin)
        assert_same_bits(statistics(net), statistics(twin))


@EVERY_NORM
def test_capture_inside_under_raise_is_stopped(norm: str) -> None:
    """The error comes out of the capture, nothing has moved, and the device goes on working."""
    net, x = prepare(norm)
    before = values(statistics(net))
    with pytest.raises(bnguard.StatsChangedError, match=r"0 \(\w+\) is in train mode"), bnguard.frozen(net):
        capture(net, x)
    assert_same_bits(statistics(net), before)
    assert_clean(net)
    graph, output = capture(net.eval(), x)
    graph.replay()
    assert_same_bits(output, net(x))


def test_check_finds_a_replay_in_mid_block() -> None:
    """``check()`` waits for the device, finds the replay, and puts back."""
    net, x = prepare("BatchNorm2d")
    graph, _ = capture(net, x)
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore") as guard:
        graph.replay()
        guard.check()
        assert_same_bits(statistics(net), before)
        assert len(guard.changes) == 1
    assert len(said.warnings) == 1


@pytest.mark.parametrize("policy", ["raise", "restore"])
def test_graphed_callable_made_before_is_found_at_the_end(policy: str) -> None:
    """``make_graphed_callables`` replays in place of the net's forward; backward after the block is the twin's."""
    inputs = [images().cuda().requires_grad_() for _ in range(2)]
    net, twin = (torch.cuda.make_graphed_callables(make_net(), (x.detach().requires_grad_(),)) for x in inputs)
    before = values(statistics(net))
    settle(twin, before)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]):
        loss = net(inputs[0]).square().sum()
    loss.backward()
    twin(inputs[1]).square().sum().backward()
    assert (said.error is None) == (policy == "restore")
    assert_same_bits(statistics(net), before)
    assert_same_bits(inputs[0].grad, inputs[1].grad)
    assert_same_gradients(net, twin)


@EVERY_NORM
@pytest.mark.parametrize("policy", ["restore", "running"])
def test_forward_on_a_side_stream_is_held(norm: str, policy: str) -> None:
    """A forward on another stream gives the twin's output, and moves nothing, also where the block ends before it."""
    (net, x), (twin, x_twin) = prepare(norm), prepare(norm)
    before, stream = values(statistics(net)), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with bnguard.frozen(net, **POLICIES[policy]), torch.cuda.stream(stream):
            output = net(x)
        torch.cuda.synchronize()
        expected = twin.train(policy == "restore")(x_twin)
    assert_same_bits(output, expected)
    assert_same_bits(statistics(net), before)
