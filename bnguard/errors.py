"""The exceptions and the one warning category of bnguard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnguard.records import StatsChange


__all__ = ["BNGuardError", "BNGuardWarning", "StatsChangedError"]


class BNGuardError(RuntimeError):
    """Base class of the exceptions that bnguard raises about a run."""


class StatsChangedError(BNGuardError):
    """Guarded running statistics changed, or were about to.

    Raised from inside the forward that would have updated a layer, before the update; or at the end of the block for
    what only the comparison there can see.

    Args:
        message: What happened, where, by how much, and what to do.
        changes: The layers concerned. Empty where the exception was rebuilt from its text, as a ``DataLoader`` worker
            and ``DataParallel`` do.

    Attributes:
        changes: The layers concerned, in the order of ``model.state_dict()``.
    """

    def __init__(self, message: str, changes: tuple[StatsChange, ...] = ()) -> None:
        # In args for pickling; optional because DataLoader rebuilds an exception from its text.
        super().__init__(message, changes)
        self.changes = changes

    def __str__(self) -> str:
        return str(self.args[0])


class BNGuardWarning(UserWarning):
    """The category of every warning that bnguard issues."""


# As a user imports them, so that a traceback ends in "bnguard.StatsChangedError: ..."; pickles find them there.
for _class in (BNGuardError, StatsChangedError, BNGuardWarning):
    _class.__module__ = "bnguard"


def hides_frame(found: Any) -> bool:
    """Whether pytest leaves a frame of bnguard out of a traceback: that of bnguard's own errors, not that of a bug.

    A module of the guards has this as its ``__tracebackhide__``, which as a global costs a forward nothing.

    Args:
        found: What pytest knows of the exception, an ``ExceptionInfo``; None if nothing.
    """
    return isinstance(getattr(found, "value", None), BNGuardError)
