"""Say out loud what a block does not cover."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from bnguard.errors import BNGuardWarning
from bnguard.guard import messages as _report
from bnguard.guard.options import Settings
from bnguard.layers.kinds import EXPORTED, StatsLayer, tensor_table
from bnguard.layers.select import is_selected
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.tree import Tree, find_layers
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.tracing import is_being_taken_down

__all__ = ["warn_about_added_layers", "warn_about_fixed_modes", "warn_about_pending_regions", "warn_about_programs"]


def warn_about_fixed_modes(layers: Iterable[StatsLayer], settings: Settings) -> None:
    """Warns of layers that cannot be told to use their running statistics."""
    if not settings.use_running_stats:
        return
    layer = next((layer for layer in layers if layer.kind is EXPORTED), None)
    if layer is not None:
        text = _report.fixed_mode_text(layer.names, type(layer.module).__name__)
        warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)


def warn_about_programs(settings: Settings) -> None:
    """Warns of a block that code opens while it is traced or exported."""
    if is_being_taken_down():
        warnings.warn(
            _report.traced_block_text(settings.frontend.phrases), BNGuardWarning, stacklevel=call_site().stacklevel
        )


def warn_about_added_layers(model: nn.Module, settings: Settings, tree: Tree, statistics: Snapshot) -> None:
    """Warns of layers that came into the model while the block was open.

    Args:
        model: The model as it is now.
        settings: Which of its layers were to be guarded.
        tree: The model as it was.
        statistics: What is compared.
    """
    if tree.has_same_modules():
        return
    known = {id(layer.module) for layer in tree.layers}
    owners = range(len(statistics.modules))
    compared = {id(tensor) for owner in owners for tensor in statistics.objects_of(owner)}
    added = []
    for layer in find_layers(model):
        if id(layer.module) in known:
            continue
        buffers = tensor_table(layer.module, "_buffers")
        # A new layer around guarded buffers, as convert_sync_batchnorm makes them, is compared like the old one.
        is_compared = all([id(buffers[name]) in compared for name in layer.buffers])
        if not is_compared and is_selected(layer, settings.include, settings.exclude, settings.within):
            added.append(layer.names[0])
    if added:
        warnings.warn(
            _report.added_text(added, settings.frontend.phrases), BNGuardWarning, stacklevel=call_site().stacklevel
        )


def warn_about_pending_regions(regions: Iterable[Region], settings: Settings) -> None:
    """Warns of checkpointed regions whose backward pass is still to come."""
    if any([region.is_pending() for region in regions]):
        text = _report.pending_text(settings.use_running_stats, settings.frontend.phrases)
        warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
