"""What there is to say about changes of a block's layers: names, lines, drift and causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final

from torch import nn

from bnguard.guard.messages import Cause, protection_text
from bnguard.guard.options import Settings
from bnguard.guard.policy import Counts, Policy, UpdateCount
from bnguard.layers.comparison import Moved
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer, moving_statistics
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import FlatDifference
from bnguard.torch_internals.compile import compiled_parts, was_compiled
from bnguard.torch_internals.distributed import overwritten_by_ddp

if TYPE_CHECKING:
    from bnguard.records import GuardedLayer, StatsChange

_NONE: Final[Mapping[int, StatsChange]] = {}


class KnownChanges:
    """What is known to have changed in a block: what comparisons have found, and what its forwards have shown since.

    Args:
        layers: The layers of the block.
        policy: Its policy.
    """

    __slots__ = ("_found", "_found_later", "_layers", "_policy", "_verified")

    def __init__(self, layers: Sequence[StatsLayer], policy: Policy) -> None:
        self._layers = layers
        self._policy = policy
        self._found: Mapping[int, StatsChange] = _NONE  # by owner: what a comparison found
        self._found_later: Callable[[], Mapping[int, StatsChange]] | None = None  # the same, once it is asked for
        self._verified: Mapping[int, int] = {}  # by layer: updates when it was last compared

    @property
    def is_compared(self) -> bool:
        """Whether a comparison has found something, or has confirmed updates."""
        return bool(self._found or self._verified)

    def take(self, found: Mapping[int, StatsChange], counts: Counts) -> None:
        """Adds what a comparison has found, by owner, after the updates in ``counts``."""
        if not (found or self._found or counts):
            return
        # Where nothing is put back, what changed before has been found again.
        self._found = {**self._found, **found} if self._policy.puts_back else found
        self._verified = {layer: count.beyond for layer, count in dict(counts).items() if count.beyond}

    def take_later(
        self, moved: Sequence[FlatDifference], counts: Mapping[int, UpdateCount], seen: Mapping[int, int]
    ) -> None:
        """Takes what has moved, if anything has, as all that was found; see ``changes_of``."""
        self._verified = seen
        self._found_later = partial(changes_of, moved, self._layers, counts, seen)

    def listed(
        self, counts: Mapping[int, UpdateCount], change: Callable[[StatsLayer], StatsChange]
    ) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the order of the layers.

        Args:
            counts: The updates that the block has seen.
            change: Makes the change of a layer whose updates have not been compared.
        """
        later = self._found_later
        if later is not None:
            self._found, self._found_later = later(), None
        if not self._found and not any([count.beyond for count in counts.values()]):
            return ()
        changes = []
        policy = self._policy
        for owner, layer in enumerate(self._layers):
            layer_id = id(layer.module)
            seen = counts[layer_id].beyond if layer_id in counts else 0
            has_news = seen > (0 if policy.stops else self._verified.get(layer_id, 0))
            if owner in self._found and not (has_news and policy.only_without_grad):
                changes.append(self._found[owner])
            elif has_news:
                changes.append(change(layer))
        return tuple(changes)


def changes_of(
    differences: Sequence[FlatDifference],
    layers: Sequence[StatsLayer],
    counts: Mapping[int, UpdateCount],
    seen: Mapping[int, int],
) -> dict[int, StatsChange]:
    """What ``ExitCheck.compare`` would have listed under ``"warn"``, from the values of then and now.

    Args:
        differences: What has moved.
        layers: The layers of the block.
        counts: Where its updates came from, by the id of the layer.
        seen: How many it had seen, likewise.
    """
    from bnguard.layers.drift import eps_of

    changes = {}
    for moved in chain.from_iterable([difference.layers() for difference in differences]):
        layer = layers[moved.owner]
        about = layer.names, type(layer.module).__name__, eps_of(layer.module)
        key = id(layer.module)
        changes[moved.owner] = change_of(moved, about, seen.get(key, 0), counts.get(key))
    return changes


