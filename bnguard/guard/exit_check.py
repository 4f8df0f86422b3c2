"""Compare statistics at the end of a block with those at its beginning, and restore them.

Note [Why the exit check proves]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Hooks can explain a change, but not prove that there was none: graphs compiled before the block, replays of CUDA graphs,
ScriptModules, DDP's broadcasts and writes to ``.data`` run no hook and increase no version counter. So the end of a
block compares the objects and the bits of all layers in one batched operation, with one synchronisation per device.

Statistics are restored through ``.data``, and only if bits differ: an ordinary ``copy_`` would increase the version
counter, and a backward pass after the block would fail.

Note [Budgets]
~~~~~~~~~~~~~~
An update within the budget becomes part of the state that a block protects: right after it, the statistics are captured
again. A write from elsewhere before that update would be captured along with it. So copies taken right before the
update are kept together with the statistics captured until then, and the exit check compares the two as well. On the
short way the copies from before and after an update are only kept, as a ``Write``. All of them are compared and
captured at once, when the state to protect is asked for; a ``Write`` that does not fit is then treated as above. In a
compiled graph no forward can be counted; the layer's own ``num_batches_tracked`` gives the number of updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Self

from torch import Tensor, nn

from bnguard.guard.affine import affine_parameters
from bnguard.guard.coverage import refuse_unreadable
from bnguard.guard.hooks import LayerGuard
from bnguard.guard.messages import Cause, protection_text
from bnguard.guard.options import Settings
from bnguard.guard.policy import Counts, UpdateCount, spend
from bnguard.layers.bits import count_of, holds
from bnguard.layers.drift import eps_of, largest_mean_shift
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer, moving_statistics
from bnguard.layers.snapshot import Difference, Snapshot
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import Moved, UsualCopy, Write
from bnguard.records import GuardedLayer, StatsChange
from bnguard.torch_internals.compile import compiled_parts, was_compiled
from bnguard.torch_internals.distributed import overwritten_by_ddp
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import outside_modes

# Pairs of copies that are kept of one layer. More are compared at once, which may wait for the device.
_PAIRS: Final = 16


class ExitCheck:
    """The statistics of a block's layers at its beginning, to compare with and to restore.

    Args:
        layers: The layers.
        settings: The options of the block.

    Attributes:
        statistics: Their running statistics.
        parameters: Their weights and biases, if ``affine=True`` freezes them; else None.
        broadcast: The rank whose statistics ``DistributedDataParallel`` has written to a layer, by the layer's first
            name, as of the last comparison.
    """

    __slots__ = (
        "_budget",
        "_is_intact",
        "_layers",
        "_lock",
        "_pairs",
        "_policy",
        "_writes",
        "broadcast",
        "parameters",
        "statistics",
    )

    def __init__(self, layers: Sequence[StatsLayer], settings: Settings) -> None:
        modules = [layer.module for layer in layers]
        self._layers = layers
        self._policy = settings.policy
        self._budget = settings.updates
        self._lock = RLock()
        self._is_intact = False
        self._pairs: dict[int, list[tuple[dict[str, Tensor], Mapping[str, Tensor]]]] = {}  # by owner
        self._writes: list[Write] = []  # within the budget, and not yet looked at
        self.broadcast: Mapping[str, int] = {}
        phrases = settings.frontend.phrases
        self.statistics = Snapshot(modules, [layer.buffers for layer in layers])
        if self.statistics.without_values():
            refuse_unreadable(layers, phrases)
        self.parameters: Snapshot | None = None
        if settings.affine:
            self.parameters = Snapshot(modules, [affine_parameters(layer) for layer in layers], "_parameters")
            if self.parameters.without_values():
                refuse_unreadable(layers, phrases, "_parameters")

    @classmethod
    def of_usual(
        cls, layers: Sequence[StatsLayer], settings: Settings, columns: list[list[Tensor]], copy: UsualCopy
    ) -> Self | None:
        """The comparison of a block that holds torch's own BatchNorm layers and nothing else; None if it takes more.

        Args:
            layers: The layers.
            settings: The options of the block, without ``affine``.
            columns: The means, variances and numbers of batches of the layers.
            copy: The copy of these.
        """
        statistics = Snapshot.of_usual([layer.module for layer in layers], columns, copy)
        if statistics is None:
            return None
        check = cls.__new__(cls)
        check._layers, check._policy, check._budget = layers, settings.policy, settings.updates
        check._lock, check._is_intact, check._pairs, check.broadcast = RLock(), False, {}, {}
        check._writes = []
        check.statistics, check.parameters = statistics, None
        return check

    def renew(self, copy: UsualCopy) -> None:
        """Takes another copy of the same statistics to compare with."""
        self.statistics.renew((copy,))

    def forget(self) -> None:
        """Drops the copy."""
        self.statistics.renew(())
        self._pairs, self._writes = {}, []

    def moved(self) -> Moved | None:
        """What the statistics ``of_usual`` layers have moved to, beyond the budget; None if they have not.

        Raises:
            RuntimeError: This takes ``compare``.
        """
        self._absorb()
        if self._pairs:
            raise RuntimeError("an update within the budget may have built on what somebody else had written")
        return self.statistics.moved()

    def captured(self, owner: int) -> Mapping[str, Tensor]:
        """What is to be the state of a layer, by buffer name; not to be written to. With a budget that may change."""
        self._absorb()
        return self.statistics.captured(owner) if self._budget else self.statistics.views(owner)

    def allowed(self, owner: int, before: Mapping[str, Tensor] | None) -> None:
        """Captures a layer again after an update within its budget. See Note [Budgets]."""
        with self._lock:  # of several threads the last one to capture must be the last one to read
            self._absorb()
            self._allow(owner, before)

    def wrote(self, write: Write) -> None:
        """Captures a layer ``of_usual`` ones again after an update within its budget, later: together with others."""
        self._writes.append(write)
        if len(self._writes) >= _PAIRS * len(self._layers):
            self._absorb()

    def _absorb(self) -> None:
        """Captures what updates within the budget have written, all at once if nobody else has written in between."""
        if not self._writes:
            return
        with self._lock:
            writes = self._writes[:]  # another thread may have been faster
            if writes and (self._pairs or not self.statistics.absorb(writes)):
                for write in writes:
                    self._allow(write.row, *write.values())
            del self._writes[: len(writes)]

    def _allow(
        self, owner: int, before: Mapping[str, Tensor] | None, after: Mapping[str, Tensor] | None = None
    ) -> None:
        pairs = self._pairs.setdefault(owner, [])
        if before is not None:
            pairs.append((self.statistics.captured(owner), before))
        if after is None:
            self.statistics.accept(owner)
        else:
            self.statistics.recapture(owner, after)
        if len(pairs) >= _PAIRS:
            self._revert(owner)

    def compare(
        self, counts: Counts, guards: Sequence[LayerGuard], name_layers: Callable[[], None]
    ) -> dict[int, StatsChange]:
        """Lists what changed, by owner.

        Args:
            counts: The observed updates.
            guards: The guard of each layer; empty if forwards were not observed.
            name_layers: Called before the first change is made of a layer.
        """
        self._is_intact = False
        self._absorb()
        has_reverted = bool(self._pairs) and any([self._revert(owner) for owner in list(self._pairs)])
        intact = self.statistics.is_intact() and not has_reverted, not self.parameters or self.parameters.is_intact()
        if all(intact):
            self._is_intact = True
            return {}
        changes: dict[int, StatsChange] = {}
        for snapshot, is_intact in zip((self.statistics, self.parameters), intact, strict=True):
            if snapshot is None or is_intact:
                continue
            is_of_statistics = snapshot is self.statistics
            differences = snapshot.changed()
            paid = self._within_budget(differences, counts, guards) if is_of_statistics else frozenset()
            for difference in differences:
                if difference.owner not in paid:
                    name_layers()
                    change = self._change(snapshot, difference, counts[self._layer_id(difference.owner)])
                    earlier = changes.get(difference.owner)
                    changes[difference.owner] = _joined(earlier, change) if earlier else change
            if is_of_statistics:
                self.broadcast = self._overwritten(changes)
        return changes

    def restore(self, *, is_compared: bool = True) -> None:
        """Restores what has changed, unless it has just been compared and found intact."""
        if not (is_compared and self._is_intact):
            self._absorb()
            for snapshot in filter(None, (self.statistics, self.parameters)):
                snapshot.restore()

    def cause(self, found: Sequence[StatsChange], model: nn.Module) -> Cause:
        """The cause of the changes that no observed forward explains, as far as it is known."""
        unseen = {change.names for change in found if not change.updates}
        if unseen <= {layer.names for layer in compiled_layers(self._layers, model)}:
            return "compiled"
        left = set(map(id, Tree(model).modules))
        gone = {layer.names for layer in self._layers if id(layer.module) not in left}
        if unseen <= gone:
            return "replaced"
        others = {layer.names for layer in self._layers if layer.kind is OTHER_BUFFERS}
        return "elsewhere" if unseen <= others else "unknown"

    @outside_modes
    def _revert(self, owner: int) -> bool:
        """Whether the last update within the budget built on what somebody else had written; if so, recaptures.

        An update that builds on what was captured until then is kept, one that builds on anything else is not. Either
        way the copies have served.
        """
        with self._lock:
            pairs = self._pairs.pop(owner, ())
            if not pairs:
                return False
            latest = self.statistics.captured(owner)
            state = pairs[0][0]
            for (_, before), after in zip(pairs, [*[then for then, _ in pairs[1:]], latest], strict=True):
                if all([holds(before[name], value) for name, value in state.items() if name in before]):
                    state = after
            if state is latest:
                return False
            self.statistics.recapture(owner, state)
            return True

    def _within_budget(
        self, differences: Sequence[Difference], counts: Counts, guards: Sequence[LayerGuard]
    ) -> frozenset[int]:
        """Owners of differences that are updates within the budget. Their current values are captured.

        Before each forward that was counted ``DistributedDataParallel`` may have overwritten the statistics with those
        of another rank: the update then began from them. An update that is under way has been paid for.
        """
        if not self._budget:
            return frozenset()
        owners = [difference.owner for difference in differences]
        modules = {owner: self._layers[owner].module for owner in owners}
        spent = [modules[owner] for owner in owners if counts[self._layer_id(owner)].within]
        overwritten = overwritten_by_ddp(spent, after_join=True) if spent else {}
        paid = []
        for owner, module in modules.items():
            if (
                id(module) in overwritten
                or (guards and guards[owner].is_under_way())
                or (was_compiled(module) and self._has_counted(owner, counts[id(module)]))
            ):
                self.statistics.accept(owner)
                paid.append(owner)
        return frozenset(paid)

    @outside_modes
    def _has_counted(self, owner: int, count: UpdateCount) -> bool:
        """Whether the number of updates, by the layer's counter, is within the budget; if so, spends it."""
        before, now = count_of(self.statistics.before(owner)), count_of(self.statistics.now(owner))
        return before is not None and now is not None and spend(count, self._budget, now - before)

    def _layer_id(self, owner: int) -> int:
        return id(self._layers[owner].module)

    def _overwritten(self, changes: Mapping[int, StatsChange]) -> dict[str, int]:
        """Layers whose change a broadcast of DDP explains: no forward updated them, and another rank decides."""
        modules = {owner: self._layers[owner].module for owner, change in changes.items() if not change.updates}
        sources = overwritten_by_ddp(modules.values()) if modules else {}
        return {
            self._layers[owner].names[0]: sources[id(module)]
            for owner, module in modules.items()
            if id(module) in sources
        }

    def _change(self, snapshot: Snapshot, difference: Difference, count: UpdateCount) -> StatsChange:
        layer = self._layers[difference.owner]
        shift = None
        if snapshot is self.statistics:
            owner = difference.owner
            shift = largest_mean_shift(snapshot.before(owner), snapshot.now(owner), eps_of(layer.module))
        seen = count.beyond if self._policy.tells_forwards and not self._policy.stops else 0
        where, inside = count.lines if seen else (None, None)
        type_name = type(layer.module).__name__
        return StatsChange(layer.names, type_name, difference.names, seen, where, shift, inside=inside)


