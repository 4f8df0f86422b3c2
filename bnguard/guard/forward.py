"""Run one forward of a guarded layer as the guards around it want it."""

from __future__ import annotations

import os
import threading
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.guard.hold import (
    copies,
    guards,
    is_scratch_for,
    normalise_with_batch,
    normalise_with_batch_in_graph,
    normalise_with_running_stats,
    run_with,
    scratch_like,
)
from bnguard.guard.policy import Action, decide
from bnguard.guard.surroundings import Entries, recorded, traced
from bnguard.guard.watching import WatchedLayer
from bnguard.layers.kinds import BATCH_NORM, StatsLayer
from bnguard.layers.swaps import is_swapped, swapped
from bnguard.torch_internals.tracing import is_symbolic

_OF_BATCH_NORM: Final = {"running_mean", "running_var"}


def _renew_turns() -> None:
    """In a forked child: another thread of the parent may have held one, and cannot release it here."""
    for guard in guards.values():
        guard._turn = guard._turn and threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_turns)


class HeldLayer(WatchedLayer):
    """A guarded layer whose forward can run otherwise than without a guard.

    Attributes:
        action: What happens to every update as long as the entries stay; None where it depends on the forward.
        graph_action: What happens to every update in a compiled graph.
    """

    __slots__ = ("_scratch", "_turn", "action", "graph_action")

    def __init__(self, layer: StatsLayer) -> None:
        super().__init__(layer)
        self._turn = None if self.kind is BATCH_NORM else threading.RLock()
        self.action: Action | None = None
        self.graph_action: Action | None = None
        self._scratch: tuple[Tensor | None, Tensor | None] = (None, None)  # of the last forward

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's forward, as the guards around it want it.

        Where that depends on a budget, one thread at a time: a forward that may update runs on the statistics
        themselves, and must not find them swapped out by one that may not.
        """
        if self._turn is None or self.action is not None or torch.compiler.is_compiling():
            return self._run(args, kwargs)
        with self._turn:
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, entries, kind = self.module, self.entries, self.kind  # entries of the moment at which it begins
        if torch.compiler.is_exporting():
            return self._exported(args, kwargs)
        has_moved = kind is BATCH_NORM and not module._buffers.keys() >= _OF_BATCH_NORM  # deleted, or plain attributes
        if has_moved or self.is_foreign(module):
            return self.original(*args, **kwargs)
        action = self._action_now(entries)
        would_update = kind.predict is None or kind.predict(module)
        if action == "running" and (would_update or module.training or is_swapped(module)):
            return self._run_in_eval_mode(args, kwargs)
        if not would_update:
            return self._run_reading(entries, args, kwargs)
        if action == "hold":
            return self.run_held(args, kwargs)
        if torch.compiler.is_compiling():
            traced(id(module))
            return self.original(*args, **kwargs)
        if kind.predict is not None:
            return self._run_decided(entries, args, kwargs)
        if self.is_captured() or not self.is_watched(entries):
            return self._run_reading(entries, args, kwargs)
        return self._run_watched(entries, args, kwargs)

    def holds_as_usual(self) -> bool:
        """Whether a forward now is held with its batch: a quick answer for torch's BatchNorm outside of graphs."""
        module = self.module
        if self.action != "hold" or not (module.training and module.track_running_stats):
            return False
        own, known = module._buffers, self._known
        return own.get("running_mean") is known[0] and own.get("running_var") is known[1]

    def _action_now(self, entries: Entries) -> Action:
        """What would happen to an update now; nothing is spent yet. A graph cannot count."""
        if self.action is not None:
            return self.action
        if torch.compiler.is_compiling():
            return self.graph_action or "update"
        return decide(entries).action

    def _run_decided(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decides about an update that is known to come, then runs the layer accordingly."""
        if is_symbolic(args, kwargs) or self.rejects(args):
            return self.original(*args, **kwargs)
        decision = self.decide_and_count(entries)
        self.apply(decision)
        if decision.action == "hold":
            return self.run_held(args, kwargs)
        if decision.action == "running":
            return self._run_in_eval_mode(args, kwargs)
        if not decision.within:
            return self.original(*args, **kwargs)
        before = self.look(entries)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.allow(decision, before)
            self.forget(before)

    def _run_watched(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer, then decides about what it did to its statistics."""
        before = self.look(entries)
        try:
            result = self.original(*args, **kwargs)
        except Exception:
            # A forward can fail after it has counted the batch. Its own error takes precedence.
            self.conclude(before, has_failed=True)
            raise
        except BaseException:
            self.forget(before)
            raise
        self.conclude(before, has_failed=False)
        return result

    def _run_reading(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a forward that does not update the statistics.

        It gets clones if the statistics will be restored while a backward pass may still need the values that this
        forward has read.
        """
        if not torch.is_grad_enabled() or not any([entry.policy.hides for entry in entries]) or self.is_captured():
            return self.original(*args, **kwargs)
        if self.kind is BATCH_NORM:
            if self.module.training:  # it normalises with its batch, and tracks nothing
                return self.original(*args, **kwargs)
            return normalise_with_running_stats(self.module, *args, from_clones=True)
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        clones = copies(self.module, self.names)
        after: dict[str, Tensor | None] = {}
        try:
            with swapped(self.module, clones, None):
                try:
                    return self.original(*args, **kwargs)
                finally:
                    after.update(self.module._buffers)
        finally:
            self.commit(after)

    def run_held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer with its batch, so that its update goes nowhere."""
        surroundings = self.surroundings(args, kwargs)
        if surroundings == "capture":
            return self.original(*args, **kwargs)
        if surroundings == "record":
            return self._run_and_put_back(args, kwargs)
        if self.kind is not BATCH_NORM:
            return run_with(self, copies(self.module, self.names), None, args, kwargs)
        if surroundings == "graph":
            return normalise_with_batch_in_graph(self.module, *args)
        return normalise_with_batch(self.module, args[0], *self._scratch_pair())

    def _run_in_eval_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer with its running statistics."""
        module, kind = self.module, self.kind
        surroundings = self.surroundings(args, kwargs)
        if surroundings in ("record", "capture"):
            if module.training:
                recorded(id(module))
            return self.run_held(args, kwargs)
        if kind is BATCH_NORM:
            return normalise_with_running_stats(module, *args)
        training = False
        statistics = {} if kind.reads_in_eval(module) else copies(module, self.names)
        return run_with(self, statistics, training, args, kwargs)

    def _run_and_put_back(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer itself, which becomes part of a program, then puts its statistics back."""
        before = self.look(())
        try:
            return self.original(*args, **kwargs)
        finally:
            self.put_back(before)
            self.forget(before)

    def _exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's own forward, for a program that is to hold no guard: nothing runs, and nothing updates."""
        if self.action == "running" and self.module.training:
            recorded(id(self.module))
        return self.original(*args, **kwargs)

    def _scratch_pair(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self._scratch
        own = self.module._buffers
        if not (is_scratch_for(mean, own["running_mean"]) and is_scratch_for(var, own["running_var"])):
            self._scratch = mean, var = scratch_like(own["running_mean"], 0), scratch_like(own["running_var"], 1)
        return mean, var
