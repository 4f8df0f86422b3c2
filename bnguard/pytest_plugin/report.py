"""The report of what tests did to running statistics, for pytest's summary and JUnit; errors as pytest shows them."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NoReturn

import pytest

from bnguard.records import StatsChange
from bnguard.report.github import Kind, annotation
from bnguard.words import count_text, first_of, layer_text

REPORTS: Final = ("terminal", "github")
# How many are named: tests of a line, and lines.
_TESTS: Final = 5
_LINES: Final = 20
_WIDTH: Final = 80  # columns of the longest line


@dataclass(frozen=True, slots=True)
class Move:
    """What one line of code did to running statistics in one test. Has plain values, as it is sent between processes.

    Attributes:
        where: The line of the first update, ``"train.py:42 in train_step"``; None if no forward was seen.
        layers: The layers, as messages print them.
        updates: The number of updates of all of them.
        prevented: Whether the updates were stopped.
        reason: Why the test may update; None if it may not, ``""`` if it gives no reason.
    """

    where: str | None
    layers: Sequence[str]
    updates: int
    prevented: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class TestMoves:
    """What one test did.

    Attributes:
        name: Its node id.
        moves: What it did, by line of code.
    """

    __test__ = False  # is no test

    name: str
    moves: Sequence[Move]


def moves_of(changes: Iterable[StatsChange], reason: str | None) -> list[Move]:
    """Groups changes by line."""
    layers: dict[tuple[str | None, bool], dict[str, int]] = {}
    for change in changes:
        counts = layers.setdefault((change.where, change.prevented), {})
        text = layer_text(change.names, change.type)
        counts[text] = counts.get(text, 0) + change.updates
    return [
        Move(where, list(counts), sum(counts.values()), prevented, reason)
        for (where, prevented), counts in layers.items()
    ]


def move_text(move: Move) -> str:
    """What one line of code did, in one line."""
    names = first_of(move.layers)
    if move.where is None:
        return f"changed without a forward that could be seen: {names}"
    did = "stopped" if move.prevented else "made"
    counts = f"{count_text(move.updates, 'update')} {did}, {count_text(len(move.layers), 'layer')}"
    return f"{move.where}: {counts}: {names}"


def report_lines(tests: Sequence[TestMoves]) -> list[str]:
    """The lines of the report: by line of code, and for each of them the tests that ran it.

    Args:
        tests: What each test did, in the order in which to name them.
    """
    if not tests:
        return ["No test moved running statistics."]
    lines = []
    for prevented in (False, True):
        updates = [some for test in tests if (some := _updates(test.moves, prevented=prevented)) is not None]
        if updates:
            counted = f": {count_text(sum(updates), 'update')}" if sum(updates) else ""
            lines.append(f"{_what(len(updates), prevented=prevented)}{counted}.")
    groups: dict[tuple[str | None, bool], list[tuple[TestMoves, Move]]] = {}
    for test in tests:
        for move in test.moves:
            groups.setdefault((move.where, move.prevented), []).append((test, move))
    ordered = sorted(groups.values(), key=len, reverse=True)
    for group in ordered[:_LINES]:
        lines += _group_lines(group)
    return [*lines, *_more(len(ordered) - _LINES, "line")]


def _group_lines(group: Sequence[tuple[TestMoves, Move]]) -> list[str]:
    """What one line of code did, and in which tests."""
    moves = [move for _, move in group]
    layers = list(dict.fromkeys(layer for move in moves for layer in move.layers))
    updates, where = sum([move.updates for move in moves]), moves[0].where
    counts = f"{count_text(len(layers), 'layer')} in {count_text(len(group), 'test')}"
    if where is None:
        head = f"without a forward that could be seen {counts} changed:"
    elif moves[0].prevented:
        head = f"{where} was stopped: {counts}, {count_text(updates, 'update')}:"
    else:
        head = f"{where} moved {counts}, {count_text(updates, 'update')}:"
    shown = [first_of(layers)]
    for test, move in group[:_TESTS]:
        allowed = "" if move.reason is None else f"  (bn_updates: {move.reason})" if move.reason else "  (bn_updates)"
        shown.append(f"{test.name}{allowed}")
    shown += _more(len(group) - _TESTS, "test")
    return [*_wrapped(head, ""), *[line for text in shown for line in _wrapped(text, "  ")]]


def _more(number: int, what: str) -> list[str]:
    return [f"and {number} more {what}{'s' if number > 1 else ''}"] if number > 0 else []


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False)


def as_json(tests: Sequence[TestMoves]) -> str:
    """The report as a JSON document, for programs: the list of tests, each with its moves."""
    listed = [
        {"test": test.name, "moves": [{**asdict(move), "layers": list(move.layers)} for move in test.moves]}
        for test in tests
    ]
    return json.dumps({"version": 1, "tests": listed}, indent=2) + "\n"


def github_lines(tests: Sequence[TestMoves]) -> list[str]:
    """The report as workflow commands, which GitHub shows at the lines: a notice where the test may update."""
    lines = []
    for test in tests:
        for move in test.moves:
            kind: Kind = "notice" if move.reason is not None else "warning"
            lines.append(annotation(kind, f"{test.name}: {move_text(move)}", move.where))
    return lines


def _what(tests: int, *, prevented: bool) -> str:
    if not prevented:
        return f"{count_text(tests, 'test')} moved running statistics"
    return (
        "1 test was stopped before it moved any" if tests == 1 else f"{tests} tests were stopped before they moved any"
    )


def _updates(moves: Sequence[Move], *, prevented: bool) -> int | None:
    """The number of updates of one test that were made, or that were stopped; None if there is no such move."""
    some = [move.updates for move in moves if move.prevented is prevented]
    return sum(some) if some else None


def error_of_test_case(item: pytest.Item) -> BaseException | None:
    """The first error of a ``unittest.TestCase``, whose ``run()`` does not raise it."""
    errors = getattr(item, "_excinfo", None) or ()
    return next((error.value for error in errors), None)


def raise_at_test(item: pytest.Item, error: BaseException) -> NoReturn:
    """Raises an error from the line that defines the test, so that pytest shows the test instead of the plugin."""
    __tracebackhide__ = True
    place = _definition_of(item)
    if place is None:
        raise error.with_traceback(None)
    filename, lineno, width = place
    tree = ast.parse("def throw(): raise error")
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            node.lineno = node.end_lineno = lineno
            node.col_offset, node.end_col_offset = 0, width
    names = {"error": error.with_traceback(None)}
    exec(compile(tree, filename, "exec"), names)
    names["throw"]()  # type: ignore[operator]  # which exec() has defined
    raise AssertionError


def _definition_of(item: pytest.Item) -> tuple[str, int, int] | None:
    """File, number and length of the line that defines the test function."""
    function = inspect.unwrap(getattr(item, "function", None) or item.runtest)
    if not isinstance(item, pytest.Function) or not inspect.isfunction(function):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:
        return None
    for number, line in enumerate(lines):
        if line.lstrip().startswith(("def ", "async def ")):
            return function.__code__.co_filename, first + number, len(line.rstrip())
    return None


class Reporter:
    """Collects what tests moved, and writes it at the end.

    Args:
        report: Where to: one of ``REPORTS``, or the path of a JSON file.
        config: That of the process that collects.
    """

    def __init__(self, report: str, config: pytest.Config) -> None:
        self._report = report
        self._root = config.invocation_params.dir
        self._tests: dict[tuple[str, int, str], TestMoves] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collects one test, which may have run in another process."""
        moves = getattr(report, "_bnguard_moves", None)
        if moves:
            file, line, _ = report.location
            key = file, line or 0, report.nodeid  # in the order of the files, whoever was first
            self._tests[key] = TestMoves(report.nodeid, [Move(**move) for move in moves])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Writes the report."""
        tests = [self._tests[key] for key in sorted(self._tests)]
        if self._report == "github":
            for line in github_lines(tests):
                terminalreporter.line(line)
            return
        terminalreporter.section("running statistics")
        for line in report_lines(tests):
            terminalreporter.line(line)
        if self._report not in REPORTS:
            path = self._root / self._report
            path.write_text(as_json(tests), encoding="utf-8")
            terminalreporter.line(f"as JSON: {self._report}")
