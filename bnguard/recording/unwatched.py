"""Running statistics that a watch sees nothing of: those that are no buffers, and those that a model passes on."""

from __future__ import annotations

from typing import Final

from torch import nn

from bnguard.guard.unregistered import places_in, tensors_of
from bnguard.layers.kinds import is_batch_norm
from bnguard.layers.tree import Tree
from bnguard.words import first_of, layer_text, listing

_MOST: Final = 64


class Unwatched:
    """What was met of models beside layers with running statistics, each once.

    Attributes:
        has_models: Whether a model with parameters was met, whatever its layers.
    """

    def __init__(self) -> None:
        self.has_models = False
        self._bare: dict[str, None] = {}  # classes of models without such layers
        self._elsewhere: dict[int, str] = {}  # by id of the module, which may be met as a part of several models
        self._passing: dict[str, None] = {}

    def meet(self, model: nn.Module, tree: Tree) -> None:
        """Looks at a model that is met."""
        is_model = any([part._parameters for part in tree.modules])  # else it is a loss or a transform
        self.has_models = self.has_models or is_model
        if len(self._elsewhere) + len(self._passing) + len(self._bare) >= _MOST:
            return
        if is_model and not tree.layers:
            self._bare[type(model).__name__] = None
        told = {id(layer.module) for layer in tree.layers}
        for name, place, attributes in places_in(model):
            module = place()
            names = [] if module is None else tensors_of(module, attributes)
            if module is not None and names:
                told.add(id(module))
                text = f"{listing(list(names))} of {layer_text((name,), type(module).__name__)}"
                self._elsewhere[id(module)] = text
        for part in tree.modules:
            if id(part) not in told and _calls_batch_norm(part):
                self._passing[type(part).__name__] = None

    @property
    def summary(self) -> str:
        """What there was where no layer with running statistics was met."""
        if self._elsewhere:
            return "running statistics that are no buffers cannot be watched"
        where = f" in {first_of(list(self._bare))}" if self._bare else ""
        return f"no layer with running statistics was seen{where}"

    @property
    def note(self) -> str:
        """What was not watched; empty if that is nothing."""
        lines = []
        if self._elsewhere:
            lines.append(
                f"Not watched: {first_of(list(self._elsewhere.values()))}. Register them with register_buffer()."
            )
        if self._passing:
            shown = first_of(list(self._passing))
            lines.append(f"{shown} called F.batch_norm(): statistics that are passed to it are not watched.")
        return "\n".join(lines)


def _calls_batch_norm(module: nn.Module) -> bool:
    """Whether the forward of a module that is none of torch's own hands statistics to the function."""
    if type(module).__module__.startswith("torch.") or is_batch_norm(module):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "batch_norm" in code.co_names
