"""The report of what tests did to running statistics, for pytest's summary and JUnit; errors as pytest shows them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import pytest

from bnguard.records import StatsChange
from bnguard.words import count_text, layer_text

_SHOWN: Final = 3


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
    names = ", ".join(move.layers[:_SHOWN])
    more = f" and {len(move.layers) - _SHOWN} more" if len(move.layers) > _SHOWN else ""
    if move.where is None:
        return f"changed without a forward that could be seen: {names}{more}"
    did = "stopped" if move.prevented else "made"
    counts = f"{count_text(move.updates, 'update')} {did}, {count_text(len(move.layers), 'layer')}"
    return f"{move.where}: {counts}: {names}{more}"


def report_lines(moves: Mapping[str, Sequence[Move]]) -> list[str]:
    """The lines of the report.

    Args:
        moves: What each test did, by its node id.
    """
    if not moves:
        return ["No test moved running statistics."]
    lines = []
    for prevented in (False, True):
        tests = [updates for some in moves.values() if (updates := _updates(some, prevented=prevented)) is not None]
        if tests:
            counted = f": {count_text(sum(tests), 'update')}" if sum(tests) else ""
            lines.append(f"{_what(len(tests), prevented=prevented)}{counted}.")
    for test, some in moves.items():
        reason = some[0].reason
        allowed = "" if reason is None else f"  (bn_updates: {reason})" if reason else "  (bn_updates)"
        lines.append(f"{test}{allowed}")
        lines += [f"  {move_text(move)}" for move in some]
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
