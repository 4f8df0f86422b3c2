"""Pool the values that one layer normalises, while it runs on copies of its buffers. See Note [Recalibration]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError
from bnguard.guard.hold import cloned
from bnguard.layers.bits import has_values
from bnguard.layers.drift import eps_of
from bnguard.layers.kinds import INSTANCE_NORM, OWN_FORWARD, StatsLayer
from bnguard.layers.moments import Moments, Share, moments_of, no_moments
from bnguard.layers.swaps import begin_swap, end_swap, own_tensors
from bnguard.torch_internals.tracing import outside_modes
from bnguard.words import first_of, layer_text

RESTORED: Final = "The original statistics have been restored"


def name_of(layer: StatsLayer) -> str:
    """Its name, as ``exclude=`` takes it."""
    return layer.names[0] or "(root)"


def text_of(layers: Sequence[StatsLayer]) -> str:
    """Names and types of the first layers."""
    return first_of([layer_text(layer.names, type(layer.module).__name__) for layer in layers])


def unknown_text(layer: StatsLayer) -> str:
    """The error about a layer of which it is not known what its statistics are."""
    return (
        f"{text_of([layer])} cannot be recalibrated: from outside it is not known that its running statistics are the "
        f"mean and variance of its input.\nLeave it out with exclude={name_of(layer)!r}"
    )


class LayerPool:
    """Pools the values that one layer normalises, while it runs on copies of its buffers.

    Attributes:
        layer: The layer.
        share: What is known so far.
    """

    def __init__(self, layer: StatsLayer) -> None:
        self.layer = layer
        self._is_per_instance = layer.kind is INSTANCE_NORM
        module = layer.module
        self._is_checked = layer.kind is OWN_FORWARD or "forward" in module.__dict__
        # Whatever forward= does to them, they are set again before each forward.
        self._flags: dict[str, object] = {"training": True, "track_running_stats": True}
        if self._is_checked:
            self._flags["momentum"] = 1.0
        self.share = Share(self._none(), 0)
        self._pending: Moments | None = None
        self._is_known = True  # whether the layer has let all its inputs be seen
        self._differs: Tensor | None = None  # on the device: whether it has learned something else

    @outside_modes
    def _none(self) -> Moments:
        mean: Any = own_tensors(self.layer.module, "_buffers")["running_mean"]
        return no_moments(mean.numel(), mean.device, is_per_instance=self._is_per_instance)

    def start(self) -> None:
        """Puts copies and hooks on the layer. ``stop()`` must have been registered before."""
        module = self.layer.module
        begin_swap(module, self._copies(), self._flags, self)
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def stop(self) -> None:
        """Takes them off again. May be done any number of times."""
        module = self.layer.module
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in table.items() if getattr(hook, "__self__", None) is self]:
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                del table[key]
        end_swap(module, self)

    @outside_modes
    def _copies(self) -> dict[str, Tensor]:
        tensors = own_tensors(self.layer.module, "_buffers")
        return {name: cloned(tensor) for name, tensor in tensors.items() if tensor is not None and has_values(tensor)}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.__dict__.update(self._flags)
        input = args[0] if args else kwargs.get("input")
        self._pending = None
        if isinstance(input, Tensor):
            if self._is_per_instance and input.dim() == getattr(module, "_get_no_batch_dim", lambda: 0)():
                input = input.unsqueeze(0)
            if input.dim() >= 2 and input.shape[1] == self.share.moments.mean.numel():  # else torch refuses it
                self._pending = self._moments(input)

    @outside_modes
    def _moments(self, input: Tensor) -> Moments:
        return moments_of(input, is_per_instance=self._is_per_instance)

    @outside_modes
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        moments, self._pending = self._pending, None
        if moments is None:
            self._is_known = False
            return
        self.share = Share(self.share.moments.merged(moments), self.share.forwards + 1)
        if self._is_checked and moments.count:
            differs = _differs(module, moments)
            self._differs = differs if self._differs is None else self._differs | differs.to(self._differs.device)

    def refuse_other_statistics(self) -> None:
        """Refuses a layer that has learned something else than the mean and variance of its input."""
        if not self._is_known or (self._differs is not None and bool(self._differs)):
            raise BNGuardError(f"{unknown_text(self.layer)}. {RESTORED}")


def _differs(module: nn.Module, moments: Moments) -> Tensor:
    """Whether the statistics that a layer has learned with momentum 1 are not those of its input. NaN never differ."""
    mean, variance = moments.mean, moments.variance + eps_of(module, 1e-5)
    learned: Any = [module._buffers["running_mean"], module._buffers["running_var"]]
    rounding = max([16 * torch.finfo(tensor.dtype).eps for tensor in learned])
    own_mean, own_variance = (tensor.detach().to(mean.device).double() for tensor in learned)
    has_other_mean = (own_mean - mean).abs() > 0.01 * variance.sqrt() + rounding * mean.abs()
    # torch itself computes a variance that is small against the mean with few digits.
    allowed = (0.02 + rounding) * variance + rounding * mean.square()
    has_other_variance = (own_variance + eps_of(module, 1e-5) - variance).abs() > allowed
    differs: Tensor = (has_other_mean | has_other_variance).any()
    return differs
