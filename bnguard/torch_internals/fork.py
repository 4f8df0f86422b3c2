"""Renew locks in a forked child: a thread that held one in the parent does not exist there, and cannot release it."""

from __future__ import annotations

import os
from typing import Any


def renew_after_fork(*locks: Any) -> None:
    """Reinitialises process-wide locks in every forked child, where they are then free."""
    if hasattr(os, "register_at_fork"):
        for lock in locks:
            os.register_at_fork(after_in_child=lock._at_fork_reinit)  # as the standard library does
