"""Hold the weights and biases of layers: no gradient reaches them, and no optimizer moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.kinds import StatsLayer, tensor_table
from bnguard.torch_internals.turns import Turn

__all__ = ["AffineHold", "affine_parameters", "unheld"]


def affine_parameters(layer: StatsLayer) -> tuple[str, ...]:
    """Names of the layer's affine parameters: ``weight`` and ``bias``, where they have the shape of its statistics."""
    buffers, parameters = (tensor_table(layer.module, table) for table in ("_buffers", "_parameters"))
    shapes = {
        tensor.shape for name in layer.buffers if (tensor := buffers.get(name)) is not None and not is_lazy(tensor)
    }
    names = []
    for name in ("weight", "bias"):
        parameter = parameters.get(name)
        if parameter is not None and (is_lazy(parameter) or parameter.shape in shapes):
            names.append(name)
    return tuple(names)


@dataclass(slots=True)
class _Held:
    parameter: Tensor
    requires_grad: bool
    grad: Tensor | None
    holders: int
    double: nn.Parameter | None = None


# Blocks of several threads may overlap and end in any order: the first one in saves, the last one out restores.
_held: Final[dict[int, _Held]] = {}
_turn: Final = Turn()


class AffineHold:
    """Holds some parameters until ``release``: ``requires_grad`` is off and ``grad`` is None.

    A parameter without a gradient is passed over by torch's optimizers, weight decay and momentum included. A zero
    gradient would not do. Releasing twice does nothing.
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: list[Tensor] = []

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Holds ``parameters`` as well; each one is released by ``release`` even if a later one fails."""
        for parameter in parameters:
            with _turn:
                held = _held.get(id(parameter))
                if held is None:
                    held = _held[id(parameter)] = _Held(parameter, parameter.requires_grad, parameter.grad, 0)
                held.holders += 1
                self._taken.append(parameter)
            parameter.requires_grad = False
            parameter.grad = None

    def release(self) -> None:
        """Gives each parameter the flag and the gradient that it had before anybody held it."""
        if self._taken:
            _turn.end(self._release)

    def _release(self) -> None:
        while self._taken:
            held = _held[id(self._taken[-1])]
            if held.holders == 1:
                held.parameter.requires_grad = held.requires_grad
                held.parameter.grad = _fitting(held.grad, held.parameter)
                del _held[id(held.parameter)]
            else:
                held.holders -= 1
            self._taken.pop()


def unheld(parameter: nn.Parameter) -> nn.Parameter:
    """What a copy of a module should get for ``parameter``: the same data, with the flag that it has when not held."""
    with _turn:
        held = _held.get(id(parameter))
        if held is None or held.requires_grad == parameter.requires_grad:
            return parameter
        # One, so that ties stay ties.
        if is_lazy(parameter):
            if held.double is None:
                held.double = type(parameter)(held.requires_grad, parameter.device, parameter.dtype)
        elif held.double is None or is_lazy(held.double) or held.double.data_ptr() != parameter.data_ptr():
            held.double = nn.Parameter(parameter.data, held.requires_grad)
        return held.double


def _fitting(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient as the parameter is now, if it was converted in the meantime."""
    if grad is None or grad.shape != parameter.shape:
        return None
    return grad.to(parameter.device, parameter.dtype)
