"""The pytest plugin: the fixture ``bn_frozen``, the markers ``bn_frozen`` and ``bn_updates``, and two switches.

Loading it does not import torch: it costs nothing in a suite that uses none of this.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import pytest

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.pytest_plugin.markers import (
    after_set_up,
    guard_models,
    nearest_mark,
    reason_in_file,
    reason_of,
    settings_of,
)
from bnguard.pytest_plugin.report import (
    REPORTS,
    Move,
    Reporter,
    error_of_test_case,
    move_text,
    moves_of,
    raise_at_test,
)

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn

    from bnguard.guard.auto_guard import AutoGuard
    from bnguard.guard.options import GuardOptions, OnChange, Settings
    from bnguard.pytest_plugin.requests import FixtureGuard, TestGuards

__all__ = ["bn_frozen"]

Wanted: TypeAlias = Literal["raise", "no-grad", "warn", "off"]
_WANTED: Final = ("raise", "no-grad", "warn", "off")


@dataclasses.dataclass(frozen=True, slots=True)
class _Switches:
    """The command line and the configuration file.

    Attributes:
        on_change: What to do about an update in any test.
        place: Where ``on_change`` was given, for messages.
        report: Where to write a report: ``"terminal"``, ``"github"`` or the path of a JSON file; None for no report.
        may_update: Patterns of test files whose tests may update.
    """

    on_change: Wanted
    place: str
    report: str | None
    may_update: list[str]

    @property
    def reports(self) -> bool:
        """Whether to write a report."""
        return self.report is not None

    @property
    def needs_auto_guard(self) -> bool:
        """Whether to see every model that runs."""
        return self.on_change != "off" or self.reports


@dataclasses.dataclass(slots=True)
class _TestState:
    """What the plugin has opened for one test.

    Attributes:
        guards: Its guards.
        auto_guard: Guards every model that runs.
        reason: Why the test may update, ``""`` for no reason given; None if it may not.
        of_subtest: The last error of ours that a subtest has reported.
    """

    guards: TestGuards
    auto_guard: AutoGuard | None = None
    reason: str | None = None
    of_subtest: StatsChangedError | None = None


_SWITCHES: Final = pytest.StashKey[_Switches]()
_STATE: Final = pytest.StashKey[_TestState]()
_AUTO_GUARD_CLASS: Final = pytest.StashKey["type[AutoGuard]"]()  # if it is needed, and torch is imported
_WAITING: Final = pytest.StashKey[Callable[[], None]]()  # guards the test that is running, when it imports torch
_AUTO_GUARD: Final = pytest.StashKey["AutoGuard"]()  # of the test that is running
_MOVES: Final = pytest.StashKey[list[Move]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switches."""
    group = parser.getgroup("bnguard", "running statistics of BatchNorm layers (bnguard)")
    group.addoption(
        "--bn-frozen",
        choices=_WANTED,
        help="Fail every test that moves the running statistics of any model ('raise'), or only those in which a "
        "forward without gradients does ('no-grad'), or warn about it ('warn'); 'off' overrides the configuration "
        "file. Tests marked bn_updates may move them.",
    )
    group.addoption(
        "--bn-report",
        nargs="?",
        const="terminal",
        metavar="FILE.json|github",
        help="List which tests moved the running statistics of which layers, how often and from which line: in the "
        "summary, in a JSON file, or as annotations of GitHub.",
    )
    parser.addini(
        "bn_updates", "Patterns of test files, such as tests/train/*: their tests may move running statistics.",
        type="linelist", default=[],
    )  # fmt: skip
    parser.addini("bn_frozen", "As --bn-frozen: what to do about tests that move running statistics.", default="off")


