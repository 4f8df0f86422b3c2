"""Raise, warn, or add a note to an exception, as the policy of a block says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bnguard.errors import BNGuardWarning, StatsChangedError, hides_frame
from bnguard.guard import messages
from bnguard.guard.messages import Cause
from bnguard.guard.options import Settings
from bnguard.torch_internals.callsite import CallSite, call_site, causes_of
from bnguard.torch_internals.distributed import rank_prefix

if TYPE_CHECKING:
    from bnguard.records import StatsChange

__tracebackhide__ = hides_frame

_ENDS = (GeneratorExit, StopIteration, StopAsyncIteration)  # of a generator: nothing went wrong


class Outcome:
    """Raises and warns for one block, and remembers what it has said.

    Args:
        settings: The options of the block.

    Attributes:
        has_warned: Whether something was warned about.
    """

    __slots__ = ("_errors", "_first", "_settings", "has_warned")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._errors: list[str] = []  # texts of the errors that forwards raised, each once
        self._first = [True]  # which the first update takes out, in one step
        self.has_warned = False

    @property
    def is_due(self) -> bool:
        """Whether there is something to do although nothing was found."""
        return bool(self._errors)

    @property
    def has_spoken(self) -> bool:
        """Whether something was raised or warned about."""
        return self.has_warned or bool(self._errors)

    def with_settings(self, settings: Settings) -> Outcome:
        """Another one, which has said as much."""
        outcome = Outcome(settings)
        outcome._errors, outcome.has_warned = self._errors, self.has_warned
        return outcome

    def stopped(self, change: StatsChange, mode: str, budget: int) -> StatsChangedError:
        """Returns the error for a forward that would have updated. The user's code may catch it."""
        text = rank_prefix() + messages.stopped_text(change, mode, budget, self._settings.frontend.phrases)
        self._note(text)
        return StatsChangedError(text, (change,))

    def claims_warning(self) -> bool:
        """Whether an update that was let through is the first one, of which ``updated`` warns."""
        if self.has_warned:
            return False
        try:
            return self._first.pop()
        except IndexError:  # another thread was faster
            return False

    def updated(self, change: StatsChange, mode: str, budget: int, site: CallSite) -> None:
        """Warns of the first update that was let through, at the user's line."""
        self.has_warned = True
        text = rank_prefix() + messages.kept_text(change, mode, budget, self._settings.frontend.phrases)
        warnings.warn(text, BNGuardWarning, stacklevel=site.stacklevel + 1)

    def act(
        self,
        found: Sequence[StatsChange],
        broadcast: Mapping[str, int],
        changes: tuple[StatsChange, ...],
        cause: Cause,
        error: BaseException | None,
        *,
        note: str = "",
    ) -> None:
        """Does what the policy says at the end of a block, or of ``check()``.

        Args:
            found: What the comparison has found.
            broadcast: Layers that ``DistributedDataParallel`` has overwritten, by first name: with the statistics of
                which rank.
            changes: Everything that is known to have changed, or was about to.
            cause: What is known of changes for which no forward was seen.
            error: The exception that leads out of the block.
            note: A line to add.

        Raises:
            StatsChangedError: As the policy says, unless an exception leads out of the block.
        """
        policy, phrases = self._settings.policy, self._settings.frontend.phrases
        earlier = [change for change in changes if change not in found]
        if policy.tells_others == "nothing":
            found = ()  # what is left are errors of forwards that were caught
        explained = [change for change in found if change.names[0] in broadcast]
        if explained:
            sources = sorted({broadcast[change.names[0]] for change in explained})
            self._warn(messages.broadcast_text(explained, sources, policy.puts_back, phrases), error)
        text = self._text([change for change in found if change not in explained], earlier, cause, error)
        if not text:
            return
        text = f"{text}\n{note}" if note else text
        raises = policy.stops or policy.tells_others == "error"
        if raises and error is None:
            self._note(rank_prefix() + text)  # of check(): may be caught as well
            raise StatsChangedError(rank_prefix() + text, changes)
        self.has_warned = True
        if error is not None:
            error.add_note(f"bnguard: {rank_prefix()}{text}")
        if not raises or isinstance(error, _ENDS):
            self._warn(text, error)

    def text(self, found: Sequence[StatsChange]) -> str:
        """What there is to say about changes where nobody can be told but by a printed text; empty for nothing."""
        text = self._text(found, (), "unknown", None)
        return text and rank_prefix() + text

    def _text(
        self, found: Sequence[StatsChange], earlier: Sequence[StatsChange], cause: Cause, error: BaseException | None
    ) -> str:
        """What there is to say; empty for nothing."""
        puts_back, phrases = self._settings.policy.puts_back, self._settings.frontend.phrases
        in_eval_mode = self._settings.use_running_stats
        texts = []
        if found and (puts_back or not self.has_warned):
            texts.append(messages.changed_text(found, puts_back, cause, phrases, in_eval_mode=in_eval_mode))
        if earlier and self._errors and not _reports(error, self._errors):
            texts.append(messages.swallowed_text(earlier, phrases))
        return "\n".join(texts)

    def _warn(self, text: str, error: BaseException | None) -> None:
        """Warns; a warning that is turned into an error does not replace an exception on its way."""
        try:
            warnings.warn(rank_prefix() + text, BNGuardWarning, stacklevel=call_site().stacklevel)
        except BNGuardWarning:
            if error is None:
                raise

    def _note(self, text: str) -> None:
        """Keeps the text of an error that may be caught; a loop that catches it each time adds nothing."""
        if text not in self._errors:
            self._errors.append(text)


def _reports(error: BaseException | None, texts: list[str]) -> bool:
    """Whether an exception is, or was caused by, one of ours. DataParallel rebuilds ours from its text."""
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
