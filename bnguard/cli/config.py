"""The table ``[tool.bnguard]`` of ``pyproject.toml``: what holds for every run in a project."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from bnguard.cli.exit_codes import UsageError
from bnguard.cli.options import checked_codes
from bnguard.findings.ignores import Ignore, parse_ignore
from bnguard.words import short_repr, suggestion

_NAME: Final = "pyproject.toml"


class Config(NamedTuple):
    """What the table says. An option of the command line replaces the key of its name.

    Attributes:
        path: The file, as messages name it; empty if there is none.
        ignore: Entries that ignore findings.
        fail_on: Codes of findings with which a run fails that would otherwise exit with 0.
        frozen: Pattern of the layers to guard; None guards none.
    """

    path: str = ""
    ignore: tuple[Ignore, ...] = ()
    fail_on: frozenset[str] = frozenset()
    frozen: str | None = None


def load_config() -> Config:
    """Reads the nearest ``pyproject.toml`` with the table, from the working directory upwards.

    Raises:
        UsageError: A file cannot be read, has a key that bnguard does not know, or a value of a wrong type.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        path = folder / _NAME
        if path.is_file():
            shown = os.path.relpath(path)
            table = _table_of(path, shown)
            if table is not None:
                return _config_of(table, shown)
    return Config()


def _table_of(path: Path, shown: str) -> dict[str, Any] | None:
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # tomllib's own error is a ValueError
        raise UsageError(f"{shown} cannot be read: {error}") from error
    tools = content.get("tool")
    if not isinstance(tools, dict) or "bnguard" not in tools:
        return None
    table = tools["bnguard"]
    if not isinstance(table, dict):
        raise UsageError(f"{shown}: tool.bnguard must be a table, got {short_repr(table)}")
    return table


def _config_of(table: dict[str, Any], shown: str) -> Config:
    readers: dict[str, Callable[[Any], Any]] = {
        "ignore": lambda value: tuple([parse_ignore(entry, shown) for entry in _strings(value)]),
        "fail-on": lambda value: checked_codes([value] if value == "all" else _strings(value, "'all' or ")),
        "frozen": _pattern,
    }
    read: dict[str, Any] = {}
    for key, value in table.items():
        if key not in readers:
            raise UsageError(f"{shown}: unknown key {key!r} in [tool.bnguard]: {suggestion(key, readers)}")
        try:
            read[key.replace("-", "_")] = readers[key](value)
        except ValueError as error:
            raise UsageError(f"{shown}: {key} in [tool.bnguard]: {error}") from error
    return Config(shown, **read)


def _strings(value: Any, otherwise: str = "") -> list[str]:
    if not isinstance(value, list) or not all([isinstance(item, str) for item in value]):
        raise ValueError(f"must be {otherwise}a list of strings, got {short_repr(value)}")
    return value


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a pattern on the names of layers, got {short_repr(value)}")
    return value
