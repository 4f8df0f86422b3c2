"""The pytest plugin: the fixture ``bn_frozen``, the markers ``bn_frozen`` and ``bn_updates``, and two switches.

Loading it does not import torch: it costs nothing in a suite that uses none of this.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.pytest_plugin.markers import (
    MARKERS,
    after_set_up,
    guard_models,
    nearest_mark,
    reason_in_file,
    reason_of,
    settings_of,
)
from bnguard.pytest_plugin.report import Move, Reporter, error_of_test_case, move_text, moves_of, raise_at_test
from bnguard.pytest_plugin.switches import Switches, add_switches, read_switches
from bnguard.words import roots

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn

    from bnguard.guard.auto_guard import AutoGuard
    from bnguard.guard.options import GuardOptions, OnChange, Settings
    from bnguard.pytest_plugin.recording import TestRecording
    from bnguard.pytest_plugin.requests import FixtureGuard, TestGuards
    from bnguard.records import StatsChange

__all__ = ["bn_frozen"]


@dataclasses.dataclass(slots=True)
class _TestState:
    """What the plugin has opened for one test.

    Attributes:
        guards: Its guards.
        recording: Records what every model that runs does; None where every model is guarded, or left alone.
        reason: Why the test may update, ``""`` for no reason given; None if it may not.
        of_subtest: The last error of ours that a subtest has reported.
    """

    guards: TestGuards
    recording: TestRecording | None = None
    reason: str | None = None
    of_subtest: StatsChangedError | None = None


_SWITCHES: Final = pytest.StashKey[Switches]()
_STATE: Final = pytest.StashKey[_TestState]()
_HAS_TORCH: Final = pytest.StashKey[bool]()  # there if every model is to be seen, and torch is imported
_WAITING: Final = pytest.StashKey[Callable[[], None]]()  # guards the test that is running, when it imports torch
_EVERY_MODEL: Final = pytest.StashKey["AutoGuard | TestRecording"]()  # of the test that is running
_MOVES: Final = pytest.StashKey[list[Move]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switches."""
    add_switches(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Reads the switches, describes the markers."""
    for description in MARKERS:
        config.addinivalue_line("markers", description)
    config.stash[_SWITCHES] = switches = read_switches(config)
    roots.append(str(config.rootpath))
    config.add_cleanup(functools.partial(roots.__delitem__, -1))
    if switches.report is not None:
        config.pluginmanager.register(Reporter(switches.report, config), "bnguard-report")


@pytest.fixture
def bn_frozen(request: pytest.FixtureRequest) -> Iterator[Callable[..., FixtureGuard]]:
    """A function: ``bn_frozen(model)`` fails the test if it moves the model's running statistics from there on.

    ``bn_frozen(model, on_change="raise", **options)`` takes the options of ``bnguard.frozen``, guards from the call to
    the end of the test, and returns the guard. In ``with bn_frozen(model):`` it ends with the block. May be called for
    several models. The statistics are restored for the next test that shares the model.
    """
    guards = _state_of(request.node).guards

    def begin(model: nn.Module, on_change: OnChange = "raise", **options: Unpack[GuardOptions]) -> FixtureGuard:
        from bnguard.pytest_plugin.requests import OVER, FixtureGuard

        if guards.is_over:
            raise BNGuardError(OVER)
        guard = FixtureGuard(model, on_change, **options)
        guards.add_fixture(guard)
        return guard

    yield begin
    guards.end(None)  # if the test itself never ran


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepares to see every model that runs, if that is needed, as soon as something imports torch."""
    config = session.config
    if session.items and config.stash[_SWITCHES].sees_every_model and not config.getoption("collectonly"):
        import wrapt

        # Most suites have imported it by now: then this calls the function at once.
        wrapt.register_post_import_hook(lambda _: _torch_is_there(config), "torch")


def _torch_is_there(config: pytest.Config) -> None:
    """Guards the test that has just imported torch, and all later ones."""
    with suppress(ImportError):
        from bnguard.layers.parents import registrations
        from bnguard.torch_internals import global_hook

        config.stash[_HAS_TORCH] = True
        config.add_cleanup(global_hook.remove_hook)
        registrations.begin()
        config.add_cleanup(registrations.end)
        if _WAITING in config.stash:
            config.stash[_WAITING]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Begins a test without guards, and ends its guards if its setup fails."""
    if _STATE in item.stash:  # from an earlier run: some plugins run a failed test again
        del item.stash[_STATE]
    if _MOVES in item.stash:
        del item.stash[_MOVES]
    try:
        return (yield)
    except BaseException as error:
        _end(item, error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Pauses while a test asks for a fixture with ``request.getfixturevalue()``: fixtures may train models."""
    every_model = request.config.stash.get(_EVERY_MODEL, None)
    if every_model is None:
        return (yield)
    every_model.end()
    try:
        return (yield)
    finally:
        every_model.begin()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Guards the test, and fails it for what its guards find."""
    try:
        _begin(item)
        result = yield
    except BaseException as error:
        _end(item, error)
        raise
    _end(item, None)
    return result


def _switches(item: pytest.Item) -> Switches:
    return item.config.stash[_SWITCHES]


def _state_of(item: pytest.Item) -> _TestState:
    """The state of a test; created on first use."""
    state = item.stash.get(_STATE, None)
    if state is None:
        from bnguard.pytest_plugin.requests import TestGuards

        item.stash[_STATE] = state = _TestState(TestGuards())
    return state


def _begin(item: pytest.Item) -> None:
    """Opens the guards that the markers and the switches ask for."""
    switches, mark = _switches(item), nearest_mark(item)
    settings = reason = None
    if mark is None:
        reason = reason_in_file(item, switches.may_update)
    elif mark.name == "bn_updates":
        reason = reason_of(mark)
    else:
        settings = settings_of(mark)
    if settings is not None or switches.reports or (switches.on_change != "off" and reason is None):
        after_set_up(item, functools.partial(_open, item, settings, reason))


def _open(item: pytest.Item, settings: Settings | None, reason: str | None) -> None:
    """Guards the models of a marked test, then every model that runs.

    Args:
        item: The test.
        settings: The options of its marker ``bn_frozen``.
        reason: As in ``_TestState``.
    """
    if settings is not None:
        guard_models(item, settings, _state_of(item).guards)
    switches = _switches(item)
    acts = switches.on_change != "off" and reason is None
    if not acts and not switches.reports:
        return
    if _HAS_TORCH not in item.config.stash:
        item.config.stash[_WAITING] = lambda: _open(item, None, reason)
        return
    state = _state_of(item)
    state.reason = reason
    from bnguard.pytest_plugin.requests import suite_phrases

    phrases = suite_phrases(switches.place)
    every_model: AutoGuard | TestRecording
    if acts and switches.on_change != "warn":
        from bnguard.guard import auto_guard, options

        is_milder = switches.on_change == "no-grad"
        frontend = options.Frontend(
            phrases, has_coverage_warnings=False, is_outermost=True, only_without_grad=is_milder
        )
        every_model = auto_guard.AutoGuard(state.guards, options.Settings(frontend=frontend))
    else:
        from bnguard.pytest_plugin.recording import TestRecording

        every_model = state.recording = TestRecording(state.guards, phrases if acts else None)
    item.config.stash[_EVERY_MODEL] = every_model
    every_model.begin()


def _end(item: pytest.Item, error: BaseException | None) -> None:
    """Ends all guards. What they found fails the test.

    Args:
        item: The test.
        error: The exception with which it ended. It is never replaced.
    """
    if _WAITING in item.config.stash:
        del item.config.stash[_WAITING]
    state = item.stash.get(_STATE, None)
    if state is None:
        return
    recorded, told = _end_every_model(item, state)
    if isinstance(error, StatsChangedError) and not item.config.getoption("fulltrace"):
        from bnguard.torch_internals.callsite import end_in_users_line  # imports torch

        end_in_users_line(error)
    raised, error = error, error or error_of_test_case(item) or state.of_subtest
    earlier = len(getattr(error, "__notes__", ()))
    texts = _end_guards(item, state, error, recorded)
    is_shown = isinstance(item, pytest.Function) and not isinstance(error, pytest.fail.Exception)
    if not is_shown or error is state.of_subtest:
        for note in getattr(error, "__notes__", [])[earlier:]:
            item.add_report_section("call", "bnguard", note)  # pytest does not show the notes of these
    _tell(item, told, raised)
    _warn(item, texts, raised)


def _end_guards(
    item: pytest.Item, state: _TestState, error: BaseException | None, recorded: list[StatsChange]
) -> list[str]:
    """Ends the guards of a test, and raises what they found unless the test has failed. Returns warnings."""
    # A skipped test has not failed, nor has an expected failure: a finding does fail them.
    is_failure = error is not None and not isinstance(error, (pytest.skip.Exception, pytest.xfail.Exception))
    try:
        return state.guards.end(error if is_failure else None)
    except StatsChangedError as found:
        if error is not None:
            vars(item).pop("_excinfo", None)  # unittest's skip
        raise_at_test(item, found)
    finally:
        item.stash[_MOVES] = moves = moves_of([*state.guards.changes, *recorded], state.reason)
        if _switches(item).reports:
            item.user_properties += [("bn_updates", move_text(move)) for move in moves]


def _end_every_model(item: pytest.Item, state: _TestState) -> tuple[list[StatsChange], list[str]]:
    """Sees no further models. Returns what was recorded, and warnings about it."""
    if _EVERY_MODEL in item.config.stash:
        item.config.stash[_EVERY_MODEL].end()
        del item.config.stash[_EVERY_MODEL]
    recording, state.recording = state.recording, None
    return ([], []) if recording is None else recording.stop()


def _tell(item: pytest.Item, texts: list[str], raised: BaseException | None) -> None:
    """Warns, and changes no test: an error only for who asks for errors in place of these warnings, by name."""
    with warnings.catch_warnings():
        if not any([entry[0] == "error" and entry[2] is BNGuardWarning for entry in warnings.filters]):
            warnings.simplefilter("always", BNGuardWarning)
        _warn(item, texts, raised)


def _warn(item: pytest.Item, texts: list[str], raised: BaseException | None) -> None:
    for text in texts:
        try:
            item.warn(BNGuardWarning(text))
        except BNGuardWarning:  # under -W error
            if raised is None:
                raise
            raised.add_note(f"bnguard: {text}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what a test moved to its report. Subtests report while the test runs."""
    state = item.stash.get(_STATE, None)
    error = None if call.excinfo is None else call.excinfo.value
    if state is not None and not state.guards.is_over and isinstance(error, StatsChangedError):
        state.of_subtest = error
    report = yield
    if _MOVES in item.stash and call.when != "teardown" and _switches(item).reports:
        # Plain values, so that it reaches the main process of pytest-xdist.
        moves = [dataclasses.asdict(move) for move in item.stash[_MOVES]]
        report._bnguard_moves = moves  # type: ignore[attr-defined]  # reports take any, and xdist sends them along
    return report
