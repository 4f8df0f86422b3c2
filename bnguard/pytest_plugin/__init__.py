"""The pytest plugin: the fixture ``bn_frozen``, the markers ``bn_frozen`` and ``bn_updates``, and two switches.

Loading it does not import torch: a suite that uses none of this pays for nothing.
"""

from __future__ import annotations

import dataclasses
import unittest
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import pytest

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.pytest_plugin import report as _test_report
from bnguard.pytest_plugin.report import error_of_test_case, raise_at_test

if TYPE_CHECKING:
    from torch import nn

    from bnguard.guard.auto_guard import Lookout
    from bnguard.guard.options import OnChange
    from bnguard.layers.select import Selector
    from bnguard.pytest_plugin.requests import Guards, LocalGuard

__all__ = ["bn_frozen"]

Wanted: TypeAlias = Literal["raise", "warn", "off"]
_WANTED: Final = ("raise", "warn", "off")


@dataclasses.dataclass(frozen=True, slots=True)
class _Switches:
    """What the command line and the configuration file say.

    Attributes:
        on_change: What becomes of an update in any test.
        place: Where that was said, in the words of messages.
        reports: Whether there is to be a report.
    """

    on_change: Wanted
    place: str
    reports: bool

    @property
    def watches(self) -> bool:
        """Whether there is anything to see of models that nobody has named."""
        return self.on_change != "off" or self.reports


@dataclasses.dataclass(slots=True)
class _Watch:
    """What is put up around one test.

    Attributes:
        guards: Its guards.
        lookout: What sees models that nobody has named.
        reason: Why the test may update, ``""`` for no reason given; None where it may not.
    """

    guards: Guards
    lookout: Lookout | None = None
    reason: str | None = None


