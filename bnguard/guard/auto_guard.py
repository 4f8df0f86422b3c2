"""Guard every model that runs in a test, wherever it was made."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import replace
from typing import Any, Final

from torch import nn

from bnguard.errors import BNGuardError
from bnguard.guard.layer_guard import sentries
from bnguard.guard.options import Settings
from bnguard.layers.tree import any_layer, find_layers
from bnguard.pytest_plugin.requests import Guards, Post, Rank
from bnguard.torch_internals import global_hook as _every_forward
from bnguard.torch_internals.compile import object_at, take_in

__all__ = ["Lookout"]

# Guards that are open at a time. One that makes way for a newer is compared, and opened when its model runs again.
_AT_ONCE: Final = 16

# By id, models that a compiled graph has been seen to run.
_in_graphs: Final[dict[int, weakref.ref[nn.Module]]] = {}


class Lookout:
    """Guards each model that runs, from the first forward of its outermost module.

    Args:
        guards: The guards of the test.
        settings: How to guard.

    Attributes:
        has_guarded: Whether anything was met that is meant.
    """

    wants_results = False

    def __init__(self, guards: Guards, settings: Settings) -> None:
        self._guards = guards
        self._settings = settings
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have been met
        self._open: deque[Post] = deque()
        self._compared: list[Post] = []  # of models in compiled graphs
        self._lock = threading.RLock()
        self.has_guarded = False

    def begin(self) -> None:
        """Looks out from now on."""
        with self._lock:
            for reference in list(_in_graphs.values()):
                model = reference()
                if model is not None:
                    self._compare(model)
        _every_forward.listen(self)

    def end(self, *, for_good: bool = False) -> None:
        """Looks out no more. May be done again.

        Args:
            for_good: Whether no other will: else the hook of every forward stays on.
        """
        _every_forward.unlisten(self, keep_hook=not for_good)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Guards the model of a module that is about to run, if that is the first."""
        if id(module) not in self._known:
            earlier = sentries.get(id(module))
            was_hooked = earlier is not None and earlier.hooks_out > 0
            self._meet(module)
            sentry = sentries.get(id(module))
            if sentry is not None and sentry.hooks_out and not was_hooked:
                # The layer itself is the model: torch has looked up its hooks before it called this one.
                sentry(module, args)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes no interest."""

    def _meet(self, module: nn.Module) -> None:
        with self._lock:
            is_copy = module.__dict__.get("_is_replica", False)  # DataParallel's, for one forward
            if is_copy or id(module) in self._known:
                return
            try:
                parts = {id(part): part for part in module.modules()}
            except TypeError:  # torch cannot walk a model that has no hash
                self._remember(module)
                return
            for post in [post for post in self._compared if not post.layers.isdisjoint(parts)]:
                self._compared.remove(post)
                self._guards.drop(post)
            if any_layer(module):
                try:
                    self._open.append(self._guards.add(Rank.SUITE, module, self._settings))
                    self.has_guarded = True
                except BNGuardError:  # while a CUDA graph is captured
                    return
                except ValueError:  # nothing in it is meant
                    pass
            for part in parts.values():
                self._remember(part)
            if len(self._open) > _AT_ONCE:
                self._make_way()

    def traced(self, key: int) -> None:
        """Compares the model of a module that is being compiled into a graph."""
        with self._lock:
            if key in self._known:
                reference: weakref.ref[nn.Module] | None = self._known[key]
                model = None if reference is None else reference()
            else:
                model = object_at(key)
            if model is None or not any_layer(model):
                return
            if _is_part_of_one(key):
                return
            _in_graphs[key] = weakref.ref(model, lambda _: _in_graphs.pop(key, None))
            if key not in self._known:
                self._compare(model)

    def _compare(self, model: nn.Module) -> None:
        for layer in find_layers(model):
            take_in(layer.module)
        frontend = replace(self._settings.frontend, compares_only=True)
        self._compared.append(self._guards.add(Rank.SUITE, model, replace(self._settings, frontend=frontend)))

    def _remember(self, module: nn.Module) -> None:
        key = id(module)
        self._known[key] = weakref.ref(module, lambda _: self._known.pop(key, None))

    def _make_way(self) -> None:
        oldest = self._open.popleft()
        for part in oldest.model.modules():
            self._known.pop(id(part), None)
        self._guards.drop(oldest)


def _is_part_of_one(key: int) -> bool:
    """Whether the module of this id belongs to a model that a graph has been seen to run."""
    models = [model for reference in list(_in_graphs.values()) if (model := reference()) is not None]
    return any([id(part) == key for model in models for part in model.modules()])