def pytest_configure(config: pytest.Config) -> None:
    """Reads the switches, describes the markers."""
    config.addinivalue_line(
        "markers",
        "bn_frozen(on_change='raise', **options): fail the test if it moves the running statistics of a model that it "
        "gets from its fixtures and parameters; options are those of bnguard.frozen().",
    )
    config.addinivalue_line(
        "markers",
        "bn_updates(reason=''): let the test move running statistics although --bn-frozen, or a bn_frozen marker "
        "on its class or module, would fail it.",
    )
    in_file = str(config.getini("bn_frozen")).strip() or "off"
    if in_file not in _WANTED:
        from bnguard.words import suggestion

        raise pytest.UsageError(f"{config.inipath}: bn_frozen = {in_file}: {suggestion(in_file, _WANTED)}")
    on_line = config.getoption("bn_frozen")
    place = f"--bn-frozen={on_line}" if on_line else f"bn_frozen = {in_file}"
    report = config.getoption("bn_report")
    if report is not None and report not in REPORTS and not report.endswith(".json"):
        raise pytest.UsageError(
            f"--bn-report={report}: give github or the path of a .json file; to test {report}, put it before "
            "--bn-report"
        )
    switches = _Switches(cast("Wanted", on_line or in_file), place, report, config.getini("bn_updates"))
    config.stash[_SWITCHES] = switches
    if report is not None:
        config.pluginmanager.register(Reporter(report, config), "bnguard-report")


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
    if session.items and config.stash[_SWITCHES].needs_auto_guard and not config.getoption("collectonly"):
        import wrapt

        # Most suites have imported it by now: then this calls the function at once.
        wrapt.register_post_import_hook(lambda _: _torch_is_there(config), "torch")


def _torch_is_there(config: pytest.Config) -> None:
    """Guards the test that has just imported torch, and all later ones."""
    with suppress(ImportError):
        from bnguard.guard.auto_guard import AutoGuard
        from bnguard.torch_internals import global_hook

        config.stash[_AUTO_GUARD_CLASS] = AutoGuard
        config.add_cleanup(global_hook.remove_hook)
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
    auto_guard = request.config.stash.get(_AUTO_GUARD, None)
    if auto_guard is None:
        return (yield)
    auto_guard.end()
    try:
        return (yield)
    finally:
        auto_guard.begin()


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


def _switches(item: pytest.Item) -> _Switches:
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
    auto_guard = item.config.stash.get(_AUTO_GUARD_CLASS, None)
    if auto_guard is None:
        item.config.stash[_WAITING] = lambda: _open(item, None, reason)
        return
    state = _state_of(item)
    state.reason = reason
    from bnguard.guard import options
    from bnguard.pytest_plugin.requests import suite_phrases

    phrases = suite_phrases(switches.place)
    frontend = options.Frontend(
        phrases,
        has_coverage_warnings=False,
        is_outermost=True,
        is_silent=not acts,
        only_without_grad=acts and switches.on_change == "no-grad",
    )
    on_change: OnChange = "raise" if acts and switches.on_change == "raise" else "warn"
    settings = options.Settings(on_change, frontend=frontend)
    item.config.stash[_AUTO_GUARD] = state.auto_guard = auto_guard(state.guards, settings)
    state.auto_guard.begin()


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
    _end_auto_guard(item, state)
    if isinstance(error, StatsChangedError) and not item.config.getoption("fulltrace"):
        from bnguard.torch_internals.callsite import end_in_users_line  # imports torch

        end_in_users_line(error)
    raised, error = error, error or error_of_test_case(item) or state.of_subtest
    earlier = len(getattr(error, "__notes__", ()))
    texts = _end_guards(item, state, error)
    is_shown = isinstance(item, pytest.Function) and not isinstance(error, pytest.fail.Exception)
    if not is_shown or error is state.of_subtest:
        for note in getattr(error, "__notes__", [])[earlier:]:
            item.add_report_section("call", "bnguard", note)  # pytest does not show the notes of these
    _warn(item, texts, raised)


def _end_guards(item: pytest.Item, state: _TestState, error: BaseException | None) -> list[str]:
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
        item.stash[_MOVES] = moves = moves_of(state.guards.changes, state.reason)
        if _switches(item).reports:
            item.user_properties += [("bn_updates", move_text(move)) for move in moves]


def _end_auto_guard(item: pytest.Item, state: _TestState) -> None:
    if state.auto_guard is not None:
        del item.config.stash[_AUTO_GUARD]
        state.auto_guard.end()
        state.auto_guard = None  # it refers to models


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
