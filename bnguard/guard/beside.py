"""All that may move beside the statistics that a block guards, and that its end tells of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from bnguard.guard.bystanders import bystanders_of, unguarded_buffers
from bnguard.guard.options import Settings
from bnguard.guard.unregistered import unregistered_in
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.tree import Tree


def found_beside(
    model: nn.Module, tree: Tree, guarded: Sequence[StatsLayer], settings: Settings
) -> list[Callable[[], None]]:
    """Functions to call at the end of a block, which warn of what has moved since this call.

    Args:
        model: The model.
        tree: Its modules.
        guarded: What the block guards.
        settings: The options of the block.
    """
    phrases = settings.frontend.phrases
    bystanders = bystanders_of(model, (model,))
    others = unguarded_buffers(model, tree, guarded, settings)
    unregistered = unregistered_in(model)
    return [
        *[partial(found.tell, phrases) for found in (bystanders, others) if found is not None],
        *[partial(found.tell, settings) for found in (unregistered,) if found is not None],
    ]
