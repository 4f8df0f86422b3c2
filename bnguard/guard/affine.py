"""Freeze the weights and biases of layers: they get no gradient, and no optimizer changes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer
from bnguard.layers.swaps import own_tensors
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import unseen


@unseen
def affine_parameters(layer: StatsLayer) -> tuple[str, ...]:
    """Names of the layer's affine parameters: ``weight`` and ``bias``, if they have the shape of its statistics."""
    if layer.kind is OTHER_BUFFERS:
        return ()
    buffers, parameters = (own_tensors(layer.module, table) for table in ("_buffers", "_parameters"))
    shapes = {
        tensor.shape for name in layer.buffers if (tensor := buffers.get(name)) is not None and not is_lazy(tensor)
    }
    names = []
    for name in ("weight", "bias"):
        parameter = parameters.get(name)
        if parameter is not None and (is_lazy(parameter) or parameter.shape in shapes):
            names.append(name)
    return tuple(names)


class _Held:
    """The state of a parameter that at least one block keeps frozen.

    Attributes:
        parameter: The parameter.
        requires_grad: Its flag before the first block froze it.
        grad: Its gradient at that time.
        holders: The holds on it, as the keys of a dictionary. See Note [Interruption] for how they change.
        double: The parameter for copies of its module, created when it is first needed.
    """

    __slots__ = ("double", "grad", "holders", "parameter", "requires_grad")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.requires_grad = parameter.requires_grad
        self.grad = parameter.grad
        self.holders: dict[AffineHold, None] = {}
        self.double: nn.Parameter | None = None

    def sync(self) -> None:
        """Makes the parameter conform to ``holders``. May be run at any time; starts over if they have changed."""
        parameter, key = self.parameter, id(self.parameter)
        while True:
            holders = tuple(self.holders)
            if holders:
                if _held.setdefault(key, self) is self:
                    parameter.requires_grad = False
                    parameter.grad = None
            elif _held.get(key) is self:
                parameter.requires_grad = self.requires_grad
                parameter.grad = _converted_grad(self.grad, parameter)
                del _held[key]
            if tuple(self.holders) == holders:
                return


# Blocks of several threads may overlap and end in any order: the first one to begin saves, the last to end restores.
_held: Final[dict[int, _Held]] = {}
_lock: Final = RLock()
renew_after_fork(_lock)


class AffineHold:
    """Freezes parameters until ``release()``: ``requires_grad`` is False and ``grad`` is None.

    torch's optimizers skip a parameter whose ``grad`` is None. With a zero gradient they would still apply weight decay
    and momentum. Releasing twice does nothing.
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: list[_Held] = []

    @unseen
    def take(self, parameters: Sequence[Tensor]) -> None:
        """Freezes ``parameters`` as well. If it raises, ``release()`` still restores those that were frozen before."""
        for parameter in parameters:
            key = id(parameter)
            with _lock:
                while True:
                    held = _held.get(key)
                    if held is None:
                        held = _Held(parameter)
                    self._taken.append(held)
                    held.holders[self] = None
                    held.sync()
                    if _held.get(key) is held:
                        break

    @unseen
    def release(self) -> None:
        """Restores the flag and gradient of each parameter that no other block keeps frozen."""
        for held in tuple(self._taken):
            with _lock:
                held.holders.pop(self, None)
                held.sync()
        self._taken.clear()


def unheld(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter for a copy of a module: the data of ``parameter``, with its flag from before it was frozen."""
    with _lock:
        held = _held.get(id(parameter))
        if held is None or held.requires_grad == parameter.requires_grad:
            return parameter
        # One for all copies, so that tied parameters stay tied.
        if is_lazy(parameter):
            if held.double is None:
                held.double = type(parameter)(held.requires_grad, parameter.device, parameter.dtype)
        elif held.double is None or is_lazy(held.double) or held.double.data_ptr() != parameter.data_ptr():
            held.double = nn.Parameter(parameter.data, held.requires_grad)
        return held.double


def _converted_grad(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Converts a saved gradient to the parameter's current dtype and device; None if the shape has changed."""
    if grad is None or grad.shape != parameter.shape:
        return None
    return grad.to(parameter.device, parameter.dtype)
