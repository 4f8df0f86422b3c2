"""A layer family is one entry in ``layers/kinds.py``: everything else follows from what its kind says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.layers import kinds
from bnguard.layers.kinds import LayerKind
from bnguard.torch_internals import known_forwards
from tests.asserts import assert_clean, assert_same_bits


class Family(nn.Module):
    """Two flags decide whether it updates, and it counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.learns = True
        self.forwards = 0

    def forward(self, input: Tensor) -> Tensor:
        self.forwards += 1
        if self.training and self.learns:
            self.running_mean.lerp_(input.detach().mean(0), 0.1)
        return input - self.running_mean


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> LayerKind:
    """The entry: the kind, and the digest of the source that it was read from."""
    kind = LayerKind(lambda layer: layer.training and layer.learns, counts=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(kinds._STOCK, Family.forward, kind)
    known = known_forwards._KNOWN | {known_forwards.digest_of(inspect.getsource(Family.forward))}
    monkeypatch.setattr(known_forwards, "_KNOWN", known)
    return kind


@pytest.mark.usefixtures("family")
def test_family_is_stopped_before_it_runs() -> None:
    """Under raise its forward does not begin; where the flags say that it reads only, nothing is said."""
    layer = Family()
    with pytest.raises(bnguard.StatsChangedError, match="running_mean"), bnguard.frozen(layer) as guard:
        layer.learns = False
        layer(torch.ones(2, 3))
        layer.learns = True
        layer(torch.ones(2, 3))
    assert layer.forwards == 1
    assert guard.layers[0].protection == "checked before each forward; compared at exit"
    assert_clean(layer)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"on_change": "restore"}, 0),
        ({"use_running_stats": True}, 0),
        ({"updates": 1}, 1),
        ({"on_change": "rollback"}, 0),
    ],
    ids=str,
)
def test_family_is_guarded_under_every_policy(options: dict[str, Any], updates: int) -> None:
    """Its output is the twin's, and its statistics are those of as many updates as the policy leaves."""
    layer, twin, x = Family(), Family(), torch.rand(2, 3)
    with bnguard.frozen(layer, **options):
        output = layer(x)
    assert_same_bits(output, twin.train("use_running_stats" not in options)(x))
    assert_same_bits(layer.running_mean, twin.running_mean if updates else torch.zeros(3))
    assert layer.forwards == 1
    assert_clean(layer)


def test_without_the_entry_it_is_compared_after_each_forward() -> None:
    """A class that nobody has read is treated as a layer with a forward of its own."""
    layer = Family()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer) as guard:
        layer(torch.ones(2, 3))
    assert layer.forwards == 1
    assert guard.layers[0].protection == "compared after each forward; compared at exit"
    assert_same_bits(layer.running_mean, torch.zeros(3))


def test_kind_of_a_class_is_found_again() -> None:
    """The kinds of torch's own layers are those of the table."""
    expected = {
        nn.BatchNorm2d(2): kinds.BATCH_NORM,
        nn.SyncBatchNorm(2): kinds.SYNC_BATCH_NORM,
        nn.InstanceNorm2d(2, track_running_stats=True): kinds.INSTANCE_NORM,
        Family(): kinds.OWN_FORWARD,
    }
    for layer, kind in expected.items():
        assert kinds.statistics_of(layer)[1] is kind


class Normaliser(nn.Module):
    """A forward of its own, and one more buffer."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer(name, value)

    def forward(self, input: Tensor) -> Tensor:
        return input - self.running_mean


@pytest.mark.parametrize(
    ("name", "value", "is_counter"),
    [
        ("count", torch.tensor(1e-4), True),  # as normalisers of reinforcement learning have it
        ("num_steps", torch.zeros(1), True),
        ("steps", torch.tensor(0), True),
        ("initialised", torch.tensor(False), True),
        ("last", torch.tensor(0.0), False),
        ("momentum", torch.tensor(0.1), False),
        ("counts", torch.zeros(3), False),  # of what the layer saw, not of its batches
    ],
)
def test_counter_of_a_layer_is_held_with_its_mean(name: str, value: Tensor, is_counter: bool) -> None:
    """Other buffers of a layer with a forward of its own are not held."""
    assert bnguard.frozen(Normaliser(name, value)).layers[0].buffers == ("running_mean", name)[: 1 + is_counter]
