"""Capture, compare, put back: the corners that a model in a block rarely meets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard
from bnguard.layers import flat_copy
from bnguard.layers.bits import as_bytes, digest_of, from_bytes, same_bits
from bnguard.layers.drift import largest_mean_shift
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.usual_copy import UsualCopy, UsualTensors
from tests.asserts import assert_same_bits, told

NAMES = ("running_mean", "running_var", "num_batches_tracked")


def snapshot_of(layer: nn.Module) -> Snapshot:
    """Of all its statistics."""
    return Snapshot([layer], [NAMES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_bytes_and_back(dtype: torch.dtype) -> None:
    """A tensor of any dtype is its bytes, and the bytes are the tensor."""
    tensor = torch.tensor([0, 1, 2]).to(dtype)
    assert_same_bits(from_bytes(as_bytes(tensor), dtype).resolve_conj(), tensor)


def test_same_bits_takes_dtype_and_shape_into_account() -> None:
    """Zeros of another dtype or shape are something else."""
    assert same_bits(torch.zeros(2), torch.zeros(2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_snapshot_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is captured is found unchanged, found changed, and put back."""
    layer = nn.Module()
    layer.register_buffer("running_mean", torch.ones(shape).to(dtype))
    layer.register_buffer("running_std", torch.ones(5))
    snapshot = Snapshot([layer], [("running_mean", "running_std")])
    assert snapshot.is_intact()
    layer.running_mean.zero_()
    layer.running_std.zero_()
    expected = ("running_mean", "running_std") if layer.running_mean.numel() else ("running_std",)
    assert [difference.names for difference in snapshot.changed()] == [expected]
    snapshot.restore()
    assert snapshot.is_intact()
    assert_same_bits(layer.running_mean, torch.ones(shape).to(dtype))


def test_buffers_that_went_together_come_back_in_order() -> None:
    """Several deleted buffers are registered again in the order that they had."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    del layer.running_mean, layer.running_var
    assert snapshot.changed()[0].names == NAMES[:2]
    snapshot.restore()
    assert tuple(layer._buffers) == NAMES


def test_model_on_the_meta_device_has_no_values_to_compare() -> None:
    """Meta tensors are known as objects only: replaced ones return, nothing is read."""
    layer = nn.BatchNorm2d(3, device="meta")
    snapshot, mean = snapshot_of(layer), layer.running_mean
    assert snapshot.changed() == []
    layer.running_mean = None
    assert snapshot.changed()[0].names == ("running_mean",)
    assert snapshot.before(0) == {}
    snapshot.restore()
    assert layer.running_mean is mean


def test_model_that_moved_to_the_meta_device_stays_there() -> None:
    """A tensor that holds no values any more cannot hold those of capture: it is left alone, and is no change."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer.to("meta")
    assert snapshot.changed() == []
    snapshot.restore()
    assert layer.running_mean.is_meta


def test_tensor_subclass_is_compared_on_its_own() -> None:
    """A buffer of another tensor class goes into no flat copy, and is compared and put back all the same."""

    class Marked(torch.Tensor):
        pass

    layer = nn.BatchNorm2d(3)
    layer.running_mean = torch.zeros(3).as_subclass(Marked)
    snapshot = snapshot_of(layer)
    assert snapshot.changed() == []
    layer.running_mean.data.add_(1)
    assert snapshot.changed()[0].names == ("running_mean",)
    snapshot.restore()
    assert layer.running_mean.eq(0).all()


def test_accepted_values_follow_conversions() -> None:
    """An update is taken over in whichever dtype the layer is by then."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer.double()
    assert snapshot.changed() == []
    layer.running_mean.fill_(1 / 3)
    assert snapshot.changed()[0].names == ("running_mean",)
    snapshot.accept(0)
    assert snapshot.changed() == []
    layer.running_mean.fill_(0)
    snapshot.restore()
    assert_same_bits(layer.running_mean, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_recaptured_values_keep_every_digit() -> None:
    """Values that are captured again are put back in full, into a layer that is converted there and back."""
    layer = nn.BatchNorm2d(3).double()
    layer.running_mean.fill_(1 / 3)
    snapshot, mean = snapshot_of(layer), layer.running_mean
    before = snapshot.captured(0)
    layer.float()
    snapshot.accept(0)
    snapshot.recapture(0, before)
    layer.double()
    snapshot.restore()
    assert layer.running_mean is mean
    assert_same_bits(mean, before["running_mean"])


def test_nan_stays_nan_through_conversions() -> None:
    """A NaN that was converted, in whichever steps, is the NaN that was captured."""
    layer = nn.BatchNorm2d(3).double()
    snapshot = snapshot_of(layer)
    layer.float()
    layer.running_mean.copy_(torch.tensor([float("nan"), 0.5, -0.0]) * -1)
    snapshot.accept(0)
    layer.bfloat16()
    assert snapshot.changed() == []
    layer.running_mean[1] = 1
    assert snapshot.changed()[0].names == ("running_mean",)
    snapshot.restore()
    assert snapshot.changed() == []


def test_restored_tensor_is_not_the_captured_one() -> None:
    """What is put into the layer can be written to without changing what was captured."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer.double()
    snapshot.accept(0)
    layer.running_mean = layer.running_mean + 1
    snapshot.restore()
    layer.running_mean.add_(5)
    snapshot.restore()
    assert_same_bits(layer.running_mean, torch.zeros(3, dtype=torch.float64))


