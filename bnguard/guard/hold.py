"""Run one forward of a layer so that its running statistics stay as they are.

Nothing here touches what other threads, hooks or ``state_dict()`` can see, with one exception: ``Exchange``, for a
forward that somebody else put on the instance and that cannot be told to use another layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped

from bnguard.guard.copies import OWN_ATTRIBUTES
from bnguard.layers.bits import PLAIN
from bnguard.layers.kinds import exchanged_buffers, tensor_table
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.tracing import aside

__all__ = [
    "Exchange",
    "InPlace",
    "StandIn",
    "copies",
    "copies_aside",
    "is_scratch_for",
    "normalise_with_batch",
    "normalise_with_batch_in_graph",
    "normalise_with_running_stats",
    "scratch_like",
]


def normalise_with_batch(module: Any, input: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """``_BatchNorm.forward`` in train mode, with ``mean`` and ``var`` for statistics, which nobody reads.

    Not ``None`` for statistics: torch then saves other tensors for backward (a checkpoint would notice), computes
    half-precision inputs differently and words its errors differently.
    """
    module._check_input_dim(input)
    factor = 0.0 if module.momentum is None else module.momentum
    weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
    return F.batch_norm(input, mean, var, weight, bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_batch_in_graph(module: Any, input: Tensor) -> Tensor:
    """The same while a graph is traced.

    The statistics come from the real ones, inside the graph: nothing of ours becomes an input that the graph must be
    guarded on.
    """
    module._check_input_dim(input)
    mean, var = _clone(module._buffers["running_mean"]), _clone(module._buffers["running_var"])
    factor = 0.0 if module.momentum is None else module.momentum
    return F.batch_norm(input, mean, var, module.weight, module.bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_running_stats(module: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward`` in eval mode, whatever mode the layer is in. Source: ``torch/nn/modules/batchnorm.py``."""
    module._check_input_dim(input)
    mean, var = module._buffers["running_mean"], module._buffers["running_var"]
    factor = 0.0 if module.momentum is None else module.momentum
    return F.batch_norm(input, mean, var, module.weight, module.bias, mean is None and var is None, factor, module.eps)


def _parameter(module: Any, name: str) -> Any:
    """The attribute; where it is a parameter, without the detour that ``nn.Module`` makes."""
    parameters = module._parameters
    return parameters[name] if name in parameters and name not in module.__dict__ else getattr(module, name)


