"""What comes of what a block has found: an exception, a warning, a note on somebody else's exception."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from bnguard.errors import BNGuardWarning, StatsChangedError
from bnguard.guard import messages as _report
from bnguard.guard.agreement import Agreement, Parting, Statistics
from bnguard.guard.messages import Cause
from bnguard.guard.options import Settings
from bnguard.records import StatsChange
from bnguard.torch_internals.callsite import CallSite, call_site, causes_of

__all__ = ["Outcome"]

_ENDS = (GeneratorExit, StopIteration, StopAsyncIteration)  # of a generator: nothing went wrong


class Outcome:
    """Raises and warns for one block, and remembers what it has said.

    Args:
        settings: Of the block.
        agreement: With the other ranks; None where there are none.
    """

    __slots__ = ("_agreement", "_errors", "_settings", "_warned")

    def __init__(self, settings: Settings, agreement: Agreement | None) -> None:
        self._settings = settings
        self._agreement = agreement
        self._errors: list[str] = []  # texts of the errors that forwards raised, each once
        self._warned = settings.frontend.is_silent

    @property
    def is_due(self) -> bool:
        """Whether there is something to do although nothing was found."""
        return bool(self._errors) or self._agreement is not None

    def begin(self) -> None:
        """The block begins."""
        if self._agreement is not None:
            self._agreement.begin()

    def end(self) -> None:
        """The block is over. Twice does nothing."""
        if self._agreement is not None:
            self._agreement.end()

    def abandon(self, error: BaseException) -> None:
        """An error keeps the block from finding anything: the other ranks need not wait."""
        if self._agreement is not None:
            self._agreement.abandon(error)

    def stopped(self, change: StatsChange, mode: str, budget: int) -> StatsChangedError:
        """The error for a forward that would have updated; may be caught."""
        text = _report.stopped_text(change, mode, budget, self._settings.frontend.phrases)
        self._note(text)
        return StatsChangedError(text, (change,))

    def stood(self, change: StatsChange, mode: str, budget: int, site: CallSite) -> None:
        """Warns of the first update that stands, at the user's line; of several ranks one does."""
        if not self._warned and (self._agreement is None or self._agreement.speaks):
            self._warned = True
            text = _report.stood_text(change, mode, budget, self._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=site.stacklevel + 1)

    def act(
        self,
        found: Sequence[StatsChange],
        statistics: Statistics,
        changes: tuple[StatsChange, ...],
        cause: Cause,
        error: BaseException | None,
        parting: Parting = "wait",
        leaving: BaseException | None = None,
        *,
        is_end: bool = True,
    ) -> None:
        """Does what the policy says at the end of a block, or of ``check()``.

        Args:
            found: What the comparison has found.
            statistics: What is known of those of them that another rank may have overwritten.
            changes: All that is known to have changed, or was about to.
            cause: What is known of those that no forward was seen of.
            error: The exception on its way out.
            parting: What other ranks learn of it, where there is no exception.
            leaving: An exception on its way that the block does not see.
            is_end: Whether the block ends.

        Raises:
            StatsChangedError: As ``on_change="raise"`` says, and no exception is on its way.
        """
        keeps = self._settings.on_change != "warn"
        earlier = [change for change in changes if change not in found]

        def text_but_of(names: frozenset[str]) -> str:
            return self._text([change for change in found if change.names[0] not in names], earlier, cause, error)

        aside, names = "", frozenset(statistics.found)
        if self._agreement is None:
            text = text_but_of(names)
        else:
            first = leaving or (None if isinstance(error, (StopIteration, StopAsyncIteration)) else error)
            text, aside, names = self._agreement.reach(
                text_but_of,
                found or changes,
                first,
                changes if self._warned else (),
                statistics,
                parting if first is None else "tell",
                is_end,
            )
        overwritten = [change for change in found if change.names[0] in names]
        if overwritten and not self._settings.frontend.is_silent:
            sources = sorted({statistics.found[change.names[0]][1] for change in overwritten})
            self._warn(_report.broadcast_text(overwritten, sources, keeps, self._settings.frontend.phrases), error)
        if aside:
            self._warn(aside, error)
        if not text:
            return
        if self._settings.on_change == "raise" and error is None:
            self._note(text)  # of check(): may be caught as well
            raise StatsChangedError(text, changes)
        self._warned = True
        if error is not None:
            error.add_note(f"bnguard: {text}")
        if self._settings.on_change != "raise" or isinstance(error, _ENDS):
            self._warn(text, error)

    def _text(
        self, found: Sequence[StatsChange], earlier: Sequence[StatsChange], cause: Cause, error: BaseException | None
    ) -> str:
        """What this process has to say; empty for nothing."""
        keeps, phrases = self._settings.on_change != "warn", self._settings.frontend.phrases
        texts = []
        if found and (keeps or not self._warned):
            texts.append(_report.changed_text(found, keeps, cause, phrases))
        if earlier and self._errors and not _reports(error, self._errors):
            texts.append(_report.swallowed_text(earlier, phrases))
        return "\n".join(texts)

    def _warn(self, text: str, error: BaseException | None) -> None:
        """Warns; where that is an error, it does not take the place of one on its way."""
        try:
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
        except BNGuardWarning:
            if error is None:
                raise

    def _note(self, text: str) -> None:
        """Keeps the text of an error that may be caught; a loop that catches it each time adds nothing."""
        if text not in self._errors:
            self._errors.append(text)


def _reports(error: BaseException | None, texts: list[str]) -> bool:
    """Whether an exception on its way is, or was caused by, one of ours. DataParallel rebuilds ours from its text."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, StatsChangedError) and any([text in str(current) for text in texts]):
            return True
        waiting += causes_of(current)
    return False
