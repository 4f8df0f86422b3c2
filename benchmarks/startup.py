"""What loading bnguard costs a program that does not use it."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from benchmarks.race import Contender, race, spread
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def imported() -> list[Row]:
    """``import bnguard`` in a fresh interpreter; torch is not imported with it."""
    contenders = [Contender("with", lambda: _python("import bnguard")), Contender("without", lambda: _python("pass"))]
    seconds = race(contenders, rounds=30, steps=1).seconds
    more = [1000 * (ours - theirs) for ours, theirs in zip(seconds["with"], seconds["without"], strict=True)]
    title = "Start of an interpreter, milliseconds more"
    return [Row("startup/import", title, "python -c 'import bnguard'", "python -c pass", spread(more), 10.0)]


BENCHMARKS: Final[dict[str, Benchmark]] = {"startup/import": imported}
