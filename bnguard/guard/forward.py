"""Run one forward of a guarded layer as the guards around it want it."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, hides_frame
from bnguard.guard.copies import StripsCopy
from bnguard.guard.hold import (
    NO_STATISTICS,
    clone_in_modes,
    copies,
    copies_for,
    forward_bound_to,
    is_scratch_for,
    normalise_with_batch,
    normalise_with_batch_in_graph,
    normalise_with_running_stats,
    run_in_graph,
    run_stand_in,
    scratch_like,
)
from bnguard.guard.messages import IN_GRAPH_OF_CLONE
from bnguard.guard.policy import Action, Entries, Ruling, decide, give_back
from bnguard.guard.surroundings import class_changed, is_cloned, recorded, refuse_graph, traced
from bnguard.guard.updating import UpdatingLayer
from bnguard.guard.watching import COUNTER_ALONE
from bnguard.layers.kinds import BATCH_NORM, SYNC_BATCH_NORM, StatsLayer
from bnguard.layers.swaps import NO_FLAGS, is_swapped, own_mode, own_values, swap_lock, swapped
from bnguard.torch_internals.compile import is_called_by_graph, is_exporting, refused_in_graphs, run_as_python
from bnguard.torch_internals.functional_call import calling_module
from bnguard.torch_internals.tracing import has_function_mode, is_symbolic, unseen

__tracebackhide__ = hides_frame

_OF_BATCH_NORM: Final = {"running_mean", "running_var"}


class HeldLayer(UpdatingLayer):
    """A guarded layer whose forward can run otherwise than without a guard."""

    _scratch: tuple[Tensor | None, Tensor | None] = (None, None)  # of the last forward

    conform_again: Callable[[], None]  # methods of a subclass
    drop_interrupted: Callable[[], None]

    # The ``forward`` on the instance: a bound method of this object.

    def put_forward(self) -> None:
        """Puts a ``forward`` on the layer. Once there, it is not put again: the user may have wrapped it.

        It is a method, not an object with ``__call__``: for each of those graphs are compiled anew. It has the
        signature and name of the forward that it stands for. A reference that is kept after the block, and copies of
        it, run the layer's own forward.
        """
        self.put_copying()
        if self.has_hooks and not self.is_watching():
            self.remove_hooks()
        if not self.has_forward:
            if self.is_outdated():
                self.look_again()
            function = forward_of_batch_norm if self.kind is BATCH_NORM else self._forward_like_own()
            self.has_forward = True
            self.put("_replicate_for_data_parallel", self.replicate)
            self.put("forward", MethodType(function, self))

    def _forward_like_own(self) -> FunctionType:
        """A copy of ``forward`` that has the signature of the layer's own."""
        function = refused_in_graphs(FunctionType(forward.__code__, globals(), "forward"))
        if self.is_plain:
            function.__wrapped__ = type(self.module).forward  # type: ignore[attr-defined]  # functions take any
            return function
        with suppress(ValueError, TypeError):  # a builtin function has none
            own = inspect.signature(self.own_forward())
            owner = inspect.Parameter("_guard", inspect.Parameter.POSITIONAL_ONLY)
            signature = own.replace(parameters=[owner, *own.parameters.values()])
            function.__signature__ = signature  # type: ignore[attr-defined]  # functions take any
        return function

    @run_as_python
    def forward_of_clone(self) -> Any:
        """The forward to run, if it is that of a module that has copied the layer's ``__dict__``; else None."""
        caller = calling_module()
        if caller is None:
            caller = self.module_in_question()
        if caller is self.module or not self.is_copied_to(caller):
            return None
        shared = self.shared_statistics(caller) if self.ruling.entries else ()
        if shared:
            guard = self.of_copy(caller, shared)
            guard.members = self.members
            return guard.forward
        self.strip(caller)
        return caller.forward

    def of_copy(self, module: nn.Module, names: tuple[str, ...]) -> HeldLayer:
        """A guard like this one for a forward of a replica, or of a clone that has the statistics ``names`` of it."""
        if type(self.module) is not self.cls:
            self.look_again()
        layer = StatsLayer(module, (), names, self.kind)
        guard = type(self)(layer, *own_values([layer]))
        guard.kind, guard.previous, guard._turn = self.kind, self.previous, self._turn
        guard.ruling, guard.layer_id = self.ruling, self.layer_id
        return guard

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a replica or a clone, as the guards around the layer want it."""
        return self.run(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(self.module, memo)
        strips = StripsCopy(copied)
        memo[id(strips)] = strips
        return copied  # to which the method is then bound

    def __reduce__(self) -> Any:
        return operator.getitem, ((self.module,), 0)  # of which a pickled method is an attribute

    # What it does.

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's forward, as the guards around it want it: that of its class, which user code may have changed.

        Where it depends on a budget, one thread at a time: a forward that may update runs on the statistics themselves,
        and must not find them swapped out by one that may not.
        """
        if self._before and not torch.compiler.is_compiling():
            self.drop_interrupted()
        if self.module.__class__ is not self.cls:
            if torch.compiler.is_compiling():
                class_changed(id(self.module))
            else:
                self.conform_again()
        if self._turn is None or self.ruling.action is not None or torch.compiler.is_compiling():
            return self._run(args, kwargs)
        with self._turn:
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, ruling, kind = self.module, self.ruling, self.kind  # the ruling of the moment at which it begins
        if kind is BATCH_NORM and (kwargs or len(args) != 1):
            if args or kwargs.keys() != {"input"}:
                return self.original(*args, **kwargs)  # raises
            args, kwargs = (kwargs["input"],), {}
        if is_exporting():
            return self._exported(args, kwargs)
        has_moved = kind is BATCH_NORM and not module._buffers.keys() >= _OF_BATCH_NORM  # deleted, or plain attributes
        if has_moved or self.is_foreign(module):
            return self.original(*args, **kwargs)
        entries, action = ruling.entries, self._action_now(ruling)
        if action == "running":
            return self.run_in_eval_mode(args, kwargs)
        if not self._would_update():
            if kind.rounds_in_eval and (action != "update" or any([entry.budget for entry in entries])):
                return self.run_held(args, kwargs)
            return self._run_reading(entries, args, kwargs)
        return self._run_update(ruling, action, args, kwargs)

    def _run_update(self, ruling: Ruling, action: Action, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entries = ruling.entries
        if ruling.action is None and self.only_counts():
            return self._run_watched(entries, args, kwargs)
        if action == "hold":
            return self.run_held(args, kwargs)
        if torch.compiler.is_compiling():
            traced(id(self.module))
            return self.original(*args, **kwargs)
        if self.kind.predict is not None:
            return self._run_decided(entries, args, kwargs)
        is_watched = not self.is_captured() and self.is_watched(entries)
        return (self._run_watched if is_watched else self._run_reading)(entries, args, kwargs)

    def usual_action(self) -> Action | Literal["read"] | None:
        """What a forward does now: a quick answer for torch's BatchNorm outside of graphs; None: not known.

        ``"read"``: it only reads the statistics, and runs as without a guard. ``"update"``: it updates, unless a budget
        is spent.
        """
        module = self.module
        own, known = module._buffers, self._known
        if own.get("running_mean") is not known[0] or own.get("running_var") is not known[1]:
            return None
        if self.kind is not BATCH_NORM or module.__class__ is not self.cls:
            return None  # it has another class than when the block began
        action = self.ruling.action
        if module.training:
            if not module.track_running_stats:
                return None
            return "update" if action is None and self.ruling.rows is not None else action
        return "read" if self.ruling.leaves_eval else action if action == "running" else None

    def _would_update(self) -> bool:
        """Whether a forward would update, whatever another thread's runs in."""
        module, kind = self.module, self.kind
        if kind.predict is None or kind is BATCH_NORM or torch.compiler.is_compiling():  # none runs in another mode
            return kind.predict is None or kind.predict(module)
        with swap_lock:
            return kind.predict(module) or (own_mode(module) and is_swapped(module))

    def _action_now(self, ruling: Ruling) -> Action:
        """What would happen to an update now; nothing is spent yet. A graph cannot count."""
        if ruling.action is not None:
            return ruling.action
        if torch.compiler.is_compiling():
            return ruling.in_graphs or "update"
        return decide(ruling.entries, self.layer_id).action

    def _run_decided(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decides about an update that is known to come, then runs the layer accordingly."""
        if is_symbolic(args, kwargs) or self.rejects(args):
            return self.original(*args, **kwargs)
        decision = self.decide_and_count(entries)
        self.apply(decision, args)
        if decision.action == "hold":
            return self.run_held(args, kwargs)
        if decision.action == "running":
            return self.run_in_eval_mode(args, kwargs)
        if not decision.within:
            return self.original(*args, **kwargs)
        before = self.look(entries)
        try:
            return self.original(*args, **kwargs)
        except Exception:
            if before.original.moved(self.module) == COUNTER_ALONE:  # torch has refused the batch
                give_back(decision.within, self.layer_id)
            raise
        finally:
            self.allow(decision, before)
            self.forget(before)

    def _run_watched(self, entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer, then decides about what it did to its statistics."""
        before = self.look(entries)
        try:
            result = self._run_reading(entries, args, kwargs)
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
        """Runs a forward that may read the statistics.

        It gets clones if the statistics will be restored while a backward pass may still need the values that this
        forward has read.
        """
        if not torch.is_grad_enabled() or not any([entry.policy.hides for entry in entries]) or self.is_captured():
            return self.original(*args, **kwargs)
        if self.module.training and self.kind in (BATCH_NORM, SYNC_BATCH_NORM):
            return self.original(*args, **kwargs)  # its backward pass reads the statistics of its batch
        if self.kind is BATCH_NORM:
            return normalise_with_running_stats(self.module, *args, from_clones=True)
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        clones = copies(self.module, self.names)
        after: dict[str, Tensor | None] = {}
        try:
            with swapped(self.module, clones):
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
            inputs = () if surroundings == "graph" else (*args, *kwargs.values())
            return self._run_with(copies_for(self.module, self.names, inputs), NO_FLAGS, args, kwargs)
        if surroundings == "graph":
            return normalise_with_batch_in_graph(self.module, *args)
        scratch = unseen(self._scratch_pair)() if has_function_mode() else self._scratch_pair()
        return normalise_with_batch(self.module, args[0], *scratch)

    def run_in_eval_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer with its running statistics."""
        module, kind = self.module, self.kind
        surroundings = self.surroundings(args, kwargs)
        if surroundings in ("record", "capture"):
            if module.training:
                recorded(id(module))
            return self.run_held(args, kwargs)
        statistics = self.eval_statistics(in_graph=surroundings == "graph")
        if kind is BATCH_NORM:
            return normalise_with_running_stats(module, *args, statistics=statistics)
        return self._run_with(statistics, kind.eval_flags, args, kwargs)

    def eval_statistics(self, *, in_graph: bool = False) -> Mapping[str, Tensor]:
        """The statistics with which the layer normalises in eval mode: its own, but for those returned by name."""
        of_entry = unseen(self.of_entry) if has_function_mode() else self.of_entry
        statistics = NO_STATISTICS if in_graph else of_entry()
        if self.kind is BATCH_NORM or self.kind.reads_in_eval(self.module):
            return statistics
        own = {name: clone_in_modes(value) for name, value in statistics.items()}
        return {**copies(self.module, self.names), **own}

    def _run_with(
        self, statistics: Mapping[str, Tensor], flags: Mapping[str, bool], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the layer's own forward with ``statistics`` and ``flags`` for its own."""
        module = self.module
        if not torch.compiler.is_compiling():
            with swapped(module, statistics, flags):
                return self.original(*args, **kwargs)
        cls: Any = type(module)
        if self.is_plain and not module._modules and cls.__new__ is object.__new__:
            return run_stand_in(module, statistics, flags, args, kwargs)
        return run_in_graph(module, self.original, statistics, flags, args, kwargs)

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
        if self.ruling.action == "running" and self.module.training:
            recorded(id(self.module))
        return self.original(*args, **kwargs)

    def _scratch_pair(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self._scratch
        own = self.module._buffers
        if not (is_scratch_for(mean, own["running_mean"]) and is_scratch_for(var, own["running_var"])):
            self._scratch = mean, var = scratch_like(own["running_mean"], 0), scratch_like(own["running_var"], 1)
        return mean, var


@refused_in_graphs
def forward(guard: HeldLayer, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a guarded layer."""
    if is_called_by_graph():
        refuse_graph()
    if isinstance(guard, nn.Module):
        return forward_bound_to(guard, *args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        if is_cloned(id(guard.module)):
            raise BNGuardError(IN_GRAPH_OF_CLONE)  # breaks the graph
    elif guard.has_clones():
        of_clone = guard.forward_of_clone()
        if of_clone is not None:
            return of_clone(*args, **kwargs)
    return guard.run(args, kwargs)


@refused_in_graphs
def forward_of_batch_norm(guard: HeldLayer, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a guarded layer that runs torch's ``_BatchNorm.forward``, unless its class is changed."""
    if is_called_by_graph():
        refuse_graph()
    if isinstance(guard, nn.Module):
        return forward_bound_to(guard, *args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        if is_cloned(id(guard.module)):
            raise BNGuardError(IN_GRAPH_OF_CLONE)
    elif guard.has_clones():
        of_clone = guard.forward_of_clone()
        if of_clone is not None:
            return of_clone(*args, **kwargs)
    if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
        action = guard.usual_action()
        if action == "hold":
            return guard.run_held(args, kwargs)
        if action == "running":
            return guard.run_in_eval_mode(args, kwargs)
        if action == "read":
            return type(guard.module).forward(guard.module, *args)
        if action == "update":
            return guard.run_updating(*args)
    return guard.run(args, kwargs)


# A pickle finds the layer's own forward by the name.
forward_of_batch_norm.__name__ = "forward"
forward_of_batch_norm.__qualname__ = nn.BatchNorm2d.forward.__qualname__
forward_of_batch_norm.__wrapped__ = nn.BatchNorm2d.forward  # type: ignore[attr-defined]  # functions take any
