"""One block of a guard: enter, check, leave."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError, hides_frame
from bnguard.guard import coverage, messages
from bnguard.guard.again import Again, goes_short
from bnguard.guard.changes import KnownChanges, change_of_forward, protected_layers
from bnguard.guard.exit_check import ExitCheck
from bnguard.guard.hooks import LayerGuard, add_entry, drop_entry, is_any_held
from bnguard.guard.kept import keep, take
from bnguard.guard.options import Settings, guarded_layers
from bnguard.guard.outcome import Outcome
from bnguard.guard.policy import Counts, PolicyEntry, count_update
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.parents import name_as_parts, registered_root
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import Write
from bnguard.torch_internals.callsite import CallSites, call_site
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.compile import GUARDS_GRAPHS, explain_break, forget_graphs
from bnguard.torch_internals.distributed import is_distributed
from bnguard.torch_internals.tracing import are_on_cuda, is_capturing

if TYPE_CHECKING:
    from bnguard.guard.affine import AffineHold
    from bnguard.records import GuardedLayer, StatsChange

__tracebackhide__ = hides_frame


class Block:
    """One block of a guard on one model.

    Args:
        model: The model; its layers are looked up now.
        settings: What to guard, and how.
        earlier: Another block on the same model. While the model still has the same modules, no walk is needed.

    Raises:
        ValueError: ``include`` or ``exclude`` selects nothing.
    """

    __slots__ = (
        "__weakref__", "_affine", "_again", "_beside", "_check", "_counts", "_entry", "_guards", "_has_named",
        "_has_warned_of_program", "_kept", "_known", "_layers", "_on_cuda", "_outcome", "_owners", "_policy",
        "_process", "_regions", "_settings", "_sites", "_tree", "_without_values",
    )  # fmt: skip

    def __init__(self, model: nn.Module, settings: Settings, earlier: Block | None = None) -> None:
        self._settings = settings
        self._policy = settings.policy  # each block asks many times
        self._process = 0
        self._on_cuda = False
        self._guards: list[LayerGuard] = []
        self._counts = Counts()
        self._again: Again | None = None  # while the block goes the short way
        again = take(model, settings) if earlier is None else earlier.take_again()
        if again is not None and again.is_ready():
            self._again, again.entry.counts = again, self._counts
            self._tree: Tree = again.tree
        elif earlier is not None and earlier._tree.is_current():
            self._tree, self._guards = earlier._tree, earlier._guards
        else:
            self._tree = Tree(model)
        self._layers = self._again.layers if self._again else guarded_layers(model, self._tree.layers, settings)
        self._owners: dict[int, int] | None = None
        self._entry: PolicyEntry | None = None  # while the block is open
        self._affine: AffineHold | None = None
        self._check: ExitCheck | None = None
        self._beside: list[Callable[[], None]] = []
        self._without_values: frozenset[int] = frozenset()  # owners
        self._known = KnownChanges(self._layers, self._policy)
        self._outcome = Outcome(settings)
        self._sites: CallSites = CallSites() if earlier is None else earlier._sites
        self._has_warned_of_program = False
        self._has_named = False
        self._regions: dict[int, Region] = {}  # checkpointed, held, and not recomputed so far
        self._kept: list[Again] = []  # for the next block; at most one, which is taken out in one step

    def take_again(self) -> Again | None:
        """What the next block needs to go the short way, if this one has ended it; only the first to ask gets it."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def hand_on(self) -> None:
        """Leaves that to the next block on the model, whichever guard it is of. See Note [Kept blocks]."""
        if (again := self.take_again()) is not None:
            keep(again)

    def enter(self, manager: object = None) -> None:
        """Guards the layers from now on, at most as long as ``manager`` lives. If it fails, ``abandon()`` it."""
        again = self._again
        if again is None and goes_short(self._tree.model, self._tree, self._layers, self._settings):
            again = Again(self._tree, self._layers, self._settings, self._counts)
        if again is not None and self._enter_again(again, manager):
            return
        settings, layers = self._settings, self._layers
        self._process = os.getpid()
        self._on_cuda = torch.cuda.is_initialized() and are_on_cuda(
            tensor for layer in layers for tensor in own_tensors(layer.module, "_buffers").values()
        )
        self._refuse_capture()
        if settings.use_running_stats:
            coverage.refuse_batch_programs(self._tree.model, layers)
            coverage.refuse_other_buffers(layers, settings)
        is_outermost = settings.frontend.is_outermost
        entry = PolicyEntry(self, self._policy, settings.updates, self._counts, outermost=is_outermost)
        earlier, self._guards = self._guards, []
        self._entry = entry
        entry.manager = None if manager is None else weakref.ref(manager, self.abandon)
        # The entry first: what other threads run meanwhile is then held already.
        if not settings.frontend.compares_only:
            add_entry(layers, entry, self._guards, earlier)
        if not GUARDS_GRAPHS and any([guard.has_forward for guard in self._guards]):
            forget_graphs()
        self._check = check = ExitCheck(layers, settings)
        self._without_values = check.statistics.without_values()
        if check.parameters is not None:
            from bnguard.guard.affine import AffineHold

            self._affine = AffineHold()
            self._affine.take([p for i in range(len(layers)) for p in check.parameters.objects_of(i)])
        if settings.frontend.has_coverage_warnings:
            coverage.warn_about_programs(settings)
            self._beside = coverage.found_beside(self._tree.model, self._tree, layers, settings)

    def check(self) -> None:
        """Compares now, and acts as the end of the block would; under ``"rollback"`` nothing is put back."""
        policy = self._policy
        self._act(self._verify(restores=policy.puts_back and not policy.hides), None)

    def put_back(self) -> list[StatsChange]:
        """Compares now, and puts back what has changed. Returns it."""
        return self._verify(restores=True)

    def leave(self, error: BaseException | None) -> None:
        """Compares, lets go of the model and acts on what was found. If that fails, ``abandon()`` it.

        Args:
            error: The exception on its way out of the block.

        Raises:
            StatsChangedError: As the policy says, unless an exception is on its way.
        """
        again = self._again
        if again is not None and self._ends_short(again):
            again.end(self._tree.model)
            self._entry = self._again = self._check = None
            if again.rest():
                self._kept.append(again)
            return
        if error is not None and not GUARDS_GRAPHS:
            explain_break(error)
        if not self._may_compare():
            self._let_go()
            return
        # While the entry is still there: what other threads run meanwhile is held.
        is_left = self._settings.check == "deferred" and error is None and self._launch()
        found = [] if is_left else self._verify(restores=self._policy.puts_back)
        self._let_go()
        if error is None and self._settings.frontend.has_coverage_warnings:
            self._warn_of_gaps(has_found=bool(found))
        try:
            self._act(found, error)
        finally:
            self._check, self._beside = None, []  # a guard that is kept for later keeps no copies

    def abandon(self, _: object = None) -> None:
        """Lets go of a model that ``enter()`` or ``leave()`` have failed to, and says nothing; else does nothing."""
        if self._entry is None:
            return
        try:
            if self._check is not None and self._policy.puts_back and self._may_compare():
                self._put_back(self._check, is_compared=False)
        finally:
            try:
                self._let_go()
            finally:
                self._entry, self._check, self._beside = None, None, []

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the order of the layers."""
        return self._known.listed(dict(self._counts), self._change)

    @property
    def has_changes(self) -> bool:
        """Whether there are changes, of a block that has ended the short way."""
        return not self._known.is_empty

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The layers, and how each is protected."""
        return protected_layers(self._layers, self._settings, self._tree.model, self._without_values)

    @property
    def stats_layers(self) -> Sequence[StatsLayer]:
        """The guarded layers."""
        return self._layers

    @property
    def guards_every_model(self) -> bool:
        """Whether the user has not named the model: the pytest plugin, or ``bnguard run``."""
        return self._settings.frontend.is_outermost

    def take_late(self, found: Mapping[int, StatsChange]) -> None:
        """Adds what a comparison has found, by owner, to the changes of the block."""
        self._known.take(found, self._counts)

    # What a forward calls.

    def stopped(self, layer: int) -> StatsChangedError:
        """Records an update that is stopped of the layer with this id; returns the error to raise."""
        count_update(self._counts[layer], call_site())
        found = self._layer(layer)
        return self._outcome.stopped(self._change(found), _mode(found), self._settings.updates)

    def updated(self, layer: int) -> None:
        """Records an update that is let through; the first one of the block is warned about, at the user's line."""
        count = self._counts[layer]
        if count.site is not None:
            count_update(count, count.site)
            return
        site = self._sites.find()
        count_update(count, site)
        if self._outcome.claims_warning():
            found = self._layer(layer)
            self._outcome.updated(self._change(found), _mode(found), self._settings.updates, site)

    def wrote(self, write: Write) -> None:
        """Takes what an update within the budget has written as the state to protect, on the short way."""
        if (check := self._check) is not None:
            check.wrote(write)

    def allowed(self, layer: int, before: Mapping[str, Tensor] | None) -> None:
        """Takes what an update within the budget has written as the state to protect."""
        if (check := self._check) is not None:
            check.allowed(self._owner(layer), before)

    def captured(self, layer: int) -> Mapping[str, Tensor]:
        """The statistics of the beginning, by buffer name; not to be written to."""
        return {} if (check := self._check) is None else check.captured(self._owner(layer))

    def recorded(self, layer: int) -> None:
        """Warns, once a block, that a layer in train mode is traced or exported although it is held in eval mode."""
        if not self._has_warned_of_program:
            self._has_warned_of_program = True
            found = self._layer(layer)
            text = messages.recorded_text(found.names, type(found.module).__name__, self._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    def checkpointed(self, region: Region) -> None:
        """Keeps a checkpointed region in mind until its backward pass."""
        if region.is_recomputed:
            self._regions.pop(region.key, None)
        elif self._settings.use_running_stats or not region.is_recomputed_held:
            self._regions.setdefault(region.key, region)

    # Parts.

    def _enter_again(self, again: Again, manager: object) -> bool:
        """Enters the short way; False, with nothing done, where there is none any more. See Note [The short way]."""
        self._again = None
        self._process = os.getpid()
        self._guards = again.guards
        self._entry = entry = again.entry
        entry.block = self
        entry.manager = None if manager is None else weakref.ref(manager, self.abandon)
        if not again.begin():
            self._entry = None
            return False
        self._check = again.check_anew()
        if self._check is None:  # it ends the long way
            self._check = ExitCheck(self._layers, self._settings)
        else:
            self._again = again
        return True

    def _ends_short(self, again: Again) -> bool:
        """Whether the end of the block has nothing to say and nothing to put back. See Note [The short way].

        Updates that stand have been told of at the first one. What they are is looked at when somebody asks.
        """
        is_otherwise = self._known.is_compared or self._regions or self._has_warned_of_program or self._has_named
        check, policy, outcome = self._check, self._policy, self._outcome
        if check is None or is_otherwise or not (self._may_compare() and again.is_quiet()):
            return False
        counts = dict(self._counts)
        seen = {layer: count.beyond for layer, count in counts.items() if count.beyond}
        try:
            moved = check.moved()
        except RuntimeError:
            return False
        if moved is None and not (seen or outcome.has_spoken):
            return True
        if policy.puts_back or not outcome.has_warned or outcome.is_due or is_distributed():
            return False
        self._known.take_later(moved, counts, seen)
        return True

    def _verify(self, *, restores: bool) -> list[StatsChange]:
        """Compares, and puts back if asked to. Returns what differed."""
        self._refuse_capture()
        check = self._check
        if check is None:
            return []
        changes = check.compare(self._counts, self._guards, self._name_layers)
        if restores:
            self._put_back(check)
        self.take_late(changes)
        return [changes[owner] for owner in sorted(changes)]

    def _launch(self) -> bool:
        """Compares, and puts back, without reading the result; False where it has to be read at once."""
        self._refuse_capture()
        comparisons = None if self._check is None else self._check.launch()
        if comparisons is None:
            return False
        if self._policy.puts_back:
            for guard in self._guards:
                guard.restored()
        from bnguard.guard.deferred import Verdict, keep_verdict

        about = self._tree.model, self._layers, comparisons, self._counts, self._outcome, self._settings
        keep_verdict(self._tree.model, Verdict(self, *about))
        return True

    def _act(self, found: list[StatsChange], error: BaseException | None) -> None:
        check = self._check
        if check is not None and (found or self._outcome.is_due):
            cause = check.cause(found, self._tree.model) if found else "unknown"
            self._outcome.act(found, check.broadcast, self.changes, cause, error)

    def _may_compare(self) -> bool:
        """Not in a forked child of the block's process, nor where Python shuts down: torch aborts at a view then."""
        return os.getpid() == self._process and not sys.is_finalizing()

    def _put_back(self, check: ExitCheck, *, is_compared: bool = True) -> None:
        check.restore(is_compared=is_compared)
        for guard in self._guards:
            guard.restored()

    def _let_go(self) -> None:
        """Takes everything off the model. May be done again."""
        try:
            if self._affine is not None:
                self._affine.release()
        finally:
            if self._entry is not None:
                drop_entry(self._guards, self._entry, self._tree.model)
        self._entry = self._again = None

    def _warn_of_gaps(self, *, has_found: bool) -> None:
        if self._check is not None and self._layers:
            coverage.warn_about_added_layers(self._tree.model, self._settings, self._tree, self._check.statistics)
        if self._regions and not is_any_held(self._layers):
            coverage.warn_about_pending_regions(self._regions.values(), self._settings)
        for tell in () if has_found else self._beside:  # one finding at a time
            tell()

    def _refuse_capture(self) -> None:
        if self._on_cuda and is_capturing():
            raise BNGuardError(messages.capture_text(self._settings.frontend.phrases))

    def _owner(self, layer: int) -> int:
        """The index of the layer with this id."""
        if self._owners is None:
            self._owners = {id(found.module): owner for owner, found in enumerate(self._layers)}
        return self._owners[layer]

    def _name_layers(self) -> None:
        """Names the layers as parts of the whole model where the user did not say which one that is."""
        if self.guards_every_model and not self._has_named:
            self._has_named = True
            name_as_parts(self._layers, registered_root(self._tree.model))

    def _layer(self, layer: int) -> StatsLayer:
        return self._layers[self._owner(layer)]

    def _change(self, layer: StatsLayer) -> StatsChange:
        self._name_layers()
        return change_of_forward(layer, self._counts[id(layer.module)], prevented=self._policy.stops)


def _mode(layer: StatsLayer) -> str:
    return "train" if layer.module.training else "eval"
