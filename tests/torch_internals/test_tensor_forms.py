"""Tensors that have other dtypes, shapes or strides are told from those that have other values."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnguard.torch_internals import tensor_forms
from bnguard.torch_internals.tensor_forms import form_check
from tests.old_torch import RELEASE

HAS_CHECK = tensor_forms._can_check()


def _read_as_integers(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def _shorten(tensor: Tensor) -> None:
    tensor.data = tensor.data[:3]


FORMS: dict[str, Callable[[Tensor], object]] = {
    "integers": _read_as_integers,
    "shorter": _shorten,
    "a column": lambda tensor: tensor.unsqueeze_(1),
    "one value again and again": lambda tensor: tensor.as_strided_((4,), (0,)),
    "longer": lambda tensor: tensor.resize_(5),
}
VALUES: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda tensor: None,
    "other values": lambda tensor: tensor.add_(1),
    "other memory": lambda tensor: setattr(tensor, "data", tensor.data.clone()),
}


@pytest.fixture(params=["torch", "by hand"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own check, where there is one, and without."""
    if request.param == "by hand":
        monkeypatch.setattr(tensor_forms, "_can_check", lambda: False)


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("change", [*FORMS, *VALUES])
def test_form_is_what_is_checked(change: str, position: int) -> None:
    """Of each tensor; values and memory are none of its business."""
    tensors = [torch.ones(4), torch.tensor(3), torch.zeros(4)]
    check = form_check(tensors)
    assert check(*tensors)
    {**FORMS, **VALUES}[change](tensors[position])
    assert check(*tensors) is (change in VALUES)


def test_check_keeps_no_tensor_alive() -> None:
    """It is called with them."""
    tensors = [torch.ones(4)]
    check, there = form_check(tensors), weakref.ref(tensors[0])
    del tensors
    assert there() is None
    assert callable(check)


@pytest.mark.skipif(RELEASE < (2, 7), reason="torch has no such check, or another one")
def test_torch_still_has_its_check() -> None:
    """Else each block around a small step is slower."""
    assert HAS_CHECK
