"""What a script does to models beside running them: ``load_state_dict()``, ``reset_running_stats()``, ``train()``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bnguard.torch_internals.callsite import origin_of
from bnguard.torch_internals.patching import AttributePatch


class ModelEvents(Protocol):
    """Who is told."""

    def loaded(self, model: nn.Module) -> None:
        """A state dict was loaded into a module."""

    def was_reset(self, layer: nn.Module) -> None:
        """The statistics of a layer were reset."""

    def mode_changed(self, module: nn.Module, *, training: bool, by_user: bool) -> None:
        """``train()`` or ``eval()`` was called on a module, by the user or a library, and has reached its parts."""


def listen(user: ModelEvents) -> None:
    """Tells from now on. Has no effect if it has been asked for already."""
    for patch in _PATCHES:
        patch.add(user)


def unlisten(user: ModelEvents) -> None:
    """Tells no longer. May be done again."""
    for patch in _PATCHES:
        patch.remove(user)


def _count_loads(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        finally:
            for user in _loads.users:
                user.loaded(self)

    return load_state_dict


def _count_resets(reset: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reset)
    def reset_running_stats(self: nn.Module) -> None:
        reset(self)
        for user in _resets.users:
            user.was_reset(self)

    return reset_running_stats


def _see_modes(change: Callable[..., Any]) -> Callable[..., Any]:
    depth = 0  # train() calls itself for each child

    @functools.wraps(change)
    def train(self: nn.Module, mode: bool = True) -> Any:
        nonlocal depth
        depth += 1
        try:
            return change(self, mode)
        finally:
            depth -= 1
            if not depth:
                for user in _modes.users:
                    user.mode_changed(self, training=mode, by_user=_is_by_user())

    return train


def _is_by_user() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None and origin_of(frame.f_code.co_filename) == "machinery":
        frame = frame.f_back
    return origin_of(frame.f_code.co_filename) == "user"


_loads: Final[AttributePatch[ModelEvents]] = AttributePatch(nn.Module, "load_state_dict", _count_loads)
_resets: Final[AttributePatch[ModelEvents]] = AttributePatch(_NormBase, "reset_running_stats", _count_resets)
_modes: Final[AttributePatch[ModelEvents]] = AttributePatch(nn.Module, "train", _see_modes)
_PATCHES: Final = (_loads, _resets, _modes)
