"""The means to run one forward of a layer so that its running statistics stay as they are.

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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.errors import hides_frame
from bnguard.guard.copies import strip_copy
from bnguard.layers.bits import has_values, write
from bnguard.layers.swaps import own_tensors
from bnguard.torch_internals.tracing import outside_modes, without_autograd
from bnguard.torch_internals.transforms import PLAIN, for_each_example, is_batched, is_wrapped, unwrapped_tensor

__tracebackhide__ = hides_frame

# By id of the layer, as long as it has entries: what guards it, see ``hooks.LayerGuard``.
guards: Final[dict[int, Any]] = {}
NO_STATISTICS: Final[Mapping[str, Tensor]] = {}


def run_in_graph(
    module: Any,
    forward: Callable[..., Any],
    statistics: Mapping[str, Tensor],
    flags: Mapping[str, bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs a layer's own forward with ``statistics`` and ``flags`` in place of its own.

    No lock and no record of a swap can be traced, and a graph is traced by one thread.
    """
    buffers = module._buffers
    own = {name: buffers[name] for name in statistics}
    own_flags = {name: getattr(module, name) for name in flags}
    try:
        for name, tensor in statistics.items():
            buffers[name] = tensor
        for name, value in flags.items():
            setattr(module, name, value)
        return forward(*args, **kwargs)
    finally:
        for name, tensor in own.items():
            buffers[name] = tensor
        for name, value in own_flags.items():
            setattr(module, name, value)


def run_stand_in(
    module: Any,
    statistics: Mapping[str, Tensor],
    flags: Mapping[str, bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs the forward of a layer without children on an object that is made in the graph.

    In a checkpointed region a graph must not write to an existing object, not even during a forward.
    """
    before = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_buffers")}
    cls: Any = type(module)
    stand_in = cls.__new__(cls)
    stand_in.__dict__.update(before)
    stand_in.__dict__["_buffers"] = {**module._buffers, **statistics}
    stand_in.__dict__.update(flags)
    result = cls.forward(stand_in, *args, **kwargs)
    for name, value in stand_in.__dict__.items():
        if name != "_buffers" and name not in flags and before.get(name) is not value:
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
    try:
        return F.batch_norm(input, mean, var, weight, bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch
    except RuntimeError:
        if not is_batched(input) or mean is None or var is None:
            raise
    # Not asked before: it would cost each forward.
    mean, var = for_each_example(mean, input), for_each_example(var, input)
    return F.batch_norm(input, mean, var, weight, bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_and_update(module: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward`` in train mode, of a layer that tracks all three statistics."""
    own, factor = module._buffers, module.momentum
    count = own["num_batches_tracked"]
    count.add_(1)
    if factor is None:
        factor = 1.0 / float(count)
    weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
    return F.batch_norm(input, own["running_mean"], own["running_var"], weight, bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_batch_in_graph(module: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward`` in train mode while a graph is traced, with clones of the statistics to write to.

    The clones come from the real statistics, inside the graph: nothing of ours becomes an input that the graph must be
    guarded on.
    """
    module._check_input_dim(input)
    mean, var = _clone(module._buffers["running_mean"]), _clone(module._buffers["running_var"])
    factor = 0.0 if module.momentum is None else module.momentum
    return F.batch_norm(input, mean, var, module.weight, module.bias, True, factor, module.eps)  # noqa: FBT003  # by position, as torch


def normalise_with_running_stats(
    module: Any, input: Tensor, *, from_clones: bool = False, statistics: Mapping[str, Tensor] = NO_STATISTICS
) -> Tensor:
    """``_BatchNorm.forward`` in eval mode, whatever mode the layer is in. Source: ``torch/nn/modules/batchnorm.py``.

    Args:
        module: The layer.
        input: Its input.
        from_clones: Give autograd clones of the statistics, because the statistics themselves will be written to before
            the backward pass.
        statistics: Statistics to take in place of its own.
    """
    module._check_input_dim(input)
    own = module._buffers
    mean, var = [statistics[name] if name in statistics else own[name] for name in ("running_mean", "running_var")]
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
    return _copies(own_tensors(module, "_buffers"), names)


def copies_for(module: nn.Module, names: Iterable[str], inputs: Iterable[Any]) -> dict[str, Tensor]:
    """Fresh copies of some buffers for a forward with these inputs to write to; under ``vmap`` one for each example."""
    found = copies(module, names)
    batched = next(filter(is_batched, inputs), None)
    return found if batched is None else {name: for_each_example(copy, batched) for name, copy in found.items()}


@outside_modes
def copies_outside_modes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fresh copies of those tensors that can be read, to compare with later."""
    return {name: cloned(unwrapped_tensor(tensor)) for name, tensor in tensors.items() if has_values(tensor)}


@without_autograd
def converted(value: Tensor, now: Tensor) -> Tensor:
    """A copy of ``value`` with the dtype, the device and the strides of ``now``."""
    copy = cloned(now)
    write(copy, value.to(now.device, now.dtype))
    return copy


@without_autograd
def _copies(buffers: Mapping[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: cloned(tensor) for name in names if (tensor := buffers.get(name)) is not None}


def cloned(tensor: Tensor) -> Tensor:
    """A clone with the strides of the original, on which the last bit of a result can depend."""
    tensor = tensor.detach()
    is_strided = not is_lazy(tensor) and tensor.layout is torch.strided and not is_wrapped(tensor)
    if not is_strided or tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():  # torch resolves the last two
        return tensor.clone()
    clone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    write(clone, tensor)
    return clone


_cloned_outside_modes: Final = outside_modes(cloned)
clone_in_modes: Final = without_autograd(cloned)

# Only for F.batch_norm, which saves the statistics for backward and writes to them without a version counter increase.
# An operation that increases it, such as instance_norm, would break the backward pass of every layer that shares them.
# Shared by all layers of a shape and all guards, and never freed. Their values are never read, so threads and CUDA
# streams may write to them at the same time, and a kernel on a side stream may still do so after the block.
_scratch: Final[dict[tuple[Any, ...], Tensor]] = {}


def _clone(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.clone() if torch.compiler.is_compiling() else clone_in_modes(tensor)


def scratch_like(tensor: Tensor | None, slot: int) -> Tensor | None:
    """A scratch tensor with the shape, dtype and device of ``tensor``; a different one for each ``slot``."""
    if tensor is None:
        return None
    is_plain = type(tensor) in PLAIN and not tensor.is_neg()  # whose clone has other strides
    key = (slot, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if is_plain else ()
    found = _scratch.get(key) if is_plain else None
    if found is None:
        found = _cloned_outside_modes(tensor)
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


def forward_bound_to(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module to which the function of a guarded forward was bound anew.

    accelerate does, under mixed precision: it keeps ``model.forward.__func__``, and goes on calling it after the block.
    """
    guard = guards.get(id(module))
    if guard is None or guard.module is not module:
        return type(strip_copy(module)).forward(module, *args, **kwargs)
    return guard.run(args, kwargs)
