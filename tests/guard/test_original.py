"""What a layer had before a forward: the quick copy of torch's own statistics is like the one of any."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnguard
from bnguard.guard.original import OriginalCopier
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.layers.swaps import swapped
from tests.asserts import assert_same_bits
from tests.layers.test_usual_copy import CHANGES, make_layers


class Scaled(nn.BatchNorm1d):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Quiet(TorchDispatchMode):
    """Some mode of the user's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_both_ways_find_the_same(change: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to the layer: values and places of before, and what has moved; also at the second copy."""
    found = []
    for is_quick in (True, False):
        with monkeypatch.context() as patch:
            if not is_quick:
                patch.setattr(OriginalCopier, "_usual_copy", lambda copier: None)
            layers = make_layers(dtype)
            copier = OriginalCopier(BATCH_NORM_STATISTICS)
            copier.copy_of(layers[0])
            original = copier.copy_of(layers[0])
            assert (original._copy is not None) is is_quick
            assert original.moved(layers[0]) == ()
            CHANGES[change](layers[0])
            moved = original.moved(layers[0])
            values = {name: value.clone() for name, value in original.values.items()}
            places = [place == original.tensors[name].data_ptr() for name, place in original.pointers.items()]
            again = copier.copy_of(layers[0])
            found.append((moved, values, places, again.moved(layers[0]), dict(again.values)))
    for quick, plain in zip(*found, strict=True):
        if isinstance(quick, dict):
            assert_same_bits(quick, plain)
        else:
            assert quick == plain


def test_quick_way_is_for_a_calm_moment() -> None:
    """Not inside a mode of the user's, who would see its operations, and not while other statistics are in place."""
    layer = nn.BatchNorm1d(2)
    copier = OriginalCopier(BATCH_NORM_STATISTICS)
    with Quiet():
        assert copier.copy_of(layer)._copy is None
    original = copier.copy_of(layer)
    assert original._copy is not None
    with swapped(layer, {"running_mean": torch.ones(2)}):
        assert copier.copy_of(layer)._copy is None
        assert original.moved(layer) == ()
        assert_same_bits(copier.copy_of(layer).values["running_mean"], torch.zeros(2))
    layer.running_mean = torch.ones(2)
    assert original.moved(layer) == ("running_mean",)
    assert_same_bits(copier.copy_of(layer).values["running_mean"], torch.ones(2))


@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
def test_layer_with_a_forward_of_its_own_is_the_twin(policy: Any) -> None:
    """In eval mode, with statistics that are replaced and converted between the forwards."""
    layer = Scaled(3)
    layer(torch.randn(4, 3))
    layer.eval()
    twin = copy.deepcopy(layer)
    batch = torch.randn(4, 3)
    with bnguard.frozen(layer, policy):
        for _ in range(3):
            assert_same_bits(layer(batch), twin(batch))
    layer.running_mean = twin.running_mean = torch.ones(3)
    with bnguard.frozen(layer, policy):
        assert_same_bits(layer(batch), twin(batch))
    layer.double()
    with bnguard.frozen(layer, policy):
        assert_same_bits(layer(batch.double()), twin.double()(batch.double()))
