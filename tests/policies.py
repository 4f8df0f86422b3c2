"""The ways to guard that a test runs through, and what they are called in its name."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["EVERY_GUARD", "EVERY_POLICY", "GUARDS", "POLICIES"]

POLICIES: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "budget": {"on_change": "restore", "updates": 9},
    "affine": {"on_change": "restore", "affine": True},
}
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
# With a budget that several forwards exceed, and without affine.
GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "budget": {"on_change": "restore", "updates": 1},
    "rollback": {"on_change": "rollback"},
}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)
