"""Notice that no forward of the guarded layers ran: then another model than the guarded one is probably trained.

A library may make or copy the model that it trains. In a block of ``frozen`` it may be meant that nothing runs, so only
guards of a trainer's run ask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from bnguard.errors import BNGuardWarning
from bnguard.guard import messages
from bnguard.guard.copies import FIRST_CALL, LayerHook
from bnguard.guard.frozen import frozen
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.compile import has_compiled


class IdleCheck:
    """A block of a guard that warns at its end if batches ran in it, no layer was called, and nothing was found.

    Hooks on the layers find out. They come off at the first call, so later ones cost nothing. It says nothing once a
    graph was compiled, or if a layer is part of another program: these run no hooks.

    Args:
        guard: The guard.
        batches: Returns the number of batches that the trainer has run.
    """

    def __init__(self, guard: frozen, batches: Callable[[], int]) -> None:
        self._guard = guard
        self._batches = batches
        self._first = 0
        self._modules: list[nn.Module] = []  # until one of them is called

    def __enter__(self) -> Self:
        self._guard.__enter__()
        layers = self._guard._stats_layers
        self._first = self._batches()
        if not any([layer.kind.exit_only for layer in layers]):
            self._modules = [layer.module for layer in layers]
            for module in self._modules:
                hooks: Any = module._forward_pre_hooks
                hooks.setdefault(FIRST_CALL, _FirstCall([])).guard.append(self)
                hooks.move_to_end(FIRST_CALL, last=False)  # before one that raises
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_idle = bool(self._modules) and self._batches() != self._first
        self.called()
        self._guard.__exit__(kind, error, traceback)
        if is_idle and error is None and not self._guard.changes and not has_compiled():
            text = messages.idle_text(self._guard.layers, self._guard._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    def called(self) -> None:
        """Takes the hooks off."""
        modules, self._modules = self._modules, []
        for module in modules:
            hooks: Any = module._forward_pre_hooks
            hook = hooks.get(FIRST_CALL)
            if isinstance(hook, _FirstCall) and self in hook.guard:
                hook.guard.remove(self)
                if not hook.guard:
                    del hooks[FIRST_CALL]


class _FirstCall(LayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            for check in tuple(self.guard):
                check.called()
