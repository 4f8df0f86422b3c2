"""One extent of a guard: enter, check, leave."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard import messages as _report
from bnguard.guard.affine import AffineHold, affine_parameters
from bnguard.guard.agreement import Agreement, Occasion, Parting, Statistics
from bnguard.guard.attach import attach, detach, is_any_held
from bnguard.guard.coverage import (
    warn_about_added_layers,
    warn_about_fixed_modes,
    warn_about_pending_regions,
    warn_about_programs,
)
from bnguard.guard.layer_guard import Sentry
from bnguard.guard.options import Settings
from bnguard.guard.outcome import Outcome
from bnguard.guard.policy import Claim, count, pay
from bnguard.guard.protection import protection_text
from bnguard.layers.bits import digest_of
from bnguard.layers.drift import eps_of, largest_mean_shift
from bnguard.layers.kinds import StatsLayer, tensor_tables
from bnguard.layers.select import select_layers
from bnguard.layers.snapshot import Difference, Snapshot
from bnguard.layers.tree import Tree, find_layers
from bnguard.records import GuardedLayer, StatsChange
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.compile import compiled_parts, is_taken_in
from bnguard.torch_internals.distributed import overwritten_by_ddp
from bnguard.torch_internals.ranks import Ranks
from bnguard.torch_internals.tracing import aside
from bnguard.torch_internals.turns import finish

__all__ = ["Block"]


_NONE: Final[Mapping[int, Any]] = {}


class Block:
    """One extent of one guard on one model.

    Args:
        model: The model; its layers are looked up now.
        settings: What to guard, and how.
        earlier: Another block on the same model. While that has the same modules, no walk is needed.

    Raises:
        ValueError: ``include`` or ``exclude`` selects nothing.
    """

    __slots__ = (
        "_affine", "_claims", "_found", "_handled", "_has_warned_of_program", "_layers", "_maybe_overwritten", "_model",
        "_on_cuda", "_outcome", "_parameters", "_process", "_refreshing", "_regions", "_sentries", "_settings",
        "_statistics", "_tree", "_under_way", "_verified", "_without_values",
    )  # fmt: skip

    def __init__(self, model: nn.Module, settings: Settings, earlier: Block | None = None) -> None:
        self._model = model
        self._settings = settings
        self._process = 0
        self._on_cuda = False
        self._sentries: list[Sentry] = []
        if earlier is not None and earlier._tree.is_current():
            self._tree: Tree = earlier._tree
            self._sentries = earlier._sentries
        else:
            self._tree = Tree(model)
        self._layers = select_layers(model, self._tree.layers, settings.include, settings.exclude, settings.within)
        self._claims: list[Claim] = []
        self._affine: AffineHold | None = None
        self._statistics: Snapshot | None = None
        self._parameters: Snapshot | None = None
        self._without_values: frozenset[int] = frozenset()  # owners
        self._found: Mapping[int, StatsChange] = _NONE  # by owner: what a comparison found
        self._verified: Mapping[int, int] = _NONE  # by owner: updates when it was last compared
        self._outcome = Outcome(settings, None)
        self._handled = 0  # id of the exception that was being handled where the block began
        self._has_warned_of_program = False
        self._maybe_overwritten: Mapping[str, tuple[str, int]] = {}  # by layer: digest of what was found, from whom
        self._refreshing = threading.RLock()
        self._under_way: dict[int, int] = {}  # by owner: updates within the budget that have begun and not ended
        self._regions: dict[int, Region] = {}  # checkpointed, held, and not recomputed so far

    def enter(self, occasion: Occasion | None = None) -> None:
        """Guards the layers from now on. If that fails, the model is as it was.

        Args:
            occasion: The call of a decorated function, as the ranks of a distributed run know it.
        """
        settings, modules = self._settings, [layer.module for layer in self._layers]
        self._process = os.getpid()
        self._handled = id(sys.exception())
        self._outcome = Outcome(settings, self._agreement(occasion))
        self._on_cuda = torch.cuda.is_initialized() and any(
            [
                tensor.is_cuda
                for table in tensor_tables(modules, "_buffers")
                for tensor in table.values()
                if tensor is not None
            ]
        )
        self._refuse_capture()
        stance, budget = settings.stance, settings.updates
        self._claims = [Claim(self, owner, stance, budget) for owner in range(len(modules))]
        try:
            self._outcome.begin()
            # The claims first: what other threads run in the meantime is then held already.
            if not settings.frontend.compares_only:
                self._sentries = attach(
                    self._layers, self._claims, self._sentries, outermost=settings.frontend.is_outermost
                )
            self._statistics = Snapshot(modules, [layer.buffers for layer in self._layers])
            self._without_values = self._statistics.without_values()
            if settings.affine:
                self._affine = AffineHold()
                names = [affine_parameters(layer) for layer in self._layers]
                self._parameters = Snapshot(modules, names, "_parameters")
                self._affine.take(
                    [tensor for owner in range(len(modules)) for tensor in self._parameters.objects_of(owner)]
                )
            if settings.frontend.has_coverage_warnings:
                warn_about_fixed_modes(self._layers, settings)
                warn_about_programs(settings)
        except BaseException as error:
            self._outcome.end()
            self._let_go()
            self._outcome.abandon(error)
            raise

    def check(self) -> None:
        """Compares now, and acts as the end of the block would."""
        self._act(self._verify(), None, is_end=False)

    @property
    def error_on_its_way(self) -> BaseException | None:
        """An exception on its way out of where the block began, as in the ``finally`` in which a guard is stopped."""
        error = sys.exception()
        return None if id(error) == self._handled else error

    def leave(
        self, error: BaseException | None, parting: Parting = "wait", leaving: BaseException | None = None
    ) -> None:
        """Compares, lets go of the model and acts on what was found.

        Args:
            error: The exception on its way out of the block.
            parting: In a distributed run: whether to meet the other ranks, if there is no exception.
            leaving: An exception on its way past the block, of which only the other ranks are told.

        Raises:
            StatsChangedError: As ``on_change="raise"`` says, and no exception is on its way.
        """
        if os.getpid() != self._process:
            self._let_go()  # a forked child: what the shared statistics are to be is up to the parent
            return
        try:
            # While the claims still stand: what other threads run in the meantime is held.
            try:
                found = self._verify()
            finally:
                self._let_go()
            if error is None and self._settings.frontend.has_coverage_warnings:
                self._warn_of_gaps()
        except BaseException as failure:
            self._outcome.end()
            if parting != "skip":
                self._outcome.abandon(error or failure)
            raise
        self._statistics = self._parameters = None  # a guard that is kept for later keeps no copies
        try:
            self._act(found, error, parting, leaving)
        finally:
            self._outcome.end()

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the order of the layers."""
        if not self._found and not any([claim.updates for claim in self._claims]):
            return ()
        changes = []
        for owner, claim in enumerate(self._claims):
            if owner in self._found:
                changes.append(self._found[owner])
            elif claim.updates > (0 if claim.stance == "raise" else self._verified.get(owner, 0)):
                changes.append(self._change(claim))
        return tuple(changes)

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The layers, and how each is protected."""
        settings, compiled = self._settings, {id(layer.module) for layer in self._compiled_layers()}
        layers = []
        for owner, layer in enumerate(self._layers):
            is_compiled, has_values = id(layer.module) in compiled, owner not in self._without_values
            how = protection_text(layer, settings.stance, settings.updates, is_compiled, has_values)
            layers.append(GuardedLayer(layer.names, type(layer.module).__name__, layer.buffers, how))
        return tuple(layers)

    @property
    def only_watches(self) -> bool:
        """Whether the model is guarded without anybody having named it."""
        return self._settings.frontend.is_outermost

    # What a forward calls.

    def stopped(self, claim: Claim) -> StatsChangedError:
        """Records an update that is stopped before it happens; returns the error to raise."""
        count(claim, str(call_site()))
        return self._outcome.stopped(self._change(claim), self._mode(claim), claim.budget)

    def stood(self, claim: Claim) -> None:
        """Records an update that stands; the first one of the block is warned about, at the user's line."""
        if claim.where is not None:
            count(claim, claim.where)
            return
        site = call_site()
        count(claim, str(site))
        self._outcome.stood(self._change(claim), self._mode(claim), claim.budget, site)

    def allowing(self, claim: Claim) -> Tensor | None:
        """Notes, on the device, whether something other than a forward has written to the layer before.

        Not while another update of the layer is under way: what it has written so far would look like that.
        """
        with self._refreshing:
            self._under_way[claim.owner] = under_way = self._under_way.get(claim.owner, 0) + 1
            statistics = self._statistics
            return None if statistics is None or under_way > 1 else statistics.deviation(claim.owner)

    def allowed(self, claim: Claim, deviation: Tensor | None) -> None:
        """Takes what an update within the budget has written for the state to hold, unless it built on such a write."""
        with self._refreshing:
            statistics = self._statistics
            try:
                if statistics is not None:
                    statistics.refresh(claim.owner, unless=deviation)
            finally:
                self._under_way[claim.owner] -= 1

    def recorded(self, claim: Claim) -> None:
        """Warns, once a block, that a program is taken off a layer in train mode that is held in eval mode."""
        if not self._has_warned_of_program:
            self._has_warned_of_program = True
            layer = self._layers[claim.owner]
            text = _report.recorded_text(layer.names, type(layer.module).__name__, self._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    def checkpointed(self, region: Region) -> None:
        """Keeps a checkpointed region in mind until its backward pass."""
        if region.is_recomputed:
            self._regions.pop(region.key, None)
        elif self._settings.use_running_stats or not region.is_recomputed_held:
            self._regions.setdefault(region.key, region)

    # Parts.

    def _warn_of_gaps(self) -> None:
        if self._statistics is not None and self._layers:
            warn_about_added_layers(self._model, self._settings, self._tree, self._statistics)
        if self._regions and not is_any_held(self._layers):
            warn_about_pending_regions(self._regions.values(), self._settings)

    def _verify(self) -> list[StatsChange]:
        """Compares, and puts back unless changes are to stand. Returns what differed."""
        self._refuse_capture()
        changes: dict[int, StatsChange] = {}
        keep = self._settings.on_change != "warn"
        for snapshot in filter(None, (self._statistics, self._parameters)):
            is_intact = False
            try:
                is_intact = snapshot.is_intact()
                differences = [] if is_intact else list(snapshot.changed())
                paid = self._within_budget(differences) if snapshot is self._statistics else frozenset()
                for difference in differences:
                    if difference.owner in paid:
                        continue
                    change = self._found_change(snapshot, difference)
                    earlier = changes.get(difference.owner)
                    changes[difference.owner] = _joined(earlier, change) if earlier else change
                if snapshot is self._statistics:
                    self._maybe_overwritten = self._suspects(changes.values())
            finally:
                # Also if comparing fails: the promise is about the statistics, not about the report.
                if keep and not is_intact:
                    finish(snapshot.restore)
        if self._settings.on_change == "warn":
            self._found = changes  # what changed before stands, and has just been found again
        elif changes:
            self._found = {**self._found, **changes}
        self._verified = {claim.owner: claim.updates for claim in self._claims if claim.updates}
        return [changes[owner] for owner in sorted(changes)]

    def _within_budget(self, differences: Sequence[Difference]) -> frozenset[int]:
        """Owners of differences that are those of updates within the budget. What they then have is the state to hold.

        Before each of the forwards that were counted ``DistributedDataParallel`` may have put the statistics of another
        rank in the place of this one's: then they are what the update began from. Of a compiled graph, in which no
        forward can be counted, the layer's own counter tells. An update that is under way has been paid for.
        """
        assert self._statistics is not None
        owners = [difference.owner for difference in differences if self._claims[difference.owner].budget]
        modules = {owner: self._layers[owner].module for owner in owners}
        spent = [modules[owner] for owner in owners if self._claims[owner].spent]
        overwritten = overwritten_by_ddp(spent, after_join=True) if spent else {}
        paid = []
        for owner, module in modules.items():
            if (
                id(module) in overwritten
                or self._under_way.get(owner)
                or (is_taken_in(module) and self._has_counted(self._statistics, owner))
            ):
                self._statistics.refresh(owner, unless=None)
                paid.append(owner)
        return frozenset(paid)

    def _has_counted(self, statistics: Snapshot, owner: int) -> bool:
        """Whether the counter of a layer says that it has updated no more often than it may."""
        before, now = (values(owner).get("num_batches_tracked") for values in (statistics.before, statistics.now))
        if before is None or now is None:
            return False
        with aside():
            updates = int(now) - int(before)
        return pay(self._claims[owner], updates)

    def _let_go(self) -> None:
        """Takes everything off the model, whatever fails on the way."""
        failure: BaseException | None = None
        for undo in (self._release, self._detach):
            try:
                finish(undo)
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _release(self) -> None:
        if self._affine is not None:
            self._affine.release()

    def _detach(self) -> None:
        detach(self._layers, self._claims, self._model)

    def _act(
        self,
        found: list[StatsChange],
        error: BaseException | None,
        parting: Parting = "wait",
        leaving: BaseException | None = None,
        *,
        is_end: bool = True,
    ) -> None:
        if found or self._outcome.is_due:
            statistics = Statistics(self._maybe_overwritten, self._digests)
            cause = self._cause(found) if found else "unknown"
            self._outcome.act(found, statistics, self.changes, cause, error, parting, leaving, is_end=is_end)

    def _digests(self, names: Iterable[str]) -> dict[str, str]:
        """By layer: a digest of its statistics as they are now."""
        wanted = set(names)
        return {layer.names[0]: _digest(layer) for layer in self._layers if layer.names[0] in wanted}

    def _suspects(self, changes: Iterable[StatsChange]) -> dict[str, tuple[str, int]]:
        """Of those changes that DDP may have made: digests of the layers' statistics now, and from which rank."""
        unseen = {change.names[0] for change in changes if not change.updates}
        if not unseen:
            return {}
        modules = {layer.names[0]: layer.module for layer in self._layers if layer.names[0] in unseen}
        sources = overwritten_by_ddp(modules.values())
        digests = self._digests([name for name, module in modules.items() if id(module) in sources])
        return {name: (digest, sources[id(modules[name])]) for name, digest in digests.items()}

    def _agreement(self, occasion: Occasion | None) -> Agreement | None:
        """With the other ranks of a distributed run."""
        ranks = Ranks.of(self._settings.group)
        if ranks is None:
            return None
        settings = self._settings
        return Agreement(ranks, call_site(), settings.frontend.phrases, settings.on_change == "raise", occasion)

    def _refuse_capture(self) -> None:
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise BNGuardError(_report.capture_text(self._settings.frontend.phrases))

    def _cause(self, found: list[StatsChange]) -> _report.Cause:
        """What is known of the layers that changed although no forward was seen."""
        unseen = {change.names for change in found if not change.updates}
        if unseen <= {layer.names for layer in self._compiled_layers()}:
            return "compiled"
        left = {id(layer.module) for layer in find_layers(self._model)}
        gone = {layer.names for layer in self._layers if id(layer.module) not in left}
        return "replaced" if unseen <= gone else "unknown"

    def _compiled_layers(self) -> list[StatsLayer]:
        """The layers that compiled graphs run, as far as that can be known."""
        parts = compiled_parts(self._model)
        return [layer for layer in self._layers if id(layer.module) in parts or is_taken_in(layer.module)]

    def _change(self, claim: Claim) -> StatsChange:
        layer, prevented = self._layers[claim.owner], claim.stance == "raise"
        return StatsChange(
            layer.names, type(layer.module).__name__, layer.buffers, claim.updates, claim.where, None, prevented
        )

    def _found_change(self, snapshot: Snapshot, difference: Difference) -> StatsChange:
        layer, claim = self._layers[difference.owner], self._claims[difference.owner]
        shift = None
        if snapshot is self._statistics:
            shift = largest_mean_shift(
                snapshot.before(difference.owner),
                snapshot.now(difference.owner),
                eps_of(layer.module),
            )
        seen = claim.updates if claim.stance == "warn" else 0
        where = claim.where if seen else None
        return StatsChange(layer.names, type(layer.module).__name__, difference.names, seen, where, shift)

    def _mode(self, claim: Claim) -> str:
        return "train" if self._layers[claim.owner].module.training else "eval"


def _joined(one: StatsChange, other: StatsChange) -> StatsChange:
    return StatsChange(
        one.names, one.type, one.buffers + other.buffers, one.updates, one.where, one.mean_shift or other.mean_shift
    )


@aside()
def _digest(layer: StatsLayer) -> str:
    """A digest of a layer's statistics. Reads them."""
    buffers = layer.module._buffers
    return digest_of({name: buffers.get(name) for name in layer.buffers})
