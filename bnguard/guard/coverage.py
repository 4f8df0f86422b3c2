"""Warn about layers and code that a block does not protect, and refuse those that it could not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning
from bnguard.guard import messages
from bnguard.guard.bystanders import bystanders_of, has_grown, is_alone
from bnguard.guard.options import Settings
from bnguard.guard.phrases import Phrases
from bnguard.guard.surroundings import has_fixed_forward
from bnguard.guard.unguarded_buffers import unguarded_buffers
from bnguard.guard.unregistered import has_only_buffers, unregistered_in
from bnguard.layers.bits import is_valueless, what_is_unreadable
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.kinds import OTHER_BUFFERS, SCRIPTED, StatsLayer, is_observer
from bnguard.layers.select import is_selected
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.swaps import Table, own_tensors
from bnguard.layers.tree import Tree, find_layers
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.programs import normalised_with_batch, script_uses_batch
from bnguard.torch_internals.tracing import is_being_recorded

_looked_beside: Final[ByIdentity[bool]] = ByIdentity()  # models on which blocks with a deferred check began


def refuse_unreadable(layers: Iterable[StatsLayer], phrases: Phrases | None, table: Table = "_buffers") -> None:
    """Refuses layers with a tensor that has values, but none that can be copied and compared.

    Args:
        layers: The layers.
        phrases: How to name the guard; None for ``assert_stats_unchanged()``.
        table: Whether to look at their statistics or at their weights and biases.

    Raises:
        BNGuardError: There is such a tensor.
    """
    from bnguard.guard.affine import affine_parameters

    for layer in layers:
        own = own_tensors(layer.module, table)
        for name in layer.buffers if table == "_buffers" else affine_parameters(layer):
            tensor = own.get(name)
            what = None if tensor is None or is_valueless(tensor) else what_is_unreadable(tensor)
            if what is not None:
                text = messages.unreadable_text(layer.names, type(layer.module).__name__, name, what, phrases)
                raise BNGuardError(text)


def refuse_batch_programs(model: nn.Module, layers: Sequence[StatsLayer]) -> None:
    """Refuses layers that would normalise with the batch under ``use_running_stats=True``: those in programs mostly.

    Raises:
        BNGuardError: There is such a layer.
    """
    for layer in layers:
        if has_fixed_forward(type(layer.module)):
            raise BNGuardError(messages.batch_program_text(layer.names, type(layer.module).__name__, "property"))
    fixed = [layer for layer in layers if layer.kind.keeps_mode or layer.kind.hold == "none"]
    with_batch = normalised_with_batch(model) if fixed else frozenset()
    for layer in fixed:
        if layer.kind is SCRIPTED:
            uses_batch = script_uses_batch(layer.module)
            if uses_batch is False or (uses_batch is None and not layer.module.training):
                continue
        elif id(own_tensors(layer.module, "_buffers").get("running_mean")) not in with_batch:
            continue
        why = "program" if layer.kind is not SCRIPTED or uses_batch is True else "script"
        raise BNGuardError(messages.batch_program_text(layer.names, type(layer.module).__name__, why))


def refuse_other_buffers(layers: Iterable[StatsLayer], settings: Settings) -> None:
    """Refuses buffers that eval mode does not hold under ``use_running_stats=True``.

    Raises:
        BNGuardError: There is such a buffer.
    """
    if not settings.buffers:
        return
    for layer in layers:
        observes = is_observer(layer.module)
        if layer.kind is OTHER_BUFFERS and (observes or layer.module._forward_pre_hooks):
            raise BNGuardError(messages.ignores_eval_text(layer, observes))


def warn_about_programs(settings: Settings) -> None:
    """Warns about a block that begins in code that is being traced or exported."""
    if is_being_recorded():
        warnings.warn(
            messages.traced_block_text(settings.frontend.phrases), BNGuardWarning, stacklevel=call_site().stacklevel
        )


def warn_about_added_layers(model: nn.Module, settings: Settings, tree: Tree, statistics: Snapshot) -> None:
    """Warns about layers that were added to the model inside the block.

    Args:
        model: The model at the end of the block.
        settings: The options of the block, which select layers.
        tree: The modules of the model at the beginning.
        statistics: The statistics that the block compares.
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
        buffers = own_tensors(layer.module, "_buffers")
        # A new layer around guarded buffers, as convert_sync_batchnorm makes them, is compared like the old one.
        is_compared = all([id(buffers[name]) in compared for name in layer.buffers])
        if not is_compared and is_selected(layer, settings.include, settings.exclude, settings.within):
            added.append(layer.names[0])
    if added:
        warnings.warn(
            messages.added_text(added, settings.frontend.phrases), BNGuardWarning, stacklevel=call_site().stacklevel
        )


def has_nothing_beside(model: nn.Module, tree: Tree) -> bool:
    """Whether an earlier block on the model has found nothing to look after beside its layers."""
    return is_alone(model, tree) and has_only_buffers(model)


def found_beside(
    model: nn.Module, tree: Tree, guarded: Sequence[StatsLayer], settings: Settings
) -> list[Callable[[], None]]:
    """Functions to call at the end of a block, which warn of what has moved since this call.

    They read tensors, so a block whose check is deferred has them only if it is the first one on the model.

    Args:
        model: The model.
        tree: Its modules.
        guarded: What the block guards.
        settings: The options of the block.
    """
    if settings.check == "deferred":
        if _looked_beside.get(model):
            return []
        _looked_beside.put(model, value=True)
    is_new = has_grown(model, tree)
    found = (
        bystanders_of(model, (model,), tree),
        unguarded_buffers(model, tree, guarded, settings),
        unregistered_in(model, settings, is_new=is_new),
    )
    return [partial(beside.tell, settings.frontend.phrases) for beside in found if beside is not None]


def warn_about_pending_regions(regions: Iterable[Region], settings: Settings) -> None:
    """Warns about checkpointed regions whose backward pass has not been run yet."""
    if any([region.is_pending() for region in regions]):
        text = _pending_text(settings.use_running_stats, settings.frontend.phrases)
        warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)


def _pending_text(in_eval_mode: bool, phrases: Phrases) -> str:
    """The warning about a checkpointed region whose backward pass has not been run when the block ends."""
    consequence = (
        "normalise with the batch: torch raises CheckpointError, or computes wrong gradients (use_reentrant=True)"
        if in_eval_mode
        else "update the running statistics"
    )
    return (
        f"a checkpointed region was run inside {phrases.place}, and its backward pass has not been run there.\n"
        f"That pass recomputes the region, without the guard, and will {consequence}.\n"
        "Call backward() inside the block, or run the region under torch.no_grad() if it needs no gradient."
    )
