"""The guards of one test: those of the fixture as well, which are blocks that the test may leave and enter again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

from torch import nn

from bnguard.errors import BNGuardError
from bnguard.guard.frozen import frozen
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.phrases import Phrases
from bnguard.guard.requests import GuardRequest, GuardRequests, Precedence

_EVERYTHING: Final = "pytest --bn-report lists them all"
_FIXTURE: Final = Phrases("bn_frozen()", "bn_frozen(updates={})", "bn_frozen(model, {})")
OVER: Final = "bn_frozen() guards a model until its test ends, and this test has ended: call it inside the test"
MARKER: Final = Phrases(
    "@pytest.mark.bn_frozen", "@pytest.mark.bn_frozen(updates={})", "@pytest.mark.bn_frozen({})", (), _EVERYTHING
)


def suite_phrases(place: str) -> Phrases:
    """What messages call the guard of a whole suite; ``place`` is the switch that began it."""
    mark = '@pytest.mark.bn_updates("why")'
    return Phrases(
        place, place, "bn_frozen(model, {})", ((mark, "let this test update"),), _EVERYTHING, f"write {mark}"
    )


class FixtureGuard(frozen):
    """What the fixture returns: a guard that is open until the test ends, or until a ``with`` block of it does."""

    __slots__ = ("_is_fresh", "_on_enter", "_on_leave")

    _frontend = Frontend(_FIXTURE)

    def _set(self, model: nn.Module, settings: Settings) -> None:
        super()._set(model, settings)
        self._is_fresh = False
        self._on_enter: Callable[[], object] = lambda: None
        self._on_leave: Callable[[], object] = lambda: None

    def open(self, on_enter: Callable[[], object], on_leave: Callable[[], object]) -> None:
        """Enters a block; a ``with`` statement that follows uses this block.

        Args:
            on_enter: Called before each block is entered.
            on_leave: Called after each block.
        """
        self._on_enter, self._on_leave = on_enter, on_leave
        self.start()
        self._is_fresh = True

    def __enter__(self) -> Self:
        if self._is_fresh:
            self._is_fresh = False
            return self
        self._on_enter()
        return super().__enter__()

    def _leave(self, error: BaseException | None, *args: Any, **options: Any) -> None:
        self._is_fresh = False
        if self._open:
            try:
                super()._leave(error, *args, **options)
            finally:
                self._on_leave()


class TestGuards(GuardRequests):
    """The guards of one test. Guards of the fixture may be nested, as blocks are.

    Attributes:
        is_over: Whether the test has ended.
    """

    __test__ = False  # pytest collects classes with this name

    def __init__(self) -> None:
        super().__init__()
        self.is_over = False
        self._of_fixture: list[GuardRequest] = []  # closed ones too: they may be entered again

    def add_fixture(self, guard: FixtureGuard) -> None:
        """Opens a guard of the fixture. While it is open, no marker and no switch guards its layers."""
        request = GuardRequest(Precedence.FIXTURE, guard._model, guard._settings)
        request.guard, request.guarded = guard, request.layers
        self._of_fixture.append(request)
        guard.open(lambda: self._entered(request), lambda: self._left(request))

    def guard_layer(self, layer: int) -> bool:
        """Whether one of them guards the layer with this id now."""
        return any([layer in request.layers for request in self._requests])

    def have_guarded_layer(self, layer: int) -> bool:
        """Whether one of them guards the layer with this id, or has guarded it."""
        return any([layer in request.layers for request in [*self._requests, *self._of_fixture]])

    def end(self, error: BaseException | None) -> list[str]:
        """Ends all guards, for good. See ``GuardRequests.end``."""
        self.is_over = True
        try:
            return super().end(error)
        finally:
            for request in self._of_fixture:
                request.guard = None
            self._of_fixture.clear()

    def _end(self, request: GuardRequest, error: BaseException | None) -> None:
        if request.precedence is not Precedence.FIXTURE:
            super()._end(request, error)
            return
        guard = request.guard
        while guard is not None and guard._open:  # which calls _left()
            try:
                guard.__exit__(None, error, None)
            except BaseException as failure:
                self._failures.append(failure)

    def _entered(self, request: GuardRequest) -> None:
        if self.is_over:
            raise BNGuardError(OVER)
        with self._lock:
            if request not in self._requests:
                self._requests.append(request)
                self._arrange()

    def _left(self, request: GuardRequest) -> None:
        guard = request.guard
        if guard is None:
            return
        with self._lock:
            self.changes += guard.changes
            if not guard._open and request in self._requests and not self.is_over:
                self._requests.remove(request)
                self._arrange()
