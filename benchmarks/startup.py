"""What loading bnguard costs a program that does not use it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.race import Contender, Spread, race, spread
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]


def _python(*args: str, cwd: str | None = None, **variables: str) -> None:
    # With what Python and pytest keep of compiled files, as users have it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    silent = subprocess.DEVNULL
    subprocess.run([sys.executable, *args], check=True, cwd=cwd, env=kept | variables, stdout=silent, stderr=silent)


def _milliseconds_more(contenders: Sequence[Contender]) -> Spread:
    """How much longer the first takes than the second."""
    ours, theirs = race(contenders, rounds=20, steps=1).seconds.values()
    return spread([1000 * (one - other) for one, other in zip(ours, theirs, strict=True)])


def imported() -> list[Row]:
    """``import bnguard`` in a fresh interpreter; torch is not imported with it."""
    with_it, without = "python -c 'import bnguard'", "python -c pass"
    contenders = [
        Contender(with_it, lambda: _python("-c", "import bnguard")),
        Contender(without, lambda: _python("-c", "pass")),
    ]
    title = "Start of an interpreter, milliseconds more"
    return [Row("startup/import", title, with_it, without, _milliseconds_more(contenders), 10.0)]


def collected() -> list[Row]:
    """``pytest --collect-only`` of a suite without torch, with the plugin and without."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text("def test_it():\n    pass\n")
        collect = ("-m", "pytest", "--collect-only", "-q")
        # Without the plugins of others, whose start varies by more than ours takes.
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with_it, without = "pytest --collect-only -p bnguard.pytest_plugin", "pytest --collect-only"
        contenders = [
            Contender(with_it, lambda: _python(*collect, "-p", "bnguard.pytest_plugin", cwd=folder, **alone)),
            Contender(without, lambda: _python(*collect, cwd=folder, **alone)),
        ]
        more = _milliseconds_more(contenders)
    title = "Start of pytest in a suite without torch, milliseconds more"
    return [Row("startup/pytest", title, with_it, without, more, 30.0)]


BENCHMARKS: Final[dict[str, Benchmark]] = {"startup/import": imported, "startup/pytest": collected}