def updates_told(count: UpdateCount, policy: Policy) -> int:
    """The number of updates that explain what a comparison finds of a layer."""
    return count.beyond if policy.tells_forwards and not policy.stops else 0


def change_of(
    moved: Moved, about: tuple[tuple[str, ...], str, float | None], updates: int, count: UpdateCount | None
) -> StatsChange:
    """What a comparison has found of one layer.

    Args:
        moved: What has moved.
        about: The names of the layer, the name of its class, and its ``eps``; None for other values than statistics,
            which have no mean to shift.
        updates: The number of updates that explain it.
        count: Where they came from, if there are any.
    """
    from bnguard.layers.drift import largest_mean_shift
    from bnguard.records import StatsChange

    names, type_name, eps = about
    where, inside = count.lines if updates and count is not None else (None, None)
    shift = None if eps is None else largest_mean_shift(moved.before, moved.now, eps)
    return StatsChange(names, type_name, moved.names, updates, where, shift, inside=inside)


def change_of_forward(layer: StatsLayer, count: UpdateCount, *, prevented: bool) -> StatsChange:
    """What the updates of a layer are, before anything is compared."""
    from bnguard.records import StatsChange

    where, inside = count.lines
    type_name = type(layer.module).__name__
    return StatsChange(layer.names, type_name, moving_statistics(layer), count.beyond, where, None, prevented, inside)


def protected_layers(
    layers: Sequence[StatsLayer], settings: Settings, model: nn.Module, without_values: frozenset[int]
) -> tuple[GuardedLayer, ...]:
    """The layers of a block, and how each is protected; ``without_values`` has the owners that cannot be compared."""
    from bnguard.records import GuardedLayer

    compiled = {id(layer.module) for layer in compiled_layers(layers, model)}
    found = []
    for owner, layer in enumerate(layers):
        is_compiled, has_values = id(layer.module) in compiled, owner not in without_values
        how = protection_text(layer, settings.policy, settings.updates, is_compiled, has_values)
        found.append(GuardedLayer(layer.names, type(layer.module).__name__, layer.buffers, how))
    return tuple(found)


def compiled_layers(layers: Sequence[StatsLayer], model: nn.Module) -> list[StatsLayer]:
    """The layers that compiled graphs run, as far as that can be known."""
    parts = compiled_parts(model)
    return [layer for layer in layers if id(layer.module) in parts or was_compiled(layer.module)]


def cause_of(found: Sequence[StatsChange], layers: Sequence[StatsLayer], model: nn.Module) -> Cause:
    """The cause of changes of some layers that no observed forward explains, as far as it is known."""
    unseen = {change.names for change in found if not change.updates}
    if unseen <= {layer.names for layer in compiled_layers(layers, model)}:
        return "compiled"
    left = set(map(id, Tree(model).modules))
    gone = {layer.names for layer in layers if id(layer.module) not in left}
    if unseen <= gone:
        return "replaced"
    others = {layer.names for layer in layers if layer.kind is OTHER_BUFFERS}
    return "elsewhere" if unseen <= others else "unknown"


def overwritten(changes: Mapping[int, StatsChange], layers: Mapping[int, StatsLayer]) -> dict[str, int]:
    """Layers whose change a broadcast of DDP explains: no forward updated them, and another rank decides.

    Args:
        changes: The changes by owner.
        layers: The layers by owner.
    """
    owners = [owner for owner, change in changes.items() if not change.updates and owner in layers]
    sources = overwritten_by_ddp([layers[owner].module for owner in owners]) if owners else {}
    ranks = {layers[owner].names[0]: sources.get(id(layers[owner].module)) for owner in owners}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def joined(one: StatsChange, other: StatsChange) -> StatsChange:
    """One change of two of the same layer."""
    return replace(one, buffers=one.buffers + other.buffers, mean_shift=one.mean_shift or other.mean_shift)
