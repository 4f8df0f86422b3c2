"""Run one forward of a layer so that its running statistics stay as they are.

Note [Holding]
~~~~~~~~~~~~~~
While a guard holds, the layer has a ``forward`` of its own in ``module.__dict__``: an instance-level forward works
where hooks cannot, in a graph that was compiled before the block began (dynamo retraces when the entry appears, and
returns to the earlier graph when it goes), and flipping ``track_running_stats`` instead is wrong in six ways (it
ignores layers that ignore the flag, changes what autograd saves, and leaks into copies).

Torch's own BatchNorm runs as one call of ``F.batch_norm`` with scratch statistics. Every other layer runs its own
forward with other statistics in ``_buffers``; see Note [Swapped statistics].
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from sys import getrefcount
from types import FunctionType, MethodType
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.bits import PLAIN
from bnguard.layers.swaps import own_tensors, swapped
from bnguard.torch_internals.functional_call import calling_module
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import is_wrapped

# By id of the layer, as long as it has entries: what guards it, see ``hooks.LayerGuard``.
guards: Final[dict[int, Any]] = {}


class Guarded(Protocol):
    """What guards one layer, as far as its forward needs it.

    Attributes:
        module: The layer.
        is_plain: Whether its forward is an ordinary method of its class.
        entries: What the blocks around it want; empty after the last one.
    """

    module: Any
    is_plain: bool
    entries: Any

    def own_forward(self) -> Callable[..., Any]:
        """The forward that the module has without a guard."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Runs that forward."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's forward, as the guards around it want it."""

    def holds_as_usual(self) -> bool:
        """Whether a forward now is held with its batch, for a layer that runs torch's ``_BatchNorm.forward``."""

    def run_held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer with its batch, so that its update goes nowhere."""

    def strip(self, module: nn.Module) -> None:
        """Takes what is ours off a module that copied the layer's ``__dict__``."""


class GuardedForward:
    """The ``forward`` of a guarded layer: a bound method of this object is an entry in the layer's ``__dict__``.

    It has the signature and name of the forward that it stands for. A reference that is kept after the block, and
    copies of it, run the layer's own forward. Where the caller is another module, made by copying ``__dict__``, that
    module loses the entry and runs by itself.
    """

    __slots__ = ("guard", "method")

    def __init__(self, guard: Guarded) -> None:
        self.guard = guard
        self.method: MethodType | None = None  # the entry, while it is there

    def bound(self) -> MethodType:
        """The entry.

        A method of an object, not an object with ``__call__``: for each of those graphs are compiled anew.
        """
        own = type(self.guard.module).__dict__.get("forward", getattr(type(self.guard.module), "forward", None))
        function = FunctionType(GuardedForward.forward.__code__, globals(), "forward")
        if self.guard.is_plain:
            function.__wrapped__ = own  # type: ignore[attr-defined]  # its signature
        else:
            with suppress(ValueError, TypeError):  # a builtin function has none
                own_signature = inspect.signature(self.guard.own_forward())
                owner = inspect.Parameter("_guarded", inspect.Parameter.POSITIONAL_ONLY)
                function.__signature__ = own_signature.replace(  # type: ignore[attr-defined]
                    parameters=[owner, *own_signature.parameters.values()]
                )
        self.method = method = MethodType(function, self)
        return method

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer."""
        if isinstance(self, nn.Module):
            return _forward_bound_to(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and self.may_be_copied():
            clone = self.clone_that_calls()
            if clone is not None:
                return clone.forward(*args, **kwargs)
        return self.guard.run(args, kwargs)

    def may_be_copied(self) -> bool:
        """Whether another module may have the entry: after the block only such a one has it."""
        return not self.guard.entries or getrefcount(self.method) > _REFERENCES

    def clone_that_calls(self) -> Any:
        """The module that runs, if it is another one than the layer; it is then rid of what is ours."""
        caller = calling_module()
        if caller is None or caller is self.guard.module:
            return None
        if getattr(caller.__dict__.get("forward"), "__self__", None) is not self:
            return None
        self.guard.strip(caller)
        return caller

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.guard.module, memo)  # the method is then bound to the copy of the layer

    def __reduce__(self) -> Any:
        return operator.getitem, ((self.guard.module,), 0)  # of which a pickled method is an attribute


class _Probe:
    """Counts the references to an entry while its module runs."""

    def __init__(self) -> None:
        self.references = 0
        self.method = self.count
        module = nn.Module()
        module.__dict__["forward"] = self.method
        module()

    def count(self) -> None:
        self.references = getrefcount(self.method)


# To an entry that is in one __dict__ only. A copy of the __dict__ has another one; then it matters which module runs.
_REFERENCES: Final = _Probe().references


class BatchNormForward(GuardedForward):
    """The ``forward`` of a guarded layer that runs torch's ``_BatchNorm.forward``."""

    __slots__ = ()

    def bound(self) -> MethodType:
        """The entry."""
        self.method = method = MethodType(BatchNormForward.forward, self)
        return method

    def forward(self, input: Tensor) -> Any:
        """Runs the layer."""
        if isinstance(self, nn.Module):
            return _forward_bound_to(self, input)
        if not torch.compiler.is_compiling():
            if self.may_be_copied():
                clone = self.clone_that_calls()
                if clone is not None:
                    return clone.forward(input)
            if self.guard.holds_as_usual():
                return self.guard.run_held((input,), {})
        return self.guard.run((input,), {})

    # Errors about the arguments are worded as the layer's own.
    forward.__qualname__ = nn.BatchNorm2d.forward.__qualname__