def test_missing_tensor_is_not_accepted() -> None:
    """A buffer that is gone stays a difference."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer.running_mean = None
    snapshot.accept(0)
    assert snapshot.changed()[0].names == ("running_mean",)


def test_accepted_tensor_may_have_another_shape() -> None:
    """A layer may give its statistics a shape in an update that it is allowed; afterwards they are protected in it."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer.running_mean = torch.arange(7.0)
    snapshot.accept(0)
    assert snapshot.changed() == []
    layer.running_mean = torch.zeros(7)
    snapshot.restore()
    assert_same_bits(layer.running_mean, torch.arange(7.0))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_tensor_without_values_is_accepted() -> None:
    """Uninitialised statistics differ from nothing."""
    layer = nn.Module()
    layer.register_buffer("running_mean", nn.UninitializedBuffer())
    snapshot = Snapshot([layer], [("running_mean",)])
    assert snapshot.captured(0) == {}
    snapshot.accept(0)
    assert snapshot.changed() == []


def test_mean_shift_needs_a_mean_and_a_variance() -> None:
    """Without both, in one shape, there is none."""
    mean, var = torch.zeros(2), torch.ones(2)
    assert largest_mean_shift({"running_mean": mean}, {"running_mean": mean + 1}, 0.0) is None
    before = {"running_mean": mean, "running_var": var * 4}
    assert largest_mean_shift(before, {"running_mean": mean + 3}, 0.0) == 1.5
    assert largest_mean_shift(before, {"running_mean": torch.ones(3)}, 0.0) is None
    assert largest_mean_shift(before, {}, 0.0) is None


@pytest.mark.parametrize("converted", [False, True])
def test_bytes_of_several_dtypes_are_joined_where_comparing_means_waiting(
    converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU one comparison serves all dtypes, and each value comes back, also into a tensor converted in place."""
    monkeypatch.setattr(flat_copy, "_is_on_host", lambda flat: False)
    layer = nn.Module()
    values = {"running_a": torch.arange(3).half(), "running_b": torch.rand(5), "running_c": torch.rand(2).double()}
    for name, value in values.items():
        layer.register_buffer(name, value.clone())
    snapshot = Snapshot([layer], [tuple(values)])
    assert snapshot.is_intact()
    layer.running_b[-1] += 1
    assert not snapshot.is_intact()
    if converted:
        layer.running_a.data = layer.running_a.double()
    assert [difference.names for difference in snapshot.changed()] == [("running_b",)]
    layer.running_c.zero_()
    snapshot.restore()
    for name, value in values.items():
        assert torch.equal(getattr(layer, name).to(value.dtype), value)


def test_values_beside_an_uninitialised_tensor_are_not_accepted_for_it() -> None:
    """The captured tensor itself has none yet."""
    layer = nn.LazyBatchNorm2d()
    snapshot = snapshot_of(layer)
    layer.running_mean = torch.ones(2)
    snapshot.accept(0)
    assert "running_mean" not in snapshot.captured(0)


def test_accepted_snapshot_is_intact() -> None:
    """What an allowed update has written is what the end compares with, counter included."""
    layer = nn.BatchNorm2d(3)
    snapshot = snapshot_of(layer)
    layer(torch.randn(4, 3, 2, 2))
    assert not snapshot.is_intact()
    snapshot.accept(0)
    assert snapshot.is_intact()
    layer.num_batches_tracked += 1
    assert not snapshot.is_intact()
    snapshot.restore()
    assert layer.num_batches_tracked == 1


def test_values_of_counters_are_handed_out_as_one() -> None:
    """Who writes to what ``views()`` gave, once or again, changes what is compared with."""
    counter = torch.tensor(3)
    copy = UsualCopy([UsualTensors([[torch.zeros(2)], [torch.ones(2)], [counter]])])
    first, second = (dict(copy.views())[id(counter)] for _ in range(2))
    counter.fill_(5)
    assert not copy.is_unchanged()
    first.fill_(5)
    assert second == 5
    assert copy.is_unchanged()


def test_digest_passes_over_what_has_no_values() -> None:
    """Absent, meta and uninitialised tensors do not count; a name, a dtype, a shape or a bit does."""
    ones = torch.ones(2)
    digest = digest_of({"a": ones})
    nothing = {"b": None, "c": torch.ones(2, device="meta"), "d": nn.UninitializedBuffer()}
    assert digest_of({"a": ones, **nothing}) == digest
    others = [{"b": ones}, {"a": ones.double()}, {"a": ones[None]}, {"a": ones * -1}]
    assert digest not in map(digest_of, others)


@pytest.mark.parametrize("policy", ["raise", "restore", "rollback"])
@pytest.mark.parametrize("persistent", [True, False])
def test_deleted_statistic_comes_back_as_persistent_as_it_was(persistent: bool, policy: str) -> None:
    """The state dict has the same keys before and after."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    mean = net[1].running_mean
    del net[1].running_mean
    net[1].register_buffer("running_mean", mean, persistent=persistent)
    keys = list(net.state_dict())
    with told(), bnguard.frozen(net.eval(), policy):
        del net[1].running_mean
    assert list(net.state_dict()) == keys
    assert net[1].running_mean is mean