class StandIn:
    """A stand-in for a layer: same class, same attributes, parameters and submodules, statistics of its own.

    The layer's own forward runs on it, so that what it writes to the statistics goes nowhere, also when another
    thread leaves the block in the meantime.

    Args:
        module: The layer.
        statistics: Tensors to use instead of the layer's own, by buffer name.
        training: The mode of the stand-in; None: the layer's.
    """

    __slots__ = ("_before", "_module", "_names", "stand_in")

    def __init__(self, module: nn.Module, statistics: dict[str, Tensor], training: bool | None = None) -> None:
        self._module = module
        self._names = frozenset(statistics)
        # As nn.DataParallel makes its replicas.
        self.stand_in: nn.Module = type(module).__new__(type(module))
        state = dict(module.__dict__)
        for name in OWN_ATTRIBUTES:
            state.pop(name, None)
        if training is not None:
            state["training"] = training
        state["_buffers"] = {**module._buffers, **statistics}
        self._before = dict(state)
        self.stand_in.__dict__.update(state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the class's forward on the stand-in, then gives the layer what else it set on itself."""
        try:
            return type(self._module).forward(self.stand_in, *args, **kwargs)
        finally:
            self._hand_over()

    def statistics(self) -> dict[str, Tensor]:
        """The statistics of the stand-in as they are now."""
        buffers = self.stand_in._buffers
        return {name: tensor for name in self._names if (tensor := buffers.get(name)) is not None}

    def _hand_over(self) -> None:
        module, state, before = self._module, self.stand_in.__dict__, self._before
        for name, value in state.items():
            if name != "_buffers" and (name not in before or before[name] is not value):
                module.__dict__[name] = value
        for name in before.keys() - state.keys():
            module.__dict__.pop(name, None)
        for name, tensor in self.stand_in._buffers.items():
            if name not in self._names and module._buffers.get(name) is not tensor:
                module._buffers[name] = tensor


class Exchange:
    """A layer whose statistics, and mode if asked for, are exchanged while a forward runs that knows only this layer.

    Of several overlapping calls the first exchanges and the last puts back; no lock is held while the forward runs.

    Args:
        module: The layer.
        statistics: Tensors to use instead of the layer's own, by buffer name.
        training: The mode during the call; None: the layer's.
        forward: What to run; somebody put it on the instance.
    """

    __slots__ = ("_after", "_forward", "_module", "_state")

    def __init__(
        self, module: nn.Module, statistics: dict[str, Tensor], training: bool | None, forward: Callable[..., Any]
    ) -> None:
        self._module = module
        self._forward = forward
        self._after = statistics
        self._state: dict[str, Any] = {"_buffers": {**module._buffers, **statistics}}
        if training is not None:
            self._state["training"] = training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward on the exchanged layer."""
        compiling = torch.compiler.is_compiling()  # cannot trace a lock, and traces one thread at a time
        module = self._module
        with nullcontext() if compiling else _exchange_lock:
            calls = _exchange_calls.get(id(module), 0)
            if calls == 0:
                _exchange_originals[id(module)] = {name: module.__dict__[name] for name in self._state}
                exchanged_buffers[id(module)] = module._buffers
                module.__dict__.update(self._state)
            _exchange_calls[id(module)] = calls + 1
        try:
            return self._forward(*args, **kwargs)
        finally:
            with nullcontext() if compiling else _exchange_lock:
                now = module._buffers
                self._after = {name: tensor for name in self._after if (tensor := now.get(name)) is not None}
                _exchange_calls[id(module)] -= 1
                if not _exchange_calls[id(module)]:
                    del _exchange_calls[id(module)]
                    module.__dict__.update(_exchange_originals.pop(id(module)))
                    del exchanged_buffers[id(module)]

    def statistics(self) -> dict[str, Tensor]:
        """The statistics as the forward left them."""
        return self._after


_exchange_calls: Final[dict[int, int]] = {}
_exchange_originals: Final[dict[int, dict[str, Any]]] = {}
_exchange_lock: Final = threading.RLock()
exchange_turn: Final = threading.RLock()  # for those who must not overlap
renew_after_fork(_exchange_lock, exchange_turn)


class InPlace:
    """A layer whose own forward runs as it is, so that it can be recorded; afterwards its statistics come back.

    Args:
        module: The layer.
        names: Its statistics.
        forward: What to run.
    """

    __slots__ = ("_after", "_forward", "_module", "_names")

    def __init__(self, module: nn.Module, names: Iterable[str], forward: Callable[..., Any]) -> None:
        self._module = module
        self._names = tuple(names)
        self._forward = forward
        self._after: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward, then puts the statistics back where nobody records it."""
        buffers = self._module._buffers
        objects = {name: tensor for name in self._names if (tensor := buffers.get(name)) is not None}
        before = copies_aside(self._module, self._names)
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._after = copies_aside(self._module, self._names)
            with aside():
                for name, tensor in objects.items():
                    tensor.data.copy_(before[name])
                    buffers[name] = tensor

    def statistics(self) -> dict[str, Tensor]:
        """The statistics as the forward left them."""
        return self._after


def copies(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Fresh copies of some buffers for a forward to write to, made outside autograd, and inside what else there is."""
    if torch.compiler.is_compiling():
        return _copies(module, names)
    with torch.inference_mode(mode=False), torch.no_grad():
        return _copies(module, names)


def copies_aside(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Fresh copies of some buffers for us to keep; not of those that a transform of ``torch.func`` has lent."""
    buffers = tensor_table(module, "_buffers")
    with aside():
        own = [name for name in names if (tensor := buffers.get(name)) is None or not _is_wrapped(tensor)]
        return _copies(module, own)


def _copies(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    buffers = tensor_table(module, "_buffers")
    return {name: tensor.detach().clone() for name in names if (tensor := buffers.get(name)) is not None}


# Only for F.batch_norm, which moves no version counter of the statistics that it saves for backward and writes;
# whatever does (instance_norm, for one) would break the backward pass of every layer that shares them.
# Shared by all layers of a shape, by all guards, and never freed: nobody reads them, so that threads and CUDA streams
# may write them at the same time, and a kernel on a side stream that still writes when the block is over harms nobody.
_scratch: Final[dict[tuple[Any, ...], Tensor]] = {}


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def scratch_like(tensor: Tensor | None, slot: int) -> Tensor | None:
    """A tensor of the same shape, dtype and device, which nobody reads; another one for each ``slot``."""
    if tensor is None:
        return None
    is_plain = type(tensor) in PLAIN
    key = (slot, tensor.shape, tensor.dtype, tensor.device)
    found = _scratch.get(key) if is_plain else None
    if found is None:
        with aside():
            found = torch.ones_like(tensor)
        if is_plain and type(found) is Tensor:  # not one that belongs to a mode
            _scratch[key] = found
    return found


def is_scratch_for(scratch: Tensor | None, tensor: Tensor | None) -> bool:
    """Whether ``scratch_like`` would still give ``scratch``, for a tensor that may have been converted in place."""
    return (
        scratch is not None
        and tensor is not None
        and type(tensor) in PLAIN
        and type(scratch) is Tensor
        and scratch.dtype is tensor.dtype
        and scratch.shape == tensor.shape
        and scratch.device == tensor.device
    )
