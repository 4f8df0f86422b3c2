"""What is to be said about what the zoo finds: why models are skipped, and what moves besides running statistics."""

from __future__ import annotations

__all__ = ["MOVING_STATE", "REASONS"]

# A part of the reason that was recorded, and how the table words it. The first that is found counts.
REASONS = {
    "memory: ": "too large for the memory limit",
    "timeout": "more time than the limit",
    "inplace_abn": "needs inplace_abn, which is compiled against one torch",
}

# A part of "Class.buffer", and what that buffer is.
MOVING_STATE: dict[str, str] = {}
