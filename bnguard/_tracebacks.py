"""Tracebacks that end where the user's code does."""

from __future__ import annotations

from types import TracebackType

from bnguard._callsite import is_machinery

__all__ = ["end_in_users_line"]


def end_in_users_line(error: BaseException) -> None:
    """Has the traceback of an error of ours end in the user's line, where torch called the layer."""
    last: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        if not is_machinery(trace.tb_frame.f_code.co_filename):
            last = trace
        trace = trace.tb_next
    if last is not None:
        last.tb_next = None
