"""Running statistics that are no buffers: parameters and plain attributes, which a block neither holds nor restores.

Its end says, once for each module, which of them moved. They are recognised by their names.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.jit import ScriptModule

from bnguard.errors import BNGuardWarning
from bnguard.guard.hold import copies_outside_modes
from bnguard.guard.options import Settings
from bnguard.guard.phrases import Phrases
from bnguard.layers.bits import has_values, same_bits
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.kinds import OWN_FORWARD, StatsLayer, is_statistic
from bnguard.layers.select import is_selected
from bnguard.layers.tree import walk_modules
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import unwrapped_tensor
from bnguard.words import first_of, layer_text, listing

_Places = tuple[tuple[str, "weakref.ref[nn.Module]", tuple[str, ...]], ...]

_known: Final[ByIdentity[_Places]] = ByIdentity()  # of a model: they are looked for once
_told: Final[ByIdentity[bool]] = ByIdentity()  # modules of which a user has been told


class Unregistered:
    """Such statistics at the beginning of a block.

    Args:
        before: For each module its name, and copies of the statistics by attribute.
    """

    __slots__ = ("_before",)

    def __init__(self, before: list[tuple[str, nn.Module, dict[str, Tensor]]]) -> None:
        self._before = before

    def tell(self, phrases: Phrases) -> None:
        """Warns about those that have moved in train mode. A copy that an average is written to is in eval mode."""
        moved = []
        for name, module, values in self._before:
            names = _differing(module, values) if module.training else []
            if names:
                moved.append((name, type(module).__name__, names))
                _told.put(module, value=True)
        if moved:
            text = _unregistered_text(moved, phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)


def unregistered_in(model: nn.Module, settings: Settings, *, is_new: bool = False) -> Unregistered | None:
    """The running statistics of a model that are no buffers; None if there are none.

    Args:
        model: The model.
        settings: The options of the block, which select modules.
        is_new: Whether the model has changed since they were looked for.
    """
    known = None if is_new else _known.get(model)
    if known is None:
        known = tuple(places_in(model))
        _known.put(model, known)
    before = []
    for name, place, attributes in known:
        module = place()
        if module is None or _told.get(module):
            continue
        layer = StatsLayer(module, (name,), attributes, OWN_FORWARD)
        if is_selected(layer, settings.include, settings.exclude, settings.within):
            values = copies_outside_modes(tensors_of(module, attributes))
            if values:
                before.append((name, module, values))
    return Unregistered(before) if before else None


def has_only_buffers(model: nn.Module) -> bool:
    """Whether a model was found to have no such statistics."""
    return _known.get(model) == ()


def places_in(model: nn.Module) -> Iterator[tuple[str, weakref.ref[nn.Module], tuple[str, ...]]]:
    """The modules of a model with parameters and attributes that have the name of a statistic, and these names."""
    for name, module in walk_modules(model):
        if isinstance(module, ScriptModule):  # whose tables are no dictionaries
            continue
        names = [key for key in (*module._parameters, *module.__dict__) if is_statistic(key)]
        if names:
            yield name, weakref.ref(module), tuple(names)


def tensors_of(module: nn.Module, attributes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those that are tensors at the moment, and that no optimizer trains."""
    found: dict[str, Any] = {name: module._parameters.get(name, module.__dict__.get(name)) for name in attributes}
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and not value.requires_grad}


@outside_modes
def _differing(module: nn.Module, values: dict[str, Tensor]) -> list[str]:
    now = {name: unwrapped_tensor(tensor) for name, tensor in tensors_of(module, tuple(values)).items()}
    return [name for name, tensor in now.items() if has_values(tensor) and not same_bits(tensor, values[name])]


def _unregistered_text(modules: Sequence[tuple[str, str, Sequence[str]]], phrases: Phrases) -> str:
    """The warning about running statistics that are no buffers and moved."""
    shown = first_of([f"{listing(names)} of {layer_text((place,), cls)}" for place, cls, names in modules])
    return (
        f"also moved inside {phrases.place}, not guarded: {shown}.\n"
        "They are no buffers: with register_buffer() they are, and can be guarded."
    )
