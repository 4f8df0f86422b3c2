"""Requests to guard models, and which of them guards a layer that several cover."""

from __future__ import annotations

import warnings
from enum import IntEnum

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard.frozen import frozen
from bnguard.guard.options import Settings, guarded_layers
from bnguard.layers.tree import find_layers
from bnguard.records import StatsChange
from bnguard.torch_internals.callsite import causes_of
from bnguard.torch_internals.locks import RLock


class Precedence(IntEnum):
    """Where a guard was requested. Precedence, highest first: fixture, marker, every model that runs."""

    FIXTURE = 0
    MARKER = 1
    EVERY_MODEL = 2


class GuardRequest:
    """One request to guard a model.

    Attributes:
        precedence: Where it was made.
        model: The model.
        settings: How to guard it.
        layers: The ids of the layers that the settings select.
        guarded: The ids of those that it guards now: the layers that no request of a higher precedence covers.
        guard: Their guard; None if it guards no layer now.
    """

    __slots__ = ("guard", "guarded", "layers", "model", "precedence", "settings")

    def __init__(self, precedence: Precedence, model: nn.Module, settings: Settings) -> None:
        self.precedence = precedence
        self.model = model
        self.settings = settings
        chosen = guarded_layers(model, find_layers(model), settings)
        self.layers = frozenset([id(layer.module) for layer in chosen])
        self.guarded: frozenset[int] = frozenset()
        self.guard: frozen | None = None

    def begin(self, wanted: frozenset[int]) -> None:
        """Guards the layers with the ids ``wanted``."""
        settings = self.settings
        if wanted != self.layers:
            others = (lambda _, module: id(module) not in wanted,)
            settings = settings._replace(exclude=settings.exclude + others)
        self.guard = frozen._of(self.model, settings)
        self.guard.start()
        self.guarded = wanted


class GuardRequests:
    """The requests of one test, or of one run of a script.

    A layer has one guard: that of the request with the highest precedence; of equal ones, the earliest.

    Attributes:
        changes: What the guards that have ended found.
    """

    def __init__(self) -> None:
        self.changes: list[StatsChange] = []
        self._requests: list[GuardRequest] = []
        self._failures: list[BaseException] = []
        # Reentrant: leaving a guard of the fixture arranges the requests again.
        self._lock = RLock()

    def add(self, precedence: Precedence, model: nn.Module, settings: Settings) -> GuardRequest:
        """Guards the layers of a model that no request of a higher precedence covers.

        Raises:
            ValueError: ``include`` or ``exclude`` selects nothing.
            BNGuardError: The guard cannot begin. Nothing is guarded for this request then.
        """
        request = GuardRequest(precedence, model, settings)
        with self._lock:
            self._requests.append(request)
            try:
                self._arrange()
            except BNGuardError:
                self._requests.remove(request)
                self._arrange()
                raise
        return request

    def remove(self, request: GuardRequest) -> None:
        """Ends the guard of a request. ``end()`` raises what it found."""
        with self._lock:
            self._requests.remove(request)
            self._end(request, None)
            self._arrange()

    def end(self, error: BaseException | None) -> list[str]:
        """Ends all guards, the last one first.

        Args:
            error: The exception with which the test or the script ended. Findings become notes of it.

        Returns:
            The texts of bnguard's warnings.

        Raises:
            StatsChangedError: The first finding, with the others as notes, if ``error`` is None.
        """
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BNGuardWarning)
            for request in reversed(self._requests):
                self._end(request, error)
            self._requests.clear()
        texts = []
        for record in caught:
            if issubclass(record.category, BNGuardWarning):
                texts.append(str(record.message))
            else:
                warnings.warn_explicit(record.message, record.category, record.filename, record.lineno)
        self._raise_failures(error)
        return texts

    def _raise_failures(self, error: BaseException | None) -> None:
        """Raises the first failure, or adds all of them to the exception as notes."""
        failures, self._failures = self._failures, []
        first = error or next(iter(failures), None)
        for failure in failures:
            if first is not None and failure is not first and not _is_covered(failure, first):
                first.add_note(f"bnguard: {failure}")
        if error is None and first is not None:
            raise first

    def _arrange(self) -> None:
        """Gives each layer to the request with the highest precedence."""
        plans: list[tuple[GuardRequest, frozenset[int]]] = []
        taken: frozenset[int] = frozenset()
        for request in sorted(self._requests, key=lambda request: request.precedence):
            if request.precedence is not Precedence.FIXTURE and request.guarded != request.layers - taken:
                plans.append((request, request.layers - taken))
            taken |= request.layers
        for request, _ in plans:  # all of them end before any begins: a layer never has two guards
            self._end(request, None)
        for request, wanted in plans:
            if wanted:
                request.begin(wanted)

    def _end(self, request: GuardRequest, error: BaseException | None) -> None:
        """Ends the guard of a request. An exception is kept for ``end()``."""
        guard, request.guard, request.guarded = request.guard, None, frozenset()
        if guard is not None:
            try:
                guard.__exit__(None, error, None)
            except BaseException as failure:
                self._failures.append(failure)
            self.changes += guard.changes


def _is_covered(failure: BaseException, error: BaseException) -> bool:
    """Whether a failure only reports stopped forwards that ``error``, or one of its causes, reports as well.

    Hypothesis runs a test many times, with new models each time, and shows one error for all of them.
    """
    lines = _stopped_lines(failure)
    covered: set[tuple[tuple[str, ...], str | None]] = set()
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or any([current is other for other in seen]):
            continue
        seen.append(current)
        covered |= _stopped_lines(current)
        waiting += causes_of(current)
    return bool(lines) and lines <= covered


def _stopped_lines(error: BaseException) -> set[tuple[tuple[str, ...], str | None]]:
    """The layers and lines of the forwards that an error stopped; empty if it reports anything else."""
    if not isinstance(error, StatsChangedError) or not all([change.prevented for change in error.changes]):
        return set()
    return {(change.names, change.where) for change in error.changes}
