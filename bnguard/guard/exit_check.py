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

import itertools
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, not_
from typing import TYPE_CHECKING, Final, Self

from torch import Tensor, nn

from bnguard.guard.changes import cause_of, change_of, joined, overwritten, updates_told
from bnguard.guard.coverage import refuse_unreadable
from bnguard.guard.hooks import LayerGuard
from bnguard.guard.messages import Cause
from bnguard.guard.options import Settings
from bnguard.guard.policy import Counts, UpdateCount, spend
from bnguard.layers.bits import count_of, holds
from bnguard.layers.comparison import Comparison, Moved, any_differ, comparison_of
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.snapshot import Difference, Snapshot
from bnguard.layers.usual_copy import FlatDifference, UsualCopy, Write
from bnguard.torch_internals.compile import was_compiled
from bnguard.torch_internals.distributed import overwritten_by_ddp
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import outside_modes

if TYPE_CHECKING:
    from bnguard.records import StatsChange

_BEYOND: Final = attrgetter("beyond")
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
        is_used: Whether there is something to ``forget()``.
    """

    __slots__ = (
        "_budget", "_differing", "_layers", "_lock", "_pairs", "_policy", "_usual", "_writes", "broadcast",
        "is_used", "parameters", "statistics",
    )  # fmt: skip

    def __init__(self, layers: Sequence[StatsLayer], settings: Settings) -> None:
        modules = [layer.module for layer in layers]
        self._layers = layers
        self._policy = settings.policy
        self._budget = settings.updates
        self._lock = RLock()
        self._differing: tuple[Snapshot, ...] = ()  # as of the last comparison
        self._pairs: dict[int, list[tuple[dict[str, Tensor], Mapping[str, Tensor]]]] = {}  # by owner
        self._writes: list[Write] = []  # within the budget, and not yet looked at
        self._usual: UsualCopy  # of ``of_usual`` layers
        self.broadcast: Mapping[str, int] = {}
        self.is_used = False
        phrases = settings.frontend.phrases
        is_flat = settings.check == "deferred"
        self.statistics = Snapshot(modules, [layer.buffers for layer in layers], is_flat=is_flat)
        if self.statistics.without_values():
            refuse_unreadable(layers, phrases)
        self.parameters: Snapshot | None = None
        if settings.affine:
            from bnguard.guard.affine import affine_parameters

            names = [affine_parameters(layer) for layer in layers]
            self.parameters = Snapshot(modules, names, "_parameters", is_flat=is_flat)
            if self.parameters.without_values():
                refuse_unreadable(layers, phrases, "_parameters")

    @classmethod
    def of_usual(
        cls, layers: Sequence[StatsLayer], settings: Settings, columns: list[list[Tensor]], copy: UsualCopy
    ) -> Self:
        """The comparison of a block that holds torch's own BatchNorm layers and nothing else.

        Args:
            layers: The layers.
            settings: The options of the block, without ``affine``.
            columns: The means, variances and numbers of batches of the layers.
            copy: The copy of these.
        """
        statistics = Snapshot.of_usual([layer.module for layer in layers], columns, copy)
        check = cls.__new__(cls)
        check._layers, check._policy, check._budget = layers, settings.policy, settings.updates
        check._lock, check._differing, check._pairs, check._writes, check.broadcast = RLock(), (), {}, [], {}
        check.statistics, check.parameters, check._usual, check.is_used = statistics, None, copy, False
        return check

    def renew(self, copy: UsualCopy) -> None:
        """Takes another copy of the same statistics to compare with."""
        self._usual = copy
        self.statistics.renew(copy)

    def forget(self) -> None:
        """Drops what refers to the copy, or was made of it."""
        self.statistics.forget()
        self._pairs, self._writes, self.is_used = {}, [], False

    def moved(self) -> list[FlatDifference]:
        """What the statistics ``of_usual`` layers have moved to, beyond the budget; nothing if they have not.

        Raises:
            RuntimeError: This takes ``compare``.
        """
        if self._writes:
            self._absorb()
        if self._pairs or self.statistics.has_other_forms:
            raise RuntimeError("an update within the budget may have built on what somebody else had written")
        return self._usual.moved()

    def captured(self, owner: int) -> Mapping[str, Tensor]:
        """What is to be the state of a layer, by buffer name; not to be written to. With a budget that may change."""
        self.is_used = True
        if not self._budget:
            return self.statistics.views(owner)
        with self._lock:  # no other thread captures meanwhile
            self._absorb()
            return self.statistics.captured(owner)

    def allowed(self, owner: int, before: Mapping[str, Tensor] | None) -> None:
        """Captures a layer again after an update within its budget. See Note [Budgets]."""
        with self._lock:  # of several threads the last one to capture must be the last one to read
            self.is_used = True
            self._absorb()
            self._allow(owner, before)

    def wrote(self, write: Write) -> None:
        """Captures a layer ``of_usual`` ones again after an update within its budget, later: together with others."""
        self.is_used = True
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
                for row, before, after, layout in writes:  # its own: the layer may have been converted since
                    self._allow(row, layout.by_name(0, before), layout.by_name(0, after))
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
        self._absorb()
        self._differing = tuple(filter(None, (self.statistics, self.parameters)))
        self.is_used = True
        intact = self._intact(counts)
        changes: dict[int, StatsChange] = {}
        self._differing = tuple(itertools.compress(self._differing, map(not_, intact)))
        for snapshot in self._differing:
            is_of_statistics = snapshot is self.statistics
            differences = snapshot.changed()
            paid = self._within_budget(differences, counts, guards) if is_of_statistics else frozenset()
            for difference in differences:
                if difference.owner not in paid:
                    name_layers()
                    change = self._change(snapshot, difference, counts[self._layer_id(difference.owner)])
                    earlier = changes.get(difference.owner)
                    changes[difference.owner] = joined(earlier, change) if earlier else change
            if is_of_statistics:
                self.broadcast = overwritten(changes, dict(enumerate(self._layers)))
        return changes

    def _intact(self, counts: Counts) -> tuple[bool, bool]:
        """Whether nothing has changed of the statistics, and of the parameters."""
        expects_changes = self._expects_changes(counts)
        is_worth_it = self.statistics.waits and (bool(self._pairs) or not expects_changes)
        if is_worth_it and (intact := self._intact_in_one_read()) is not None:
            return intact
        has_reverted = bool(self._pairs) and any([self._revert(owner) for owner in list(self._pairs)])
        is_intact = not expects_changes and self.statistics.is_intact()
        return is_intact and not has_reverted, not self.parameters or self.parameters.is_intact()

    def _intact_in_one_read(self) -> tuple[bool, bool] | None:
        """``_intact`` of what is on a device; None where that takes more."""
        with self._lock:
            both = [pair for pairs in self._pairs.values() for then, before in pairs for pair in _common(then, before)]
            compared = [snapshot.compared() for snapshot in self._differing]
            comparisons = [each for each in (comparison_of(both), *compared) if each is not None]
            if len(comparisons) <= len(compared):
                return None
            for comparison in comparisons:
                comparison.launch()
            has_unknown, *differ = any_differ(comparisons)
            if has_unknown:  # an update built on what somebody else had written
                return None
            self._pairs.clear()
        return not differ[0], not any(differ[1:])

    def launch(self) -> list[Comparison] | None:
        """Compares, and restores, without waiting for the result; None, with nothing done, where it has to be read."""
        snapshots = list(filter(None, (self.statistics, self.parameters)))
        comparisons = [comparison for snapshot in snapshots if (comparison := snapshot.compared()) is not None]
        if len(comparisons) < len(snapshots):
            return None
        for comparison in comparisons:
            comparison.launch()
        if self._policy.puts_back:
            for snapshot in snapshots:
                snapshot.write_back()
        return comparisons

    def _expects_changes(self, counts: Counts) -> bool:
        """Whether statistics on a device have moved in all likelihood: the values are then read in the first place."""
        lets_update = self._policy.action == "update" and (self._policy.hides or any(map(_BEYOND, counts.values())))
        return lets_update and self.statistics.waits

    def restore(self, *, is_compared: bool = True) -> None:
        """Restores what has changed; of what has just been compared, only what was found to differ."""
        self.is_used = True
        snapshots = self._differing if is_compared else tuple(filter(None, (self.statistics, self.parameters)))
        if snapshots:
            self._absorb()
        for snapshot in snapshots:
            snapshot.restore(is_compared=is_compared)

    def cause(self, found: Sequence[StatsChange], model: nn.Module) -> Cause:
        """The cause of the changes that no observed forward explains, as far as it is known."""
        return cause_of(found, self._layers, model)

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

    def _change(self, snapshot: Snapshot, difference: Difference, count: UpdateCount) -> StatsChange:
        from bnguard.layers.drift import eps_of

        owner, layer = difference.owner, self._layers[difference.owner]
        eps = eps_of(layer.module) if snapshot is self.statistics else None
        moved = Moved(owner, difference.names, snapshot.before(owner), snapshot.now(owner))
        about = layer.names, type(layer.module).__name__, eps
        return change_of(moved, about, updates_told(count, self._policy), count)


def _common(then: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(value, before[name]) for name, value in then.items() if name in before]
