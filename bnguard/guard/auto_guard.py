"""Guard every model that runs, wherever it was created."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, Final

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning
from bnguard.guard.hooks import guard_of
from bnguard.guard.options import Settings
from bnguard.guard.requests import GuardRequest, GuardRequests, Precedence
from bnguard.layers.parents import registered_root
from bnguard.layers.tree import any_layer, find_layers
from bnguard.torch_internals import global_hook
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.compile import is_in_graphs, models_in_graphs, object_at, record_compiled, record_in_graph
from bnguard.torch_internals.functional_call import has_lent_buffers
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import is_capturing

# Models with an open guard. The guard of the oldest is ended for a newer one, and begins again when its model runs.
_MOST_OPEN: Final = 16


class AutoGuard(global_hook.Listener):
    """Guards each model that runs, from the first forward of its outermost module.

    In a compiled graph no hook runs. Models that have been seen in one are compared at the end.

    Args:
        requests: Where guards are requested.
        settings: How to guard.

    Attributes:
        has_guarded: Whether a model with a selected layer has run.
    """

    def __init__(self, requests: GuardRequests, settings: Settings) -> None:
        self._requests = requests
        self._settings = settings
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have run
        self._open: deque[GuardRequest] = deque()
        self._compared: list[GuardRequest] = []  # for models in compiled graphs
        self._lock = RLock()
        self.has_guarded = False

    def begin(self) -> None:
        """Guards models that run from now on."""
        with self._lock:
            for model in models_in_graphs():
                self._compare(model)
        global_hook.listen(self)

    def end(self, *, for_good: bool = False) -> None:
        """Guards no further models. Closing twice does nothing.

        Args:
            for_good: Whether no other ``AutoGuard`` will begin; otherwise the hook on all modules stays.
        """
        global_hook.unlisten(self, keep_hook=not for_good)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Guards the model that a module belongs to, at the first forward of its outermost module."""
        if id(module) not in self._known:
            earlier = guard_of(module)
            was_guarded = earlier is not None and (earlier.has_hooks or earlier.has_forward)
            self._meet(module)
            guard = guard_of(module)
            if guard is not None and not was_guarded:
                # torch looked up the hooks and the forward before it called this one.
                guard.before_first(args, sys._getframe(3))

    def traced(self, key: int) -> None:
        """Compares, from the next ``begin()`` on at the latest, the model of a module that is compiled into a graph."""
        with self._lock:
            known = self._known.get(key)
            model = object_at(key) if known is None else known()
            if model is None or not any_layer(model) or is_in_graphs(key):
                return
            record_in_graph(model)
            if key not in self._known:
                self._compare(model)

    def _meet(self, module: nn.Module) -> None:
        with self._lock:
            is_replica = module.__dict__.get("_is_replica", False)  # DataParallel makes one for each forward
            if is_replica or id(module) in self._known:
                return
            try:
                if self._settings.include and self._has_layers(module):
                    module = registered_root(module)  # the patterns are meant for its names
                parts = {id(part): part for part in module.modules()}
            except TypeError:  # torch cannot walk a model that has no hash
                self._remember(module)
                return
            if has_lent_buffers(parts.values()):
                return  # guarded at a later forward: this one does not update the model's own
            for request in [request for request in self._compared if not request.layers.isdisjoint(parts)]:
                self._compared.remove(request)
                self._requests.remove(request)
            try:
                self._guard(module)
            except BNGuardError as error:
                if is_capturing():
                    return  # guarded at a later forward
                text = f"{type(module).__name__} is not guarded. {error}"
                warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
            for part in parts.values():
                self._remember(part)
            if len(self._open) > _MOST_OPEN:
                self._end_oldest()

    def _has_layers(self, model: nn.Module) -> bool:
        return bool(self._settings.buffers) or any_layer(model)

    def _guard(self, model: nn.Module) -> None:
        if self._has_layers(model):
            with suppress(ValueError):  # no layer of it is selected
                self._open.append(self._requests.add(Precedence.EVERY_MODEL, model, self._settings))
                self.has_guarded = True

    def _compare(self, model: nn.Module) -> None:
        for layer in find_layers(model):
            record_compiled(layer.module)
        frontend = self._settings.frontend._replace(compares_only=True)
        settings = self._settings._replace(frontend=frontend)
        with suppress(ValueError):  # no layer of it is selected
            self._compared.append(self._requests.add(Precedence.EVERY_MODEL, model, settings))

    def _remember(self, module: nn.Module) -> None:
        key = id(module)
        self._known[key] = weakref.ref(module, lambda _: self._known.pop(key, None))

    def _end_oldest(self) -> None:
        oldest = self._open.popleft()
        for part in oldest.model.modules():
            self._known.pop(id(part), None)
        self._requests.remove(oldest)
