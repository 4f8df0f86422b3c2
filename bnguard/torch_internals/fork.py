"""Renew locks in a forked child: a thread that held one in the parent does not exist there, and cannot release it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

# Windows has no fork.
_register: Final[Callable[..., None]] = getattr(os, "register_at_fork", lambda **_: None)


def call_in_children(function: Callable[[], object]) -> None:
    """Calls a function in every forked child."""
    _register(after_in_child=function)


def renew_after_fork(lock: Any) -> None:
    """Reinitialises a process-wide ``RLock`` in every forked child, unless the thread that forks holds it itself."""
    call_in_children(lambda: lock._is_owned() or lock._at_fork_reinit())