_SWITCHES: Final = pytest.StashKey[_Switches]()
_WATCH: Final = pytest.StashKey[_Watch]()
_LOOKOUT_CLASS: Final = pytest.StashKey["type[Lookout]"]()  # if it is needed, and there is a torch
_LOOKOUT: Final = pytest.StashKey["Lookout"]()  # of the test that is running
_MOVES: Final = pytest.StashKey[list[_test_report.Move]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switches."""
    group = parser.getgroup("bnguard", "running statistics of BatchNorm layers (bnguard)")
    group.addoption(
        "--bn-frozen",
        choices=_WANTED,
        help="Fail every test that moves the running statistics of any model ('raise'), or warn about it ('warn'); "
        "'off' overrides the configuration file. Tests marked bn_updates may move them.",
    )
    group.addoption(
        "--bn-report",
        action="store_true",
        help="List which tests moved the running statistics of which layers, how often and from which line.",
    )
    parser.addini("bn_frozen", "As --bn-frozen: what to do about tests that move running statistics.", default="off")


def pytest_configure(config: pytest.Config) -> None:
    """Reads the switches, describes the markers."""
    config.addinivalue_line(
        "markers",
        "bn_frozen(on_change='raise', **options): fail the test if it moves the running statistics of a model that its "
        "fixtures or parameters bring; options are those of bnguard.frozen().",
    )
    config.addinivalue_line(
        "markers",
        "bn_updates(reason=''): let the test move running statistics although --bn-frozen watches the suite, or a "
        "bn_frozen marker further out would fail it.",
    )
    in_file = str(config.getini("bn_frozen")).strip() or "off"
    if in_file not in _WANTED:
        from bnguard.words import suggestion

        raise pytest.UsageError(f"{config.inipath}: bn_frozen = {in_file}: {suggestion(in_file, _WANTED)}")
    on_line = config.getoption("bn_frozen")
    place = f"--bn-frozen={on_line}" if on_line else f"bn_frozen = {in_file}"
    switches = _Switches(cast("Wanted", on_line or in_file), place, config.getoption("bn_report"))
    config.stash[_SWITCHES] = switches
    if switches.reports:
        config.pluginmanager.register(_Reporter(), "bnguard-report")


@pytest.fixture
def bn_frozen(request: pytest.FixtureRequest) -> Iterator[Callable[..., LocalGuard]]:
    """A function: ``bn_frozen(model)`` fails the test if it moves the model's running statistics from there on.

    ``bn_frozen(model, on_change="raise", **options)`` takes the options of ``bnguard.frozen``, guards from the call to
    the end of the test, and returns the guard. In ``with bn_frozen(model):`` it ends with the block. May be called for
    several models. The statistics are put back for the next test that shares the model.
    """
    watch = _watch_of(request.node)

    def begin(
        model: nn.Module,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = False,
        affine: bool = False,
        updates: int = 0,
        include: Selector | list[Selector] | None = None,
        exclude: Selector | list[Selector] | None = None,
    ) -> LocalGuard:
        from bnguard.pytest_plugin.requests import OVER, LocalGuard

        if watch.guards.is_over:
            raise BNGuardError(OVER)
        guard = LocalGuard(
            model,
            on_change,
            use_running_stats=use_running_stats,
            affine=affine,
            updates=updates,
            include=include,
            exclude=exclude,
        )
        watch.guards.add_local(guard)
        return guard

    yield begin
    watch.guards.end(None)  # where the test itself never ran


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imports torch before any test can stand in its way, if it is to be watched."""
    switches = session.config.stash[_SWITCHES]
    if session.items and switches.watches and not session.config.getoption("collectonly"):
        with suppress(ImportError):
            from bnguard.guard.auto_guard import Lookout
            from bnguard.torch_internals import global_hook as _every_forward

            session.config.stash[_LOOKOUT_CLASS] = Lookout
            session.config.add_cleanup(_every_forward.stand_down)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Has a test begin without guards, and ends those of one whose setup fails."""
    if _WATCH in item.stash:  # of an earlier run: some plugins run a test again that has failed
        del item.stash[_WATCH]
    if _MOVES in item.stash:
        del item.stash[_MOVES]
    try:
        return (yield)
    except BaseException as error:
        _end(item, error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Looks away while a test asks for a fixture with ``request.getfixturevalue()``: fixtures may train models."""
    lookout = request.config.stash.get(_LOOKOUT, None)
    if lookout is None:
        return (yield)
    lookout.end()
    try:
        return (yield)
    finally:
        lookout.begin()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Guards the test, and has it fail for what its guards find."""
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


def _watch_of(item: pytest.Item) -> _Watch:
    """The watch of a test; made when it is asked for."""
    watch = item.stash.get(_WATCH, None)
    if watch is None:
        from bnguard.pytest_plugin.requests import Guards

        item.stash[_WATCH] = watch = _Watch(Guards())
    return watch


def _begin(item: pytest.Item) -> None:
    """Opens what the markers and the switches ask for."""
    switches = _switches(item)
    mark = _nearest_mark(item)
    allowed = mark is not None and mark.name == "bn_updates"
    if mark is None and not switches.watches:
        return
    watch = _watch_of(item)
    if mark is not None and allowed:
        watch.reason = _reason_of(mark)
    elif mark is not None:
        _begin_marked(item, mark, watch.guards)
    watches = switches.on_change != "off" and not allowed
    lookout = item.config.stash.get(_LOOKOUT_CLASS, None)
    if lookout is not None and (watches or switches.reports):
        from bnguard.guard.options import Frontend, Settings
        from bnguard.pytest_plugin.requests import suite_phrases

        frontend = Frontend(
            suite_phrases(switches.place), has_coverage_warnings=False, is_outermost=True, is_silent=not watches
        )
        settings = Settings("raise" if watches and switches.on_change == "raise" else "warn", frontend=frontend)
        item.config.stash[_LOOKOUT] = watch.lookout = lookout(watch.guards, settings)
        watch.lookout.begin()


def _nearest_mark(item: pytest.Item) -> pytest.Mark | None:
    """The one of our two markers that is nearest to the test: on its parameters, on the function, further out."""
    nearest: tuple[Any, pytest.Mark] | None = None
    callspec = getattr(item, "callspec", None)
    of_parameters = [] if callspec is None else [(callspec, mark) for mark in callspec.marks]
    for node, mark in [*of_parameters, *item.iter_markers_with_node()]:
        if mark.name not in ("bn_frozen", "bn_updates"):
            continue
        if nearest is None:
            nearest = node, mark
        elif node is nearest[0] and mark.name != nearest[1].name:
            pytest.fail(
                "bn_frozen and bn_updates contradict each other here: keep one of the two markers, or move the one "
                "that holds for fewer tests nearer to them",
                pytrace=False,
            )
    return None if nearest is None else nearest[1]


def _reason_of(mark: pytest.Mark) -> str:
    reason = mark.kwargs.get("reason", *(mark.args[:1] or ("",)))
    if not isinstance(reason, str) or len(mark.args) + len(mark.kwargs) > 1 or set(mark.kwargs) - {"reason"}:
        pytest.fail(f"bn_updates takes one reason, as in @pytest.mark.bn_updates('trains'), got {mark}", pytrace=False)
    return reason


def _begin_marked(item: pytest.Item, mark: pytest.Mark, guards: Guards) -> None:
    """Guards the models that reach a marked test."""
    from bnguard.guard.options import Frontend
    from bnguard.pytest_plugin.requests import MARKER

    try:
        settings = dataclasses.replace(_settings_of(*mark.args, **mark.kwargs), frontend=Frontend(MARKER))
    except (TypeError, ValueError) as error:
        pytest.fail(f"@pytest.mark.bn_frozen: {error}", pytrace=False)
    instance = getattr(item, "instance", None)
    if isinstance(instance, unittest.TestCase):
        _guard_after_set_up(item, instance, settings, guards)
    else:
        _guard_models(item, settings, guards)


def _settings_of(
    on_change: Any = "raise",
    *,
    use_running_stats: Any = False,
    affine: Any = False,
    updates: Any = 0,
    include: Any = None,
    exclude: Any = None,
    group: Any = False,
) -> Any:
    from bnguard.guard.options import check_settings

    return check_settings(on_change, use_running_stats, affine, updates, include, exclude, group)


def _guard_after_set_up(item: pytest.Item, instance: Any, settings: Any, guards: Guards) -> None:
    """Guards the models of a ``unittest.TestCase`` once it has made them, which is a part of running it."""
    name = "asyncSetUp" if hasattr(instance, "asyncSetUp") else "setUp"
    set_up = getattr(instance, name)

    async def wait_and_guard() -> None:
        await set_up()
        _guard_models(item, settings, guards)

    def guard() -> None:
        set_up()
        _guard_models(item, settings, guards)

    setattr(instance, name, wait_and_guard if name == "asyncSetUp" else guard)


def _guard_models(item: pytest.Item, settings: Any, guards: Guards) -> None:
    from bnguard.layers.search import modules_reachable_from, roots_of
    from bnguard.layers.tree import any_layer
    from bnguard.pytest_plugin.requests import Rank

    values = list(getattr(item, "funcargs", {}).values())
    instance = getattr(item, "instance", None)
    classes = [dict(vars(cls)) for cls in type(instance).__mro__[:-1]]  # what setup_class and others put there
    models = modules_reachable_from([*values, instance, *classes])
    if not models:
        pytest.fail(
            "@pytest.mark.bn_frozen guards the models that a test's fixtures and parameters bring, and none came: no "
            "torch.nn.Module among them, in their lists, tuples and dicts, or in their attributes. Inside the test, "
            "call the fixture: bn_frozen(model)",
            pytrace=False,
        )
    guarded = [model for model in models if any_layer(model)]
    if not guarded:
        from bnguard.guard.messages import unguarded_text

        item.warn(BNGuardWarning(unguarded_text(type(models[0]).__name__)))
        return
    roots, refusals = roots_of(guarded), []
    for model in roots:
        try:
            guards.add(Rank.MARKER, model, settings)
        except ValueError as error:  # a pattern may be about one of several models
            refusals.append(error)
    if len(refusals) == len(roots):
        pytest.fail(f"@pytest.mark.bn_frozen: {refusals[0]}", pytrace=False)


def _end(item: pytest.Item, error: BaseException | None) -> None:
    """Closes everything; what was found fails the test.

    Args:
        item: The test.
        error: The exception that is on its way out of it; that goes on, whatever is found.
    """
    watch = item.stash.get(_WATCH, None)
    if watch is None:
        return
    if watch.lookout is not None:
        del item.config.stash[_LOOKOUT]
        watch.lookout.end()
        watch.lookout = None  # it knows models
    if isinstance(error, StatsChangedError) and not item.config.getoption("fulltrace"):
        from bnguard.torch_internals.callsite import end_in_users_line  # imports torch

        end_in_users_line(error)
    on_its_way, error = error, error or error_of_test_case(item)
    # Neither is a failure: what was found is.
    is_failure = error is not None and not isinstance(error, (pytest.skip.Exception, pytest.xfail.Exception))
    told = len(getattr(error, "__notes__", ()))
    texts: list[str] = []
    try:
        texts = watch.guards.end(error if is_failure else None)
    except StatsChangedError as found:
        if error is not None:
            vars(item).pop("_excinfo", None)  # unittest's skip
        raise_at_test(item, found)
    finally:
        item.stash[_MOVES] = moves = _test_report.moves_of(watch.guards.changes, watch.reason)
        if _switches(item).reports:
            item.user_properties += [("bn_updates", _test_report.move_text(move)) for move in moves]
    for note in getattr(error, "__notes__", [])[told:]:
        if not isinstance(item, pytest.Function) or isinstance(error, pytest.fail.Exception):
            item.add_report_section("call", "bnguard", note)  # pytest shows no notes there
    for text in texts:
        try:
            item.warn(BNGuardWarning(text))
        except BNGuardWarning:  # under -W error
            if on_its_way is None:
                raise
            on_its_way.add_note(f"bnguard: {text}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts what a test moved into its report."""
    report = yield
    if _MOVES in item.stash and call.when != "teardown" and _switches(item).reports:
        # Of plain values, so that it reaches the main process of pytest-xdist.
        report._bnguard_moves = [dataclasses.asdict(move) for move in item.stash[_MOVES]]  # type: ignore[attr-defined]
    return report


class _Reporter:
    """Collects what tests moved, and lists it at the end."""

    def __init__(self) -> None:
        self._moves: dict[str, list[_test_report.Move]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes in one test, which may have run in another process."""
        moves = getattr(report, "_bnguard_moves", None)
        if moves:
            self._moves[report.nodeid] = [_test_report.Move(**move) for move in moves]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Writes the section."""
        terminalreporter.section("running statistics")
        for line in _test_report.report_lines(self._moves):
            terminalreporter.line(line)
