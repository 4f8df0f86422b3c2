"""Recognise tensors inside ``torch.func`` transforms, and fake tensors."""

from __future__ import annotations

from typing import Any

from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def is_fake(tensor: Any) -> bool:
    """Whether the tensor belongs to a ``FakeTensorMode``, or to the tracer of ``torch.export``."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def is_wrapped(tensor: Any) -> bool:
    """Whether the tensor is wrapped by a ``torch.func`` transform."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def below_transforms(tensor: Any) -> Any:
    """Unwraps a tensor that is inside a ``torch.func`` transform, or was left wrapped by one."""
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
