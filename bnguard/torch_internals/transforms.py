"""Recognise tensors inside ``torch.func`` transforms, fake and functional tensors; unwrap tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

PLAIN: Final = frozenset({Tensor, nn.Parameter})  # a subclass may override any operation


def is_fake(tensor: Any) -> bool:
    """Whether the tensor belongs to a ``FakeTensorMode``, or is being functionalised."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


# Whether a tensor is wrapped by a ``torch.func`` transform. Not a function of ours: forwards ask.
is_wrapped: Final[Callable[[Any], bool]] = _functorch.is_functorch_wrapped_tensor


def is_batched(value: Any) -> bool:
    """Whether the value is a tensor that ``vmap`` maps over, inside of whatever other transforms."""
    while isinstance(value, Tensor) and _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_batchedtensor(value):
            return True
        value = _functorch.get_unwrapped(value)
    return False


def for_each_example(tensor: Tensor, input: Tensor) -> Tensor:
    """``tensor`` once for each example that ``vmap`` makes of ``input``: it refuses to write to one that all share."""
    with torch.no_grad():
        never = torch.zeros_like(input.sum(), dtype=torch.bool)
        return torch.where(never, tensor, tensor)


def below_transforms(tensor: Any) -> Any:
    """Unwraps a tensor that is inside a ``torch.func`` transform, or was left wrapped by one."""
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def unwrapped_tensor(tensor: Any) -> Any:
    """Unwraps a tensor that is inside a ``torch.func`` transform, or was left wrapped by one, and a ``DTensor``.

    Of a ``DTensor`` this is the part of this rank, which shares its memory. So no rank has to wait for another.
    """
    tensor = below_transforms(tensor)
    return tensor.to_local() if type(tensor) not in PLAIN and type(tensor).__name__ == "DTensor" else tensor
