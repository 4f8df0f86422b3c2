"""What user code has put on a layer under the names that a guard needs is used inside, and there again afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of
from tests.nets import ScaledNorm, images, warmed
from tests.policies import EVERY_GUARD, GUARDS

EVERY_CLASS = pytest.mark.parametrize("cls", [nn.BatchNorm2d, ScaledNorm])


class WithoutSecret:
    """A ``__getstate__`` for one layer, which leaves out an attribute and adds another."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self) -> dict[str, Any]:
        state = self.layer.__dict__.copy()
        state.pop("secret", None)
        state.pop("__getstate__", None)
        return {**state, "copied": True}


def make(cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """One layer with an attribute of the user's."""
    net = nn.Sequential(warmed(cls(2)))  # type: ignore[call-arg]  # both are norms
    net[0].__dict__["secret"] = 1
    return net.eval()


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("way", COPIES)
@EVERY_CLASS
@EVERY_GUARD
def test_getstate_of_the_instance_makes_the_copies(guard: str, cls: type[nn.Module], way: str) -> None:
    """Copies inside are those that the user's function makes, and the same function is there after the block."""
    net = make(cls)
    layer: Any = net[0]
    layer.__getstate__ = own = WithoutSecret(layer)
    order = list(layer.__dict__)
    expected = COPIES[way](layer)
    again = bnguard.frozen(net, **GUARDS[guard])
    for _ in range(2):
        with again:
            net(images())
            clone = COPIES[way](layer)
            assert clone.copied
            assert list(clone.__dict__) == list(expected.__dict__)
            assert_clean(clone)
            assert_same_bits(state_of(clone), state_of(layer))
        assert layer.__dict__["__getstate__"] is own
        assert list(layer.__dict__) == order


@pytest.mark.parametrize("way", ["copy", "deepcopy"])
@EVERY_GUARD
def test_getstate_that_is_set_inside_makes_the_copies(guard: str, way: str) -> None:
    """So does one that the user sets inside, and it stays; the copies have nothing of the guard after the block."""
    net = make()
    layer: Any = net[0]
    again = bnguard.frozen(net, **GUARDS[guard])
    with again:
        layer.__getstate__ = own = WithoutSecret(layer)
        clone = COPIES[way](layer)
        assert clone.copied
        assert_same_bits(clone(images()), net(images()))
        assert_clean(clone) if way == "deepcopy" else None
    assert layer.__dict__["__getstate__"] is own
    assert_clean(clone)
    with again:
        assert COPIES[way](layer).copied
    assert layer.__dict__["__getstate__"] is own


@EVERY_GUARD
def test_getstate_that_is_deleted_inside_stays_away(guard: str) -> None:
    """One that the user deletes inside is not there after the block, and one that is put back inside is."""
    net = make()
    layer: Any = net[0]
    layer.__getstate__ = own = WithoutSecret(layer)
    with bnguard.frozen(net, **GUARDS[guard]):
        del layer.__getstate__
    assert "__getstate__" not in layer.__dict__
    layer.__getstate__ = own
    with bnguard.frozen(net, **GUARDS[guard]):
        del layer.__getstate__
        layer.__getstate__ = own
    assert layer.__dict__["__getstate__"] is own


@EVERY_CLASS
@EVERY_GUARD
def test_replicate_of_the_instance_makes_the_replicas(guard: str, cls: type[nn.Module]) -> None:
    """A ``_replicate_for_data_parallel`` on the instance is called inside, and is there after the block."""
    net = make(cls)
    layer: Any = net[0]

    def own() -> nn.Module:
        replica = cls._replicate_for_data_parallel(layer)
        replica.__dict__["replicated"] = True
        return replica

    layer._replicate_for_data_parallel = own
    again = bnguard.frozen(net, **GUARDS[guard])
    for _ in range(2):
        with again:
            replica = layer._replicate_for_data_parallel()
            assert replica.replicated
            replica._buffers = dict(layer._buffers)  # as replicate() does
            replica.weight, replica.bias = layer.weight.data, layer.bias.data
            assert_same_bits(replica.eval()(images()), net(images()).detach())
        assert layer.__dict__["_replicate_for_data_parallel"] is own


@EVERY_CLASS
@EVERY_GUARD
def test_forward_that_is_set_inside_decides(guard: str, cls: type[nn.Module]) -> None:
    """A forward that the user sets on the instance inside runs, also in a further block, and stays."""
    net = make(cls).train()
    layer: Any = net[0]

    def only_reads(x: Tensor) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False)

    expected, entry = only_reads(images()), state_of(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        layer.forward = only_reads
        assert_same_bits(net(images()), expected)
        for inner in GUARDS.values():
            with bnguard.frozen(net, **inner):
                assert_same_bits(net(images()), expected)
            assert layer.__dict__["forward"] is only_reads
    assert layer.__dict__["forward"] is only_reads
    assert_same_bits(state_of(net), entry)


def test_forward_that_is_set_inside_and_moves_is_stopped() -> None:
    """Under raise, one that moves statistics is compared, put back and raised; then removed, torch's flags decide."""
    net = make()
    layer: Any = net[0]

    def moves(x: Tensor) -> Tensor:
        with torch.no_grad():
            layer.running_mean.add_(1)
        return x

    entry = state_of(net)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(images())
        layer.forward = moves
        with pytest.raises(bnguard.StatsChangedError, match="in eval mode"):
            net(images())
        assert_same_bits(state_of(net), entry)
        del layer.forward
        net(images())
        with pytest.raises(bnguard.StatsChangedError, match="in train mode"):
            net.train()(images())
    assert_same_bits(state_of(net), entry)
    assert_clean(net)


@EVERY_CLASS
def test_forward_that_is_gone_at_the_next_block_is_not_run(cls: type[nn.Module]) -> None:
    """A guard that is used again does not run a forward that the user has deleted in between."""
    net = make(cls)
    layer: Any = net[0]
    expected = net(images())
    again = bnguard.frozen(net, "restore")
    layer.forward = lambda x: x
    with again:
        assert_same_bits(net(images()), images())
    del layer.forward
    with again:
        assert_same_bits(net(images()), expected)
    assert_clean(net)
