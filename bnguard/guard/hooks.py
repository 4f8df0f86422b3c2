"""Observe every forward of one layer, and apply the decision of the guards around it.

Note [Why hooks see and the instance holds]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
As long as the guards around a layer only raise or warn, forward hooks do the work, and the layer runs untouched:

1. For torch's own layers, a pre-hook determines from flags alone whether a forward would update
   (``LayerKind.predict``). It raises before the forward, reads no tensor and does not wait for the GPU.
2. For a layer with a forward of its own, this cannot be predicted. The pre-hook copies its statistics, the layer runs,
   and a forward hook compares them, then restores them and raises, or records the update. If the forward itself raised,
   the hook only restores: its own error takes precedence.

As soon as one of the guards holds statistics or counts updates, a ``forward`` on the instance does so; see Note
[Holding]. Neither reads a tensor while a graph is traced or a CUDA graph captured, under ``torch.fx``, or if
``functional_call`` runs the layer with other tensors. Changes made there are found by the comparison at the end of the
block.

Note [Interruption]
~~~~~~~~~~~~~~~~~~~
A block may end between any two lines of another one: the garbage collector closes a generator, a signal handler runs,
or the user presses Ctrl-C. So the entries of a layer are a set, ``LayerGuard.members``. Adding or removing one is a
single C call, and ``sync`` makes the layer conform to the set. It may be run any number of times, by any thread, and
starts over if the set has changed in the meantime. The lock excludes other threads; it is never held while user code
runs. See also Note [Ctrl-C].
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat
from operator import is_
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, hides_frame
from bnguard.guard.copies import KEY, LayerHook, strip_clone, strip_clones, strip_copy
from bnguard.guard.forward import HeldLayer
from bnguard.guard.hold import copies_for, guards
from bnguard.guard.messages import script_text
from bnguard.guard.policy import NO_RULING, Entries, PolicyEntry, Rulings
from bnguard.guard.surroundings import recorded, refuse_graph, traced
from bnguard.guard.watching import Before
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer
from bnguard.layers.swaps import NO_FLAGS, own_values
from bnguard.torch_internals.compile import GUARDS_GRAPHS, is_exporting
from bnguard.torch_internals.fork import call_in_children, renew_after_fork
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import is_symbolic

__tracebackhide__ = hides_frame

entries_lock: Final = RLock()
renew_after_fork(entries_lock)


def _renew_turns() -> None:
    """In a forked child: another thread of the parent may have held one, and cannot release it here."""
    for guard in guards.values():
        guard._turn = guard._turn and RLock()


call_in_children(_renew_turns)


def guard_of(module: nn.Module) -> LayerGuard | None:
    """The guard that is currently on a layer; None if there is none."""
    guard: LayerGuard | None = guards.get(id(module))
    return guard


def _identity(frame: FrameType | None) -> object:
    """Identifies a frame without keeping it alive; its address alone may be that of another one after it has ended."""
    return frame and (id(frame), frame.f_code)


class BeforeForward(LayerHook):
    """The forward pre-hook of a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Decides about a forward."""
        self.guard.before(module, args)


class _AfterForward(LayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.guard.after(module, args)


class LayerGuard(HeldLayer):
    """Guards one layer while at least one block is around it."""

    def serves_again(self, layer: StatsLayer, known: tuple[Tensor | None, ...]) -> bool:
        """Whether this guard, which has no entries any more, can be used again as if it were new."""
        module = layer.module
        if module is not self.module or layer.kind is not self.kind or self.members or self.replaced:
            return False
        if self.previous is not None or self.is_outdated():
            return False
        return all(map(is_, known, self._known))

    # Entries.

    def sync(self, rulings: Rulings) -> None:
        """Makes the layer conform to ``members``. The caller holds the lock; starts over if they have changed."""
        while True:
            members = tuple(self.members)
            self.ruling = ruling = rulings[members] if members else NO_RULING
            if members:
                kind = self.kind
                if guards.setdefault(self.layer_id, self) is self and kind.hold != "none":
                    rounds = kind.rounds_in_eval and ruling.action == "stop"
                    if kind is OTHER_BUFFERS and self.has_foreign_pre_hooks():
                        self.put_hooks(BeforeForward(self), _AfterForward(self), comes_first=True)
                    elif ruling.needs_forward or rounds or self.has_foreign_hooks():
                        self.put_forward()
                    else:
                        after = None if kind.predict is not None else _AfterForward(self)
                        self.put_hooks(BeforeForward(self), after)
            elif not self._before or not self.is_watching():
                self.remove()
                if guards.get(self.layer_id) is self:  # not before: another guard would take ours for the user's
                    del guards[self.layer_id]
            if tuple(self.members) == members:
                return

    def is_watching(self) -> bool:
        """Whether a forward that the hooks watch is still running, and may outlast the block.

        One that is no longer on the stack of its thread was left by an exception for which torch calls no hooks, such
        as KeyboardInterrupt.
        """
        if not self._before:
            return False
        stacks = sys._current_frames()
        for thread in list(self._before):
            self._drop_finished(thread, stacks.pop(thread, None))
        stacks.clear()  # which knows the frame that knows it
        return any(self._before.values())

    def _drop_finished(self, thread: int, frame: FrameType | None) -> None:
        """Forgets the forwards of a thread that are not on its stack."""
        calls = set()
        while frame is not None:
            calls.add(_identity(frame))
            frame = frame.f_back
        waiting = (self._before or {}).get(thread, [])
        for before in [before for before in waiting if before.call not in calls]:
            waiting.remove(before)
            self.forget(before)

    def drop_interrupted(self) -> None:
        """Forgets forwards of this thread that Ctrl-C has ended, after which torch calls no hook."""
        thread = threading.get_ident()
        if (self._before or {}).get(thread):
            self._drop_finished(thread, sys._getframe())
            with entries_lock:
                self.sync(Rulings())

    def conform_again(self) -> None:
        """Looks at the layer again, and makes it conform to what it is now."""
        with entries_lock:
            self.look_again()
            self.sync(Rulings())
            if self.has_hooks and not self.has_forward and self.kind.predict is None:
                self.put_after(_AfterForward(self))

    # The hooks.

    def before_first(self, args: tuple[Any, ...], call: FrameType) -> None:
        """Does what the guard would do to a forward that had begun, in the frame ``call``, when it was put on.

        Torch has chosen the layer's own ``forward``. So that runs, with other statistics or in another mode.
        """
        if not self.has_forward:
            self.before(self.module, args, call)
            return
        if torch.compiler.is_compiling() or is_symbolic(args, {}) or self.is_foreign(self.module):
            return
        kind, entries, action = self.kind, self.ruling.entries, self._action_now(self.ruling)
        if action != "running" and not (kind.rounds_in_eval or self._would_update()):
            return
        surroundings = self.surroundings(args, {})
        if surroundings == "capture":
            return
        if action == "stop" and kind.predict is not None:
            if not self.rejects(args):
                self.apply(self.decide_and_count(entries), args)
            return
        self.put_after(_AfterForward(self))
        before = self._watch(entries, call)
        if surroundings == "record":
            if action == "running" and self.module.training:
                recorded(self.layer_id)
        elif action == "running":
            self.run_swapped(before, self.eval_statistics(), kind.eval_flags)
        elif action == "hold":
            self.run_swapped(before, copies_for(self.module, self.names, args), NO_FLAGS)

    def before(self, module: nn.Module, args: tuple[Any, ...], call: FrameType | None = None) -> None:
        """The forward pre-hook: decides about a forward that would update, or copies what it may change."""
        if self.has_forward:
            return  # the forward sees to it; the hooks are there for forwards that began before it was put
        is_eager = not torch.compiler.is_compiling()
        # Dynamo of torch 2.4 cannot compare modules.
        is_elsewhere = module is not self.module or (is_eager and not self.members)
        if is_elsewhere and (GUARDS_GRAPHS or is_eager) and self._is_left(module, is_eager=is_eager):
            return
        if is_eager and self.is_outdated():
            self.conform_again()
            self.before_first(args, call or sys._getframe(3))
            return
        predict = self.kind.predict
        if predict is not None and not predict(module):
            return
        if torch.compiler.is_compiling():
            self._before_in_graph(module)
            return
        entries = self.ruling.entries  # of the moment at which the forward begins
        if is_symbolic(args, {}) or self.is_foreign(module):
            return
        if predict is not None:
            if not self.rejects(args):
                self.apply(self.decide_and_count(entries), args)
        elif entries and not self.is_captured():
            self._watch(entries, call or sys._getframe(3))

    def _is_left(self, module: nn.Module, *, is_eager: bool) -> bool:
        """Whether the hook is on another module, or on the layer without a block around it. It is removed then."""
        if is_eager and not self.members:
            self.unhook(module)  # the user's code had put the dictionary of hooks aside when the block ended
            return True
        if module is self.module:
            return False
        if type(module) is not type(self.module):
            self.unhook(module)  # fusing has moved the hook to another module
            return True
        if not module.__dict__.get("_is_replica", False) and not self.shared_statistics(module):
            self.strip(module)  # a clone: it shares the hooks
            return True
        return False

    def _before_in_graph(self, module: nn.Module) -> None:
        if GUARDS_GRAPHS:
            traced(id(self.module))
        elif module.training and not is_exporting():
            refuse_graph()

    def _watch(self, entries: Entries, call: FrameType) -> Before:
        """Copies what a forward may change, until the forward hook is called for the same call of the layer."""
        thread = threading.get_ident()
        if self._before is None:
            with entries_lock:  # another thread may be about to do so
                self._before = self._before or {}
        if self._before.get(thread):
            self._drop_finished(thread, call)
        before = self.look(entries)
        before.call = _identity(call)
        self._before.setdefault(thread, []).append(before)
        return before

    def after(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward hook: decides about updates that the forward has made. torch calls it after an exception, too."""
        if torch.compiler.is_compiling():
            return
        waiting = None if self._before is None else self._before.get(threading.get_ident())
        if not waiting:
            if not self.members and sys.exception() is None:  # after an exception torch is iterating over the hooks
                self.unhook(module)
            return
        frame = sys._getframe(2)
        before: Before | None = waiting[-1]
        if waiting[-1].call != _identity(frame.f_back):
            # After an exception torch calls the hook from one frame further out.
            calls = {_identity(frame), _identity(frame.f_back)}
            before = next((before for before in reversed(waiting) if before.call in calls), None)
        if before is None:
            return
        waiting.remove(before)
        has_failed = sys.exception() is not before.error
        try:
            self.conclude(before, has_failed)
        finally:
            # The forward has outlasted the last block, or it was the first one. After an exception torch is iterating
            # over the hooks: they go with the next forward, or with the layer.
            if not self.members or self.has_forward:
                with entries_lock:
                    if not has_failed:
                        self.sync(Rulings())
                    elif not self.members and not self.is_watching() and guards.get(self.layer_id) is self:
                        self.remove_attributes()
                        del guards[self.layer_id]

    def refuse_script(self) -> nn.Module:
        """Called first by ``torch.jit.script``, which would compile the guard along with the source of the layer."""
        if isinstance(self, nn.Module):
            return strip_copy(self)
        if all([entry.block is not None and entry.block.guards_every_model for entry in self.ruling.entries]):
            plain: nn.Module = self.without_ours()
            return plain  # a ScriptModule runs no hooks: compared at the end
        raise BNGuardError(script_text(type(self.module).__name__))

    # Replicas.

    def replicate(self) -> nn.Module:
        """Makes a replica for ``nn.DataParallel``, which is guarded as long as the layer is."""
        if isinstance(self, nn.Module):
            return strip_copy(self)._replicate_for_data_parallel()
        name = "_replicate_for_data_parallel"
        own: Any = self.replaced.get(name)
        replica: nn.Module = getattr(type(self.module), name)(self.module) if own is None else own()
        self.strip(replica)
        replica.__dict__["forward"] = partial(self.run_replica, replica)
        return replica

    def run_replica(self, replica: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The forward of a replica."""
        guard = self.of_copy(replica, self.names)
        # The first replica shares the layer's statistics. What the others update is dropped with them.
        if self.ruling.entries and (self.ruling.action == "running" or self.shared_statistics(replica)):
            return guard.forward(*args, **kwargs)
        return guard.original(*args, **kwargs)


def add_entry(
    layers: Sequence[StatsLayer], entry: PolicyEntry, into: list[LayerGuard], earlier: Sequence[LayerGuard] = ()
) -> None:
    """Puts an entry on each layer.

    Args:
        layers: The layers.
        entry: The entry.
        into: Receives the guard of each layer before the entry is added to it, for ``drop_entry``.
        earlier: The guards of an earlier call on the same layers, to be used again.
    """
    rulings = Rulings()
    is_running = entry.policy.action == "running"
    with entries_lock:
        for layer, known, candidate in zip(layers, own_values(layers), chain(earlier, repeat(None)), strict=False):
            key = id(layer.module)
            while True:
                guard = guards.get(key)
                if guard is None:
                    strip_clone(layer.module)
                    _unhook_ended(layer.module)
                    if candidate is not None and candidate.serves_again(layer, known):
                        guard = candidate
                    else:
                        guard = LayerGuard(layer, known)
                into.append(guard)
                guard.members[entry] = {} if is_running and layer.kind.hold != "none" else None
                guard.sync(rulings)
                if guards.get(key) is guard:
                    break
                drop_entry([into.pop()], entry, layer.module)  # interrupted: another one guards the layer now


def _unhook_ended(module: nn.Module) -> None:
    """Removes hooks of blocks that have ended: the user's code had put their dictionary aside meanwhile."""
    tables: Sequence[dict[Any, Any]] = (module._forward_pre_hooks, module._forward_hooks)
    for hook in [table.get(KEY) for table in tables]:
        if isinstance(hook, LayerHook) and not hook.guard.members:
            hook.guard.unhook(module)


def drop_entry(guards: Sequence[LayerGuard], entry: PolicyEntry, model: nn.Module) -> None:
    """Takes an entry off again; the last one of a layer takes everything else along. May be done any number of times.

    Raises:
        BaseException: The first of what went wrong, after everything that could be taken off is.
    """
    failure: BaseException | None = None
    rulings = Rulings()
    with entries_lock:
        strip_clones(guards)
        for guard in guards:
            try:
                guard.members.pop(entry, None)
                guard.sync(rulings)
                if guard.is_hook_elsewhere and not guard.members:
                    for part in model.modules():
                        guard.unhook(part)
                    guard.is_hook_elsewhere = False
            except BaseException as error:
                failure = failure or error
    if failure is not None:
        raise failure


def is_any_held(layers: Sequence[StatsLayer]) -> bool:
    """Whether some guard still keeps forwards of one of the layers from updating."""
    found = [guard for layer in layers if (guard := guards.get(id(layer.module))) is not None]
    return any([entry.policy.holds for guard in found for entry in guard.ruling.entries])
