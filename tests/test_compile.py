"""``torch.compile``: what a graph updates is held, or found at the end of the block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, warns

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
HOLDS = pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"use_running_stats": True}], ids=["restore", "running"]
)


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_net() -> nn.Sequential:
    """One layer of each kind of update."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4), Doubled(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), *norms)


def make_input() -> torch.Tensor:
    """A batch."""
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    """Graphs made since the test began."""
    return int(counters["stats"]["unique_graphs"])


@BACKENDS
@HOLDS
def test_warm_graph_is_held_with_one_more_graph(backend: str, options: dict[str, Any]) -> None:
    """A model compiled before is held in any number of blocks, and runs its old graph outside; no graph breaks."""
    net, x = make_net(), make_input()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    compiled(x)
    for _ in range(3):
        before = state_of(net)
        with bnguard.frozen(net, **options):
            compiled(x)
        assert_same_bits(net.state_dict(), before)
        compiled(x)
    assert graphs() == 2
    compiled_twin = torch.compile(twin, backend=backend, fullgraph=True)
    for _ in range(4):
        compiled_twin(x)
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert_clean(net)


@BACKENDS
def test_update_of_a_graph_is_found_at_the_end(backend: str) -> None:
    """Under raise the end of the block names the layers and puts back; under warn it warns and lets stand."""
    net, x = make_net(), make_input()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    compiled(x)
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError, match=r"  1 \(BatchNorm2d\): running_mean"), bnguard.frozen(net):
        compiled(x)
    assert_same_bits(net.state_dict(), before)
    with warns(), bnguard.frozen(net, "warn") as guard:
        compiled(x)
    assert {change.updates for change in guard.changes} == {0}
    assert net[1].num_batches_tracked == before["1.num_batches_tracked"] + 1


def test_model_compiled_inside_trains_on_after_the_block() -> None:
    """A graph that was traced inside a block does not outlive it."""
    net, x = make_net(), make_input()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        compiled(x)
    compiled(x)
    twin(x)
    assert_same_bits(net[1].num_batches_tracked, twin[1].num_batches_tracked)
    assert not torch.equal(net[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize("own", [False, True], ids=["stock", "own-forward"])
@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"on_change": "restore"}, False),
        ({"use_running_stats": True}, False),
        ({"on_change": "raise"}, True),
        ({"on_change": "warn"}, True),
        ({"on_change": "restore", "updates": 1}, True),
    ],
    ids=["restore", "running", "raise", "warn", "budget"],
)
def test_traced_forward_holds_or_lets_pass(
    options: dict[str, Any], moves: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a graph is traced nothing is judged, counted or recorded: a forward is held, or is the layer's own."""
    for layer in (Doubled(3) if own else nn.BatchNorm2d(3), nn.SyncBatchNorm(3), patched(nn.BatchNorm2d(3))):
        before, x = state_of(layer), torch.randn(4, 3, 2, 2)
        guard = bnguard.frozen(layer, **options).start()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            layer(x)
        assert (layer.num_batches_tracked == before["num_batches_tracked"] + 1) == moves
        assert guard.changes == ()
        layer.load_state_dict(before)
        guard.stop()


def patched(layer: nn.Module) -> nn.Module:
    """With a forward that somebody put on the instance."""
    own = layer.forward
    layer.forward = lambda input: own(input)
    return layer


def test_traced_forward_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose mean and variance the user took away keeps to the batch, traced or not."""
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    expected = nn.BatchNorm2d(3)(x)
    layer.running_mean = layer.running_var = None
    for compiling in (False, True):
        with monkeypatch.context() as patch, bnguard.frozen(layer, "restore"):
            patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            assert_same_bits(layer(x), expected)
    assert layer.num_batches_tracked == 0
