"""The copy of usual statistics, beside the general one: alike about every change, and about what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnguard.layers import snapshot
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.usual_copy import UsualCopy
from tests.asserts import assert_same_bits

NAMES = ("running_mean", "running_var", "num_batches_tracked")


def set_data(name: str, value: Tensor) -> Callable[[nn.Module], None]:
    """Gives a buffer another tensor's memory."""
    return lambda layer: setattr(getattr(layer, name), "data", value)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda layer: None,
    "the same values": lambda layer: layer.running_mean.mul_(1),
    "the mean": lambda layer: layer.running_mean[2].add_(1e-6),
    "the variance": lambda layer: layer.running_var.mul_(2),
    "the counter": lambda layer: layer.num_batches_tracked.add_(1),
    "minus zero": lambda layer: layer.running_mean.copy_(-torch.zeros(5)),
    "not a number": lambda layer: layer.running_mean.copy_(torch.full((5,), torch.nan)),
    "another dtype": lambda layer: layer.half(),
    "another dtype of one": set_data("running_mean", torch.zeros(5, dtype=torch.float64)),
    "another dtype of the counter": set_data("num_batches_tracked", torch.tensor(3.0)),
    "another length": set_data("running_mean", torch.zeros(3)),
    "another shape": set_data("running_mean", torch.zeros(5, 1)),
    "lengths that add up": lambda layer: (
        set_data("running_mean", torch.zeros(4))(layer),
        set_data("running_var", torch.ones(6))(layer),
    ),
    "no memory": lambda layer: layer.running_mean.untyped_storage().resize_(0),
    "another object": lambda layer: setattr(layer, "running_var", layer.running_var.clone()),
    "no object": lambda layer: setattr(layer, "running_var", None),
    "meta": lambda layer: layer.to("meta"),
}


def make_layers(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Three layers that have seen batches, one of a length that is odd."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(5, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype), nn.BatchNorm1d(8, dtype=dtype)]
    for layer in layers:
        layer(torch.randn(6, layer.num_features, dtype=dtype))
    layers[0].running_mean.zero_()
    return layers


def _has_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.data_ptr() != 0


def outcome(layers: list[nn.Module], change: Callable[[nn.Module], object]) -> object:
    """What a snapshot finds after a change, and what the layers have once it has put everything back."""
    taken = Snapshot(layers, [NAMES] * len(layers))
    change(layers[0])
    found = taken.is_intact(), taken.changed()
    taken.restore()
    values = [buffer.detach().clone() for layer in layers for buffer in layer.buffers() if _has_memory(buffer)]
    return found, values, [taken.captured(owner) for owner in range(len(layers))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_both_copies_find_and_put_back_the_same(
    change: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happened to the layer: which buffers differ, and the bits afterwards."""
    usual = outcome(make_layers(dtype), CHANGES[change])
    monkeypatch.setattr(snapshot, "BATCH_NORM_STATISTICS", ())
    general = outcome(make_layers(dtype), CHANGES[change])
    assert usual[0] == general[0]
    assert_same_bits(usual[1:], general[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: setattr(layer, "running_mean", layer.running_mean.to(torch.complex64)),
        lambda layer: layer.to("meta"),
        lambda layer: layer.num_batches_tracked.resize_(1),
        lambda layer: setattr(layer, "num_batches_tracked", layer.num_batches_tracked.float()),
        lambda layer: setattr(layer, "running_mean", layer.running_mean[:, None]),
        lambda layer: setattr(layer, "running_mean", layer.running_mean.to_sparse()),
        lambda layer: setattr(layer, "running_mean", layer.running_mean.double()),
        lambda layer: layer.running_mean.untyped_storage().resize_(0),
        lambda layer: setattr(layer, "running_mean", layer.running_mean.as_subclass(type("Odd", (Tensor,), {}))),
    ],
    ids=["complex", "meta", "counter-1d", "float-counter", "2d", "sparse", "mixed", "no-memory", "subclass"],
)
def test_what_is_not_usual_is_refused(make: Callable[[nn.Module], object]) -> None:
    """The general copy takes it, or says what it cannot take."""
    layers = make_layers()
    make(layers[0])
    columns = [[getattr(layer, name) for layer in layers] for name in NAMES]
    with pytest.raises((ValueError, RuntimeError)):
        UsualCopy(columns)
