"""The guards of one test, and which of them decides about a layer: the one that was asked for nearest to it."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final, Self

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard.agreement import Occasion, Parting
from bnguard.guard.frozen import frozen
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.phrases import Phrases
from bnguard.layers.select import select_layers
from bnguard.layers.tree import find_layers
from bnguard.records import StatsChange
from bnguard.torch_internals.callsite import causes_of

__all__ = ["MARKER", "OVER", "Guards", "LocalGuard", "Post", "Rank", "suite_phrases"]

_EVERYTHING: Final = "pytest --bn-report lists them all"
_FIXTURE: Final = Phrases("bn_frozen()", "bn_frozen(updates={})", "bn_frozen(model, {})")
OVER: Final = "bn_frozen() guards a model until its test ends, and this one has: call it in the test"
MARKER: Final = Phrases(
    "@pytest.mark.bn_frozen", "@pytest.mark.bn_frozen(updates={})", "@pytest.mark.bn_frozen({})", (), _EVERYTHING
)


def suite_phrases(place: str) -> Phrases:
    """What messages call the guard of a whole suite, which was switched on at ``place``."""
    mark = '@pytest.mark.bn_updates("why")'
    return Phrases(
        place, place, "bn_frozen(model, {})", ((mark, "let this test update"),), _EVERYTHING, f"write {mark}"
    )


class Rank(IntEnum):
    """Where a guard was asked for. The lowest one around a layer decides about it."""

    FIXTURE = 0
    MARKER = 1
    SUITE = 2


class LocalGuard(frozen):
    """What the fixture returns: a guard that is open until the test ends, or until a ``with`` block of it does."""

    __slots__ = ("_is_fresh", "_on_enter", "_on_leave")

    _frontend = Frontend(_FIXTURE)

    def _set(self, model: nn.Module, settings: Settings) -> None:
        super()._set(model, settings)
        self._is_fresh = False
        self._on_enter: Callable[[], object] = lambda: None
        self._on_leave: Callable[[], object] = lambda: None

    def open(self, on_enter: Callable[[], object], on_leave: Callable[[], object]) -> None:
        """Enters the block; calls ``on_enter`` before each that is entered, ``on_leave`` after each that is left."""
        self._on_enter, self._on_leave = on_enter, on_leave
        self.__enter__()
        self._is_fresh = True

    def _enter(self, occasion: Occasion | None) -> Self:
        if self._is_fresh:
            self._is_fresh = False
            return self
        self._on_enter()
        return super()._enter(occasion)

    def _leave(
        self, error: BaseException | None, parting: Parting = "wait", leaving: BaseException | None = None
    ) -> None:
        self._is_fresh = False
        try:
            super()._leave(error, parting, leaving)
        finally:
            self._on_leave()


class Post:
    """One request to guard a model during a test.

    Attributes:
        rank: Who asked.
        model: The model.
        settings: How to guard it.
        layers: The ids of the layers that are meant.
        held: Those that are guarded now: what no nearer request has taken.
        guard: Their guard; None where nothing is held.
    """

    __slots__ = ("guard", "held", "layers", "model", "rank", "settings")

    def __init__(self, rank: Rank, model: nn.Module, settings: Settings) -> None:
        self.rank = rank
        self.model = model
        self.settings = settings
        chosen = select_layers(model, find_layers(model), settings.include, settings.exclude)
        self.layers = frozenset([id(layer.module) for layer in chosen])
        self.held: frozenset[int] = frozenset()
        self.guard: frozen | None = None

    def begin(self, wanted: frozenset[int]) -> None:
        """Guards the layers that are ``wanted``."""
        settings = self.settings
        if wanted != self.layers:
            left_out = (lambda _, module: id(module) not in wanted,)
            settings = dataclasses.replace(settings, exclude=settings.exclude + left_out)
        self.guard = frozen._of(self.model, settings)
        self.guard.start()
        self.held = wanted


class Guards:
    """The guards of one test.

    A layer that several requests mean is guarded by the nearest: a fixture's before a marker's before that of the whole
    suite, of one rank the first. Only the fixture's own are nested, as blocks are.

    Attributes:
        changes: What the guards that are over have found.
    """

    def __init__(self) -> None:
        self.changes: list[StatsChange] = []
        self._posts: list[Post] = []
        self._locals: list[Post] = []  # of the fixture's guards, also those that are closed: they may be used again
        self._failures: list[BaseException] = []
        self._is_over = False
        # Reentrant: a guard that is left may call back.
        self._lock = threading.RLock()

    def add(self, rank: Rank, model: nn.Module, settings: Settings) -> Post:
        """Guards a model from now on, as far as nothing nearer does.

        Raises:
            ValueError: ``include`` or ``exclude`` selects nothing.
        """
        post = Post(rank, model, settings)
        with self._lock:
            self._posts.append(post)
            self._arrange()
        return post

    def add_local(self, guard: LocalGuard) -> None:
        """Opens a guard of the fixture: as long as it is open, nothing further out has a say about its layers."""
        post = Post(Rank.FIXTURE, guard._model, guard._settings)
        post.guard = guard
        post.held = post.layers
        self._locals.append(post)
        guard.open(lambda: self._entered(post), lambda: self._left(post))

    def drop(self, post: Post) -> None:
        """Ends what ``add`` has begun. What is found counts at the end of the test."""
        with self._lock:
            self._posts.remove(post)
            self._end(post, None)
            self._arrange()

    @property
    def is_over(self) -> bool:
        """Whether the test has ended."""
        return self._is_over

    def end(self, error: BaseException | None) -> list[str]:
        """Ends all guards, the last one first.

        Args:
            error: The exception with which the test ends, to which findings are added as notes.

        Returns:
            The texts of the warnings that were due.

        Raises:
            StatsChangedError: The first finding, with the others as notes, if the test has no error of its own.
        """
        self._is_over = True
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BNGuardWarning)
            for post in [*reversed(self._posts), *self._locals]:
                self._end(post, error)
            self._posts.clear()
            self._locals.clear()
        texts = [str(record.message) for record in caught if issubclass(record.category, BNGuardWarning)]
        # What is none of ours goes on to whoever listens.
        for record in caught:
            if not issubclass(record.category, BNGuardWarning):
                warnings.warn_explicit(record.message, record.category, record.filename, record.lineno)
        self._conclude(error)
        return texts

    def _conclude(self, error: BaseException | None) -> None:
        failures, self._failures = self._failures, []
        first = error or next(iter(failures), None)
        for failure in failures:
            if first is not None and failure is not first and not _is_told(failure, first):
                first.add_note(f"bnguard: {failure}")
        if error is None and first is not None:
            raise first

    def _arrange(self) -> None:
        """Has each layer guarded by the nearest request."""
        plans: list[tuple[Post, frozenset[int]]] = []
        taken: frozenset[int] = frozenset()
        for post in sorted(self._posts, key=lambda post: post.rank):
            if post.rank is not Rank.FIXTURE and post.held != post.layers - taken:
                plans.append((post, post.layers - taken))
            taken |= post.layers
        for post, _ in plans:  # all ends first: a layer never has two of them
            self._end(post, None)
        for post, wanted in plans:
            if wanted:
                post.begin(wanted)

    def _end(self, post: Post, error: BaseException | None) -> None:
        """Leaves the guard of a request, all open blocks of it; what that raises waits for the end of the test."""
        guard, post.held = post.guard, frozenset()
        if guard is None:
            return
        while guard._open:
            try:
                guard._leave(error)
            except BaseException as failure:
                self._failures.append(failure)
            if not isinstance(guard, LocalGuard):
                self._record(guard.changes)
        post.guard = None

    def _entered(self, post: Post) -> None:
        """A block of the fixture's guard is about to begin."""
        if self._is_over:
            raise BNGuardError(OVER)
        with self._lock:
            if post not in self._posts:
                self._posts.append(post)
                self._arrange()

    def _left(self, post: Post) -> None:
        """A block of the fixture's guard is over."""
        guard = post.guard
        if guard is None:
            return
        with self._lock:
            self._record(guard.changes)
            if not guard._open and post in self._posts and not self._is_over:
                self._posts.remove(post)
                self._arrange()

    def _record(self, changes: Iterable[StatsChange]) -> None:
        self.changes += changes


def _is_told(failure: BaseException, error: BaseException) -> bool:
    """Whether an error says that forwards were stopped, and another one, or what has led to it, has said so before.

    Hypothesis runs a test again and again, with models of its own each time, and shows one error for all.
    """
    lines = _stopped_lines(failure)
    told: set[tuple[tuple[str, ...], str | None]] = set()
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or any(current is other for other in seen):
            continue
        seen.append(current)
        told |= _stopped_lines(current)
        waiting += causes_of(current)
    return bool(lines) and lines <= told


def _stopped_lines(error: BaseException) -> set[tuple[tuple[str, ...], str | None]]:
    """Where the forwards were stopped that an error tells of; nothing if it tells of anything else."""
    if not isinstance(error, StatsChangedError) or not all([change.prevented for change in error.changes]):
        return set()
    return {(change.names, change.where) for change in error.changes}
