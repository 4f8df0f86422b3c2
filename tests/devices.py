"""A device that is emulated on the CPU: every operation is seen, and each that makes the host wait for it is counted.

bnguard runs its operations outside of the modes of ``torch.utils._python_dispatch``. Here it is kept from noticing that
one is active, so that the mode sees all operations, bnguard's among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnguard.torch_internals import tracing

aten = torch.ops.aten
# Operations whose result the host needs. On a real device they wait for it.
READS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.unique_dim}
MASKED = {aten.index, aten.index_put_}  # read the mask, if there is one
# Methods that read on the CPU without an operation.
METHODS = ("cpu", "numpy", "tolist", "__array__", "__index__", "__int__", "__float__")


class EmulatedDevice(TorchDispatchMode):
    """Tensors that were put on it with ``put()``, and all that is computed from them, are on the device.

    Where a tensor is that was made from none, such as ``torch.zeros(3)``, the first operation with it decides: all have
    the device "cpu". An operation on a tensor of the device and a copy on the host fails, unless that is a number.

    Attributes:
        reads: How often the host waited for the device, by what.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: Counter[str] = Counter()
        # Storages, which stay alive: an address is not used again.
        self._on_device: dict[int, Any] = {}
        self._on_host: dict[int, Any] = {}

    def put(self, *tensors: Tensor, on_host: bool = False) -> None:
        """Puts tensors on the device, or on the host."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            (self._on_host if on_host else self._on_device)[storage.data_ptr()] = storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage().data_ptr() in self._on_device

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to be on the host."""
        return tensor.untyped_storage().data_ptr() in self._on_host

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation on the CPU."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
        there = [tensor for tensor in tensors if self.holds(tensor)]
        here = [tensor for tensor in tensors if self.is_on_host(tensor)]
        if there and [tensor for tensor in here if tensor.dim()]:
            raise AssertionError(f"{func} of tensors on the host and on the device")
        takes_mask = func.overloadpacket in MASKED and any(tensor.dtype is torch.bool for tensor in there)
        if there and (func.overloadpacket in READS or takes_mask):
            self.reads[str(func.overloadpacket)] += 1
        result = func(*args, **(kwargs or {}))
        if there or here:
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.put(*tensors * bool(there), *results, on_host=not there)
        return result


def _can_emulate() -> bool:
    """Whether torch can make the ordinary tensors that bnguard reads while a mode sees all operations."""
    with EmulatedDevice():
        try:
            torch.ones(1).as_subclass(Tensor)
        except RuntimeError:
            return False
    return True


@contextmanager
def emulated_device() -> Iterator[EmulatedDevice]:
    """Runs a block with an emulated device; skips the test where torch is too old for one."""
    if not _can_emulate():
        pytest.skip("this torch makes no ordinary tensor of another one while a mode is active")
    device = EmulatedDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_len_torch_dispatch_stack", lambda: 0)
        patch.setattr(Tensor, "is_cpu", property(lambda self: not device.holds(self)), raising=False)
        for name in METHODS:
            patch.setattr(Tensor, name, _reading(device, name, getattr(Tensor, name)))
        with device:
            yield device


def _reading(device: EmulatedDevice, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not device.holds(self):
            return method(self, *args, **kwargs)
        before = device.reads.total()
        result = method(self, *args, **kwargs)
        if device.reads.total() == before:  # no operation, which would have been counted
            device.reads[name] += 1
        if name == "cpu":
            result = result.detach().clone()
            device._on_device.pop(result.untyped_storage().data_ptr())
            device.put(result, on_host=True)
        return result

    return read
