"""Errors of a test as pytest shows them: the test, and not the plugin."""

from __future__ import annotations

import ast
import inspect
from typing import NoReturn

import pytest

__all__ = ["error_of_test_case", "raise_at_test"]


def error_of_test_case(item: pytest.Item) -> BaseException | None:
    """The first error of a ``unittest.TestCase``: its ``run()`` raises none."""
    errors = getattr(item, "_excinfo", None) or ()
    return next((error.value for error in errors), None)


def raise_at_test(item: pytest.Item, error: BaseException) -> NoReturn:
    """Raises an error from the line that defines the test: what pytest shows is the test, and not the plugin."""
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
    names["throw"]()  # type: ignore[operator]  # what exec has defined
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