def _forward_bound_to(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module to which the function of a guarded forward was bound anew.

    accelerate does, under mixed precision: it keeps ``model.forward.__func__``, and goes on calling it after the block.
    """
    guard = guards.get(id(module))
    if guard is None or guard.module is not module:
        return type(module).forward(module, *args, **kwargs)
    return guard.run(args, kwargs)


def run_with(
    guard: Guarded,
    statistics: dict[str, Tensor],
    training: bool | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs a layer's own forward with ``statistics`` in place of its own, in another mode if one is given."""
    if not torch.compiler.is_compiling():
        with swapped(guard.module, statistics, training):
            return guard.original(*args, **kwargs)
    if guard.is_plain and not guard.module._modules and _is_made_plainly(type(guard.module)):
        return _run_stand_in(guard.module, statistics, training, args, kwargs)
    # No lock and no record can be traced, and a graph is traced by one thread.
    module = guard.module
    buffers, mode = module._buffers, module.training
    own = {name: buffers[name] for name in statistics}
    try:
        for name, tensor in statistics.items():
            buffers[name] = tensor
        if training is not None:
            module.training = training
        return guard.original(*args, **kwargs)
    finally:
        for name, tensor in own.items():
            buffers[name] = tensor
        if training is not None:
            module.training = mode


def _is_made_plainly(cls: Any) -> bool:
    return cls.__new__ is object.__new__


def _run_stand_in(
    module: Any, statistics: dict[str, Tensor], training: bool | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs the forward of a layer without children on an object that is made in the graph.

    In a checkpointed region a graph must not write to an existing object, not even during a forward.
    """
    before = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_buffers", "training")}
    cls: Any = type(module)
    stand_in = cls.__new__(cls)
    stand_in.__dict__.update(before)
    stand_in.__dict__["_buffers"] = {**module._buffers, **statistics}
    stand_in.__dict__["training"] = module.training if training is None else training
    result = cls.forward(stand_in, *args, **kwargs)
    for name, value in stand_in.__dict__.items():
        if name not in ("_buffers", "training") and before.get(name) is not value:
            module.__dict__[name] = value
    for name, tensor in stand_in._buffers.items():
        if name not in statistics and module._buffers.get(name) is not tensor:
            module._buffers[name] = tensor
    return result


def normalise_with_batch(module: Any, input: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """``_BatchNorm.forward`` in train mode, with scratch tensors ``mean`` and ``var`` as its statistics.

    They are not ``None``, because torch would then save other tensors for backward (checkpointing would detect it),
    compute half-precision inputs differently and raise other errors.
    """
    module._check_input_dim(input)
    factor = 0.0 if module.momentum is None else module.momentum
    weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
    return F.batch_norm(input, mean, var, weight, bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_batch_in_graph(module: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward`` in train mode while a graph is traced, with clones of the statistics to write to.

    The clones come from the real statistics, inside the graph: nothing of ours becomes an input that the graph must be
    guarded on.
    """
    module._check_input_dim(input)
    mean, var = _clone(module._buffers["running_mean"]), _clone(module._buffers["running_var"])
    factor = 0.0 if module.momentum is None else module.momentum
    return F.batch_norm(input, mean, var, module.weight, module.bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_running_stats(module: Any, input: Tensor, *, from_clones: bool = False) -> Tensor:
    """``_BatchNorm.forward`` in eval mode, whatever mode the layer is in. Source: ``torch/nn/modules/batchnorm.py``.

    Args:
        module: The layer.
        input: Its input.
        from_clones: Give autograd clones of the statistics, because the statistics themselves will be written to before
            the backward pass.
    """
    module._check_input_dim(input)
    mean, var = module._buffers["running_mean"], module._buffers["running_var"]
    if from_clones:
        mean, var = _clone(mean), _clone(var)
    factor = 0.0 if module.momentum is None else module.momentum
    return F.batch_norm(input, mean, var, module.weight, module.bias, mean is None and var is None, factor, module.eps)


def _parameter(module: Any, name: str) -> Any:
    """The attribute; where it is a parameter, without the detour that ``nn.Module`` makes."""
    parameters = module._parameters
    return parameters[name] if name in parameters and name not in module.__dict__ else getattr(module, name)


def copies(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Fresh copies of some buffers for a forward to write to, made outside autograd but inside any dispatch mode."""
    if torch.compiler.is_compiling():
        own = module._buffers
        return {name: tensor.detach().clone() for name in names if (tensor := own.get(name)) is not None}
    with torch.inference_mode(mode=False), torch.no_grad():
        return _copies(own_tensors(module, "_buffers"), names)


def copies_outside_modes(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Fresh copies of some buffers to compare with later; not of those that a transform of ``torch.func`` has lent."""
    buffers = own_tensors(module, "_buffers")
    with outside_modes():
        own = [name for name in names if (tensor := buffers.get(name)) is None or not is_wrapped(tensor)]
        return _copies(buffers, own)


def _copies(buffers: Mapping[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: _cloned(tensor) for name in names if (tensor := buffers.get(name)) is not None}


def _cloned(tensor: Tensor) -> Tensor:
    """A clone with the strides of the original, on which the last bit of a result can depend."""
    tensor = tensor.detach()
    if is_lazy(tensor) or tensor.is_contiguous() or is_wrapped(tensor):
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# Only for F.batch_norm, which saves the statistics for backward and writes to them without a version counter increase.
# An operation that increases it, such as instance_norm, would break the backward pass of every layer that shares them.
# Shared by all layers of a shape and all guards, and never freed. Their values are never read, so threads and CUDA
# streams may write to them at the same time, and a kernel on a side stream may still do so after the block.
_scratch: Final[dict[tuple[Any, ...], Tensor]] = {}


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def scratch_like(tensor: Tensor | None, slot: int) -> Tensor | None:
    """A scratch tensor with the shape, dtype and device of ``tensor``; a different one for each ``slot``."""
    if tensor is None:
        return None
    is_plain = type(tensor) in PLAIN
    key = (slot, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if is_plain else ()
    found = _scratch.get(key) if is_plain else None
    if found is None:
        with outside_modes():
            found = _cloned(tensor).fill_(1)
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
