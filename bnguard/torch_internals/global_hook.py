"""See every forward of every module in this process: one hook that torch calls before each."""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from bnguard.torch_internals.compile import at_compile_time
from bnguard.torch_internals.turns import Turn

__all__ = ["Listener", "interests_changed", "listen", "stand_down", "unlisten"]

# One function under one key for the whole process: graphs are compiled anew for another one.
_KEY: Final = "bnguard"
_turn: Final = Turn()
_listeners: tuple[Listener, ...] = ()


class Listener(Protocol):
    """Who wants to know of forwards.

    Attributes:
        wants_results: Whether ``after`` is to be called, which costs every module a second hook. Who changes it calls
            ``interests_changed``.
    """

    wants_results: bool

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module is about to run."""

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module has run, and did not fail."""

    def traced(self, key: int) -> None:
        """The module of this id is being compiled into a graph, which runs no hook afterwards."""


def listen(listener: Listener) -> None:
    """Tells ``listener`` of every forward from now on."""
    global _listeners
    with _turn:
        _pre_hooks.setdefault(_KEY, _before_forward)
        torch_module._has_any_global_hook = _has_any_other_hook
        _listeners = (*_listeners, listener)
        _set_post_hook()


def unlisten(listener: Listener, *, keep_hook: bool = False) -> None:
    """Tells ``listener`` of no more. May be done again.

    Args:
        listener: The one.
        keep_hook: Leave the hook on although nobody listens, for somebody who will soon.
    """

    def ending() -> None:
        global _listeners
        _listeners = tuple([other for other in _listeners if other is not listener])
        _set_post_hook()
        if not _listeners and not keep_hook:
            _take_off()

    _turn.end(ending)


def interests_changed() -> None:
    """Puts on or takes off what the listeners want now; in time for the forward that is about to begin."""
    with _turn:
        _set_post_hook()


def stand_down() -> None:
    """Takes the hook off, unless somebody listens."""

    def ending() -> None:
        if not _listeners:
            _take_off()

    _turn.end(ending)


def _set_post_hook() -> None:
    if any([listener.wants_results for listener in _listeners]):
        _post_hooks.setdefault(_KEY, _after_forward)
    else:
        _post_hooks.pop(_KEY, None)


def _take_off() -> None:
    _pre_hooks.pop(_KEY, None)
    if torch_module._has_any_global_hook is _has_any_other_hook:
        torch_module._has_any_global_hook = _has_any_global_hook


_pre_hooks: Final[dict[Any, Any]] = torch_module._global_forward_pre_hooks
_post_hooks: Final[dict[Any, Any]] = torch_module._global_forward_hooks
_has_any_global_hook: Final = torch_module._has_any_global_hook


def _has_any_other_hook() -> bool:
    """What torch asks before it warns that a compiled module runs such hooks twice: ours does not mind."""
    tables: tuple[dict[Any, Any], ...] = (
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
    )
    return any([key != _KEY for table in tables for key in table])


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            _traced(id(module))
        return
    for listener in _listeners:
        listener.before(module, args)


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for listener in _listeners:
        if listener.wants_results:
            listener.after(module, args, output)


@at_compile_time
def _traced(key: int) -> None:
    for listener in _listeners:
        listener.traced(key)
