"""The copy of usual statistics, beside the general one: alike about every change, and about what they refuse."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnguard.layers import snapshot, usual_copy
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.usual_copy import UsualCopy, UsualTensors, Write, usual_copy_of
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
    "fewer of the same values": lambda layer: setattr(layer.running_mean, "data", layer.running_mean.data[:3]),
    "other memory with the same values": lambda layer: setattr(
        layer.running_mean, "data", layer.running_mean.data.clone()
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


@pytest.fixture(params=[1, 2, 128], ids="{} in a batch".format)
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many layers are read together."""
    monkeypatch.setattr(usual_copy, "_BATCH", request.param)


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


@pytest.mark.usefixtures("batch")
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
    with pytest.raises(RuntimeError):
        UsualCopy([UsualTensors(columns)])


def columns_of(layers: list[nn.Module]) -> list[list[Tensor]]:
    """What a copy is made of."""
    return [[getattr(layer, name) for layer in layers] for name in NAMES]


def copy_of(layers: list[nn.Module]) -> UsualCopy:
    """A copy of all their statistics."""
    copy = usual_copy_of(columns_of(layers))
    assert copy is not None
    return copy


def updated(layers: list[nn.Module], row: int) -> Write:
    """An update of one layer, with the copies from before and after it."""
    layer = layers[row]
    tensors = UsualTensors(columns_of([layer]))
    before = tensors.read()
    layer(torch.randn(6, layer.num_features, dtype=layer.running_mean.dtype))
    return row, before, tensors.read(), tensors.layout


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_views", [False, True])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1, 1, 1, 0], [0, 1, 2, 0, 1, 2]], ids=str)
def test_copy_absorbs_what_a_series_of_updates_has_left(rows: list[int], has_views: bool, dtype: torch.dtype) -> None:
    """In any order: it then compares with that, and nothing is different."""
    layers = make_layers(dtype)
    copy = copy_of(layers)
    views = dict(copy.views()) if has_views else {}
    assert copy.absorb([updated(layers, row) for row in rows])
    assert copy.is_unchanged()
    for tensor in [tensor for column in columns_of(layers) for tensor in column] if has_views else ():
        assert_same_bits(views[id(tensor)], tensor)
    layers[rows[0]].running_var[-1] += 1
    assert not copy.is_unchanged()


def interrupt(copy: UsualCopy, line: int) -> bool:
    """Interrupts ``views()`` at the line that it comes to in this place; False if it comes to fewer."""
    lines = iter(range(1, line + 1))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not UsualCopy.views.__code__:
            return None
        if event == "line" and next(lines, 0) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        copy.views()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_interrupted_views_are_made_again() -> None:
    """At whichever line: later ones are of what the copy compares with."""
    layers = make_layers()
    tensors = {id(tensor): tensor for column in columns_of(layers) for tensor in column}
    for line in itertools.count(1):
        copy = copy_of(layers)
        was_interrupted = interrupt(copy, line)
        assert copy.absorb([updated(layers, 1)])
        assert copy.is_unchanged()
        for key, view in copy.views():
            assert_same_bits(view, tensors[key])
        if not was_interrupted:
            break
    assert line > 4


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_copy_absorbs_nothing_if_somebody_else_has_written_in_between(name: str, at: int) -> None:
    """Before the first update of a layer or between two: the copy stays as it was."""
    layers = make_layers()
    copy = copy_of(layers)
    before = [view.clone() for _, view in copy.views()]
    writes = []
    for position, row in enumerate([1, 0, 2, 1]):
        if position == at:
            getattr(layers[row], name).data.add_(1)
        writes.append(updated(layers, row))
    assert not copy.absorb(writes)
    assert_same_bits([view for _, view in copy.views()], before)


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("change", [change for change in CHANGES if change.startswith(("the ", "minus", "not"))])
def test_what_has_moved_is_what_differs(change: str, row: int, dtype: torch.dtype) -> None:
    """The names, and the values of then and now, which later writes do not change."""
    layers = make_layers(dtype)
    layers.insert(row, layer := layers.pop(0))
    copy, taken = copy_of(layers), Snapshot(layers, [NAMES] * len(layers))
    CHANGES[change](layer)
    moved, expected = copy.moved(), taken.changed()
    assert bool(moved) is bool(expected)
    now = {name: getattr(layer, name).clone() for name in NAMES}
    layer.running_mean.fill_(7)
    found = [(each.owner, each.names, each.before, each.now) for some in moved for each in some.layers()]
    assert [(owner, names) for owner, names, _, _ in found] == [(one.owner, one.names) for one in expected]
    for owner, _, before, after in found:
        assert owner == row
        assert_same_bits(before, taken.before(owner))
        assert_same_bits(after, now)
