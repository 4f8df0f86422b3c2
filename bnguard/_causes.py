"""What has led to an exception."""

from __future__ import annotations

__all__ = ["causes_of"]


def causes_of(error: BaseException) -> list[BaseException | None]:
    """The exceptions that one was raised from, while handling, or that it holds: groups, and doctest's wrapper."""
    causes = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        causes += error.exceptions
    held = getattr(error, "exc_info", None)  # doctest.UnexpectedException
    if isinstance(held, tuple) and len(held) == 3 and isinstance(held[1], BaseException):
        causes.append(held[1])
    return causes
