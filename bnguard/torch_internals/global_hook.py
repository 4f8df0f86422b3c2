"""Observe every forward of every module in this process, with one global forward pre-hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from bnguard.errors import BNGuardError
from bnguard.torch_internals.compile import at_compile_time, is_exporting
from bnguard.torch_internals.patching import Patch

# One function under one key for the whole process: a different function would make compiled graphs recompile.
_KEY: Final = "bnguard"


class Listener:
    """An object whose methods are called for each forward of a module. Those of this class do nothing.

    Attributes:
        wants_results: Whether ``after`` is called, which takes a second hook on every module. Call
            ``update_hooks()`` after changing it.
    """

    wants_results = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called before the forward of a module."""

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called after a forward that did not raise."""

    def traced(self, key: int) -> None:
        """Called when the module with this id is compiled into a graph, which runs no hooks."""


# Keeps the hook registered between two listeners, so that compiled graphs stay valid.
_KEEPER: Final = Listener()


def listen(listener: Listener) -> None:
    """Starts calling ``listener`` for every forward. Has no effect if it has been started already."""
    _hook.add(listener)


def unlisten(listener: Listener, *, keep_hook: bool = False) -> None:
    """Stops calling ``listener``. Has no effect if it has not been started.

    Args:
        listener: The listener.
        keep_hook: Keep the hook registered without a listener, because another one will follow soon. ``remove_hook()``
            removes it, or stopping a later listener without this option.
    """

    def without(listeners: tuple[Listener, ...]) -> tuple[Listener, ...]:
        others = tuple([other for other in listeners if other is not listener and other is not _KEEPER])
        return (*others, _KEEPER) if keep_hook or (others and _KEEPER in listeners) else others

    _hook.swap(without)


def update_hooks() -> None:
    """Registers or removes the second hook after a listener's ``wants_results`` has changed.

    Called before a forward begins, this takes effect for that forward.
    """
    _hook.sync()


def remove_hook() -> None:
    """Removes a hook that ``unlisten(keep_hook=True)`` has kept, unless there are listeners."""
    _hook.remove(_KEEPER)


def _register_hooks(listeners: tuple[Listener, ...]) -> None:
    """Registers the hooks that the listeners need, and removes the others. May be repeated at any time.

    See rule 2 of Note [Interrupted anywhere].
    """
    if any([listener.wants_results for listener in listeners]):
        _post_hooks.setdefault(_KEY, _after_forward)
    else:
        _post_hooks.pop(_KEY, None)
    if listeners:
        _pre_hooks.setdefault(_KEY, _before_forward)
        if _has_any_global_hook is not None:
            torch_module._has_any_global_hook = _has_any_other_hook
    else:
        _pre_hooks.pop(_KEY, None)
        if _has_any_global_hook is not None and torch_module._has_any_global_hook is _has_any_other_hook:
            torch_module._has_any_global_hook = _has_any_global_hook


_pre_hooks: Final[dict[Any, Any]] = torch_module._global_forward_pre_hooks
_post_hooks: Final[dict[Any, Any]] = torch_module._global_forward_hooks
# Before torch 2.8, which has no such warning, it is missing.
_has_any_global_hook: Final[Callable[[], bool] | None] = getattr(torch_module, "_has_any_global_hook", None)
_hook: Final[Patch[Listener]] = Patch(_register_hooks)


def _has_any_other_hook() -> bool:
    """Whether a global hook other than bnguard's is registered.

    Replaces ``_has_any_global_hook``, by which torch decides to warn that a compiled module would run global hooks
    twice. bnguard's hooks may run twice.
    """
    tables: tuple[dict[Any, Any], ...] = (
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
    )
    return any([key != _KEY for table in tables for key in table])


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        if not is_exporting():
            _traced(id(module))
        return
    listeners = iter(_hook.users)
    try:
        for listener in listeners:
            listener.before(module, args)
    except BNGuardError:  # a guard stops the forward; the others are to see the module all the same
        for listener in listeners:
            listener.before(module, args)
        raise


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for listener in _hook.users:
        if listener.wants_results:
            listener.after(module, args, output)


@at_compile_time
def _traced(key: int) -> None:
    for listener in _hook.users:
        listener.traced(key)