def changes_of(
    moved: Moved, layers: Sequence[StatsLayer], counts: Mapping[int, UpdateCount], seen: Mapping[int, int]
) -> dict[int, StatsChange]:
    """What ``ExitCheck.compare`` would have listed under ``"warn"``, from the values of then and now.

    Args:
        moved: What has moved.
        layers: The layers of the block.
        counts: Where its updates came from, by the id of the layer.
        seen: How many it had seen, likewise.
    """
    changes = {}
    for owner, names, then, now in moved.layers():
        layer = layers[owner]
        key, type_name = id(layer.module), type(layer.module).__name__
        updates = seen.get(key, 0)
        where, inside = counts[key].lines if updates else (None, None)
        shift = largest_mean_shift(then, now, eps_of(layer.module))
        changes[owner] = StatsChange(layer.names, type_name, names, updates, where, shift, inside=inside)
    return changes


def change_of_forward(layer: StatsLayer, count: UpdateCount, *, prevented: bool) -> StatsChange:
    """What the updates of a layer are, before anything is compared."""
    where, inside = count.lines
    type_name = type(layer.module).__name__
    return StatsChange(layer.names, type_name, moving_statistics(layer), count.beyond, where, None, prevented, inside)


def protected_layers(
    layers: Sequence[StatsLayer], settings: Settings, model: nn.Module, without_values: frozenset[int]
) -> tuple[GuardedLayer, ...]:
    """The layers of a block, and how each is protected; ``without_values`` has the owners that cannot be compared."""
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


def _joined(one: StatsChange, other: StatsChange) -> StatsChange:
    return replace(one, buffers=one.buffers + other.buffers, mean_shift=one.mean_shift or other.mean_shift)
