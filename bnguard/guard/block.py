"""One block of a guard: enter, check, leave."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, hides_frame
from bnguard.guard import coverage, messages
from bnguard.guard.again import Again, goes_short
from bnguard.guard.changes import protected_layers
from bnguard.guard.events import Events
from bnguard.guard.exit_check import ExitCheck
from bnguard.guard.hooks import LayerGuard, add_entry, drop_entry, is_any_held
from bnguard.guard.options import Settings, guarded_layers
from bnguard.guard.policy import PolicyEntry
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import Write
from bnguard.torch_internals.callsite import CallSites
from bnguard.torch_internals.compile import GUARDS_GRAPHS, explain_break, forget_graphs
from bnguard.torch_internals.tracing import are_on_cuda, is_capturing

if TYPE_CHECKING:
    from bnguard.guard.affine import AffineHold
    from bnguard.records import GuardedLayer, StatsChange

__tracebackhide__ = hides_frame


class Block(Events):
    """One block of a guard on one model.

    One that has ended the short way may be entered once more. See Note [Kept blocks].

    Args:
        model: The model; its layers are looked up now.
        settings: What to guard, and how.
        earlier: Another block on the same model. While the model still has the same modules, no walk is needed.

    Attributes:
        resting: Between two times that the block is entered the short way, what it needs for that; at most one.

    Raises:
        ValueError: ``include`` or ``exclude`` selects nothing.
    """

    __slots__ = (
        "__weakref__", "_affine", "_again", "_beside", "_check", "_entry", "_guards", "_on_cuda", "_process",
        "_without_values", "resting",
    )  # fmt: skip

    def __init__(self, model: nn.Module, settings: Settings, earlier: Block | None = None) -> None:
        is_current = earlier is not None and earlier._tree.is_current()
        tree = earlier._tree if earlier is not None and is_current else Tree(model)
        layers = guarded_layers(model, tree.layers, settings)
        super().__init__(tree, layers, settings, CallSites() if earlier is None else earlier._sites)
        self._process = 0
        self._on_cuda = False
        self._again: Again | None = None  # while the block goes the short way
        self._guards: list[LayerGuard] = earlier._guards if earlier is not None and is_current else []
        self._entry: PolicyEntry | None = None  # while the block is open
        self._affine: AffineHold | None = None
        self._check: ExitCheck | None = None
        self._beside: list[Callable[[], None]] = []
        self._without_values: frozenset[int] = frozenset()  # owners
        self.resting: list[Again] = []

    def claim(self) -> bool:
        """Takes this block, to enter it once more, as if it were a new one; only the first to ask gets it.

        Returns:
            False, for ever, if it has not ended the short way, or if the model is not as it was.
        """
        try:
            again = self.resting.pop()  # in one step: another thread may ask as well
        except IndexError:
            return False
        if not again.is_ready():
            return False
        if self.has_news or self._counts:
            self.forget(again)
        self._again = again
        return True

    def forget(self, again: Again) -> None:
        """Drops all that a block that has ended the short way has to tell, and the copies that it would take for it."""
        self._start_over()
        again.entry.counts = self._counts

    def enter(self, manager: object) -> None:
        """Guards the layers from now on, as long as ``manager`` lives. If it fails, ``abandon()`` it."""
        again, self._again = self._again, None
        if again is None and goes_short(self._tree.model, self._tree, self._layers, self.settings):
            again = Again(self._tree, self._layers, self.settings, self._counts)
        if again is None:
            self._enter_long(manager)
            return
        self._process = os.getpid()
        self._guards = again.guards
        self._entry = entry = again.entry
        entry.block = self
        entry.manager = weakref.ref(manager, self.abandon)
        if not again.begin():
            self._entry = None
            self._enter_long(manager)
            return
        self._check = again.check_anew()
        if self._check is None:  # it ends the long way
            self._check = ExitCheck(self._layers, self.settings)
        else:
            self._again = again

    def outlive(self) -> None:
        """Makes the block last longer than its manager."""
        if (entry := self._entry) is not None:
            entry.manager = None

    def _enter_long(self, manager: object) -> None:
        """``enter`` where there is more to look after than ``Again`` does. See Note [The short way]."""
        settings, layers = self.settings, self._layers
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
        entry.manager = weakref.ref(manager, self.abandon)
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
                self.resting.append(again)
            return
        if error is not None and not GUARDS_GRAPHS:
            explain_break(error)
        if not self._may_compare():
            self._let_go()
            return
        # While the entry is still there: what other threads run meanwhile is held.
        is_left = self.settings.check == "deferred" and error is None and self._launch()
        found = [] if is_left else self._verify(restores=self._policy.puts_back)
        self._let_go()
        if error is None and self.settings.frontend.has_coverage_warnings:
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
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The layers, and how each is protected."""
        return protected_layers(self._layers, self.settings, self._tree.model, self._without_values)

    # What a forward calls, beside what Events has.

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

    # Parts.

    def _ends_short(self, again: Again) -> bool:
        """Whether the end of the block has nothing to say and nothing to put back. See Note [The short way].

        Updates that stand have been told of at the first one. What they are is looked at when somebody asks.
        """
        check = self._check
        if check is None or os.getpid() != self._process or sys.is_finalizing() or not again.is_quiet():
            return False
        if self.has_news and self._takes_long():
            return False
        try:
            moved = check.moved()
        except RuntimeError:
            return False
        return not (moved or self.has_news) or self._takes_as_told(moved)

    def _verify(self, *, restores: bool) -> list[StatsChange]:
        """Compares, and puts back if asked to. Returns what differed."""
        self.has_news = True
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

        about = self._tree.model, self._layers, comparisons, self._counts, self._outcome, self.settings
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
            coverage.warn_about_added_layers(self._tree.model, self.settings, self._tree, self._check.statistics)
        if self._regions and not is_any_held(self._layers):
            coverage.warn_about_pending_regions(self._regions.values(), self.settings)
        for tell in () if has_found else self._beside:  # one finding at a time
            tell()

    def _refuse_capture(self) -> None:
        if self._on_cuda and is_capturing():
            raise BNGuardError(messages.capture_text(self.settings.frontend.phrases))
