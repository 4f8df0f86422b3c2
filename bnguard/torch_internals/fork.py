"""Locks in a forked child: another thread of the parent may have held them, and is not there to let them go."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["renew_after_fork"]


def renew_after_fork(*locks: Any) -> None:
    """Has process-wide locks be free in a forked child."""
    if hasattr(os, "register_at_fork"):
        for lock in locks:
            os.register_at_fork(after_in_child=lock._at_fork_reinit)  # as the locks of the standard library
