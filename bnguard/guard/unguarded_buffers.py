"""Buffers of a model that are no running statistics: without ``buffers=`` a block neither holds nor restores them.

Its end says, once for each module, which of them moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

from bnguard.errors import BNGuardWarning
from bnguard.guard.options import Settings
from bnguard.guard.phrases import Phrases
from bnguard.layers.bits import has_values
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.kinds import StatsLayer, is_observer
from bnguard.layers.other_buffers import full_name, other_buffers
from bnguard.layers.select import is_selected
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree
from bnguard.torch_internals.callsite import call_site
from bnguard.words import first_of

_LARGEST: Final = 1 << 20  # values of a buffer that is looked at
_told: Final[ByIdentity[bool]] = ByIdentity()  # modules of which a user has been told


class UnguardedBuffers:
    """The buffers of a model that are no running statistics, at the beginning of a block.

    Args:
        layers: The modules that own them.
    """

    __slots__ = ("_layers", "_values")

    def __init__(self, layers: Sequence[StatsLayer]) -> None:
        self._layers = layers
        self._values = Snapshot([layer.module for layer in layers], [layer.buffers for layer in layers])

    def tell(self, phrases: Phrases) -> None:
        """Warns once about those that have moved in train mode. One that was removed has not."""
        moved = []
        for difference in [] if self._values.is_intact() else self._values.changed():
            layer = self._layers[difference.owner]
            own = own_tensors(layer.module, "_buffers")
            names = [name for name in difference.names if own.get(name) is not None]
            if names and layer.module.training and not _told.get(layer.module):
                _told.put(layer.module, value=True)
                moved += [full_name(layer.names[0], name) for name in names]
        if moved:
            warnings.warn(_others_text(moved, phrases), BNGuardWarning, stacklevel=call_site().stacklevel)


def unguarded_buffers(
    model: nn.Module, tree: Tree, guarded: Sequence[StatsLayer], settings: Settings
) -> UnguardedBuffers | None:
    """The buffers that a block does not guard, beside layers that it does; None if there are none to tell of.

    Where the block lets updates happen, or is for training with frozen statistics, they are meant to move; observers of
    quantisation are until they are disabled.

    Args:
        model: The model.
        tree: Its modules.
        guarded: What the block guards.
        settings: The options of the block.
    """
    policy = settings.policy
    if not guarded or settings.updates or not policy.puts_back or policy.normalises_with == "running":
        return None
    if not tree.has_other_buffers():
        return None
    names = {id(layer.module): layer.buffers for layer in guarded}
    layers = []
    for layer in other_buffers(model, tree.layers):
        is_meant = is_selected(layer, settings.include, settings.exclude, settings.within)
        if _told.get(layer.module) or is_observer(layer.module) or not is_meant:
            continue
        own = own_tensors(layer.module, "_buffers")
        left = [name for name in layer.buffers if name not in names.get(id(layer.module), ())]
        left = [name for name in left if (tensor := own[name]) is not None and _is_small(tensor)]
        if left:
            layers.append(StatsLayer(layer.module, layer.names, tuple(left), layer.kind))
    return UnguardedBuffers(layers) if layers else None


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor can be copied at each block: not a queue of a million values, nor what has none."""
    return has_values(tensor) and tensor.numel() <= _LARGEST


def _others_text(names: Sequence[str], phrases: Phrases) -> str:
    """The warning about buffers that are no running statistics and moved."""
    return (
        f"also moved inside {phrases.place}, not guarded: {first_of(names)}.\n"
        "They are buffers, but no running statistics of a normalisation layer. To guard them, or some of them:\n"
        + "\n".join(phrases.choices(('buffers="all"', "or patterns on their names")))
    )
