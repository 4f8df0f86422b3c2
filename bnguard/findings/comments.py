"""Comments that ignore findings: ``# bnguard: ignore[BN003]``, or ``# bnguard: ignore`` for every code."""

from __future__ import annotations

import ast
import glob
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Final, NamedTuple

from bnguard.findings.codes import checked_code
from bnguard.findings.ignores import Ignore

_COMMENT: Final = re.compile(r"#\s*bnguard:\s*ignore(?!\w)\s*(?P<list>\[[^\]#]*\]?)?")


class Comments(NamedTuple):
    """The comments of one file.

    Attributes:
        ignores: One entry for each code.
        problems: What is wrong with those that cannot be read, each with its file and line.
    """

    ignores: tuple[Ignore, ...] = ()
    problems: tuple[str, ...] = ()


def comments_in(path: str, shown: str) -> Comments:
    """Reads the comments of a file.

    A comment on any line of a simple statement is about all its lines. In a compound statement, such as the head of a
    loop that goes over several lines, it is about its own line.

    Args:
        path: The absolute path.
        shown: The path in messages.

    Returns:
        The comments; none if the file cannot be read as Python.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        if "bnguard:" not in source:
            return Comments()
        spans = list(_simple_statements(ast.parse(source)))
        found = [
            (token.start[0], comment)
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and (comment := _COMMENT.search(token.string))
        ]
    except (OSError, SyntaxError, ValueError, RecursionError):  # the error of tokenize is a SyntaxError
        return Comments()
    ignores: list[Ignore] = []
    problems: list[str] = []
    for number, comment in found:
        own = [span for span in spans if number in span] or [range(number, number + 1)]
        lines = range(min([span.start for span in own]), max([span.stop for span in own]))
        source = f"{shown}:{number}"
        try:
            codes = _codes(comment["list"])
        except ValueError as error:
            problems.append(f"{source}: {error}")
            continue
        text = comment[0].strip()
        ignores += [Ignore(code or text, source, code, glob.escape(path), lines) for code in codes]
    return Comments(tuple(ignores), tuple(problems))


def _codes(listed: str | None) -> list[str | None]:
    """The codes in brackets; None for all codes.

    Raises:
        ValueError: There is no such code, or the bracket is not closed.
    """
    if listed is None:
        return [None]
    if not listed.endswith("]"):
        raise ValueError(f"'ignore{listed.rstrip()}' has no closing bracket; the comment has no effect")
    return [checked_code(code.strip()) for code in listed.strip("[]").split(",")]


def _simple_statements(tree: ast.Module) -> Iterator[range]:
    """The lines of each statement that contains no other statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not (hasattr(node, "body") or hasattr(node, "cases")):
            yield range(node.lineno, (node.end_lineno or node.lineno) + 1)
