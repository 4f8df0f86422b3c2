"""What loading bnguard costs a program that does not use it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.race import Contender, Spread, race, spread
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS", "run_python"]


def run_python(*args: str, cwd: str | None = None, **variables: str) -> None:
    """Runs ``python`` with these arguments and variables; its output is dropped, and a failure is an error."""
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
        Contender(with_it, lambda: run_python("-c", "import bnguard")),
        Contender(without, lambda: run_python("-c", "pass")),
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
            Contender(with_it, lambda: run_python(*collect, "-p", "bnguard.pytest_plugin", cwd=folder, **alone)),
            Contender(without, lambda: run_python(*collect, cwd=folder, **alone)),
        ]
        more = _milliseconds_more(contenders)
    title = "Start of pytest in a suite without torch, milliseconds more"
    return [Row("startup/pytest", title, with_it, without, more, 30.0)]


def beside_torch() -> list[Row]:
    """``frozen`` and ``bnguard run`` in a program that imports torch, whose own start varies by more than they take.

    So this is the time of the processor and not of the clock.
    """
    used: dict[str, list[float]] = {}
    plain, imported, run = (
        "train.py, which imports torch",
        "the same with 'from bnguard import frozen'",
        "bnguard run train.py",
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text("import torch\n")
        Path(folder, "guarded.py").write_text("import torch\nfrom bnguard import frozen\n")
        commands = {plain: ["train.py"], imported: ["guarded.py"], run: ["-m", "bnguard", "run", "train.py"]}
        for number in range(-2, 12):
            for name in commands if number % 2 else reversed(commands):
                before = _processor_time()
                run_python(*commands[name], cwd=folder)
                if number >= 0:
                    used.setdefault(name, []).append(_processor_time() - before)
    rows = []
    for name, target in ((imported, 15.0), (run, 60.0)):
        more = spread([1000 * (one - other) for one, other in zip(used[name], used[plain], strict=True)])
        rows.append(
            Row("startup/torch", "Start beside torch, milliseconds of the processor more", name, plain, more, target)
        )
    return rows


def _processor_time() -> float:
    """Seconds that the processes have used that this one has started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "startup/import": imported,
    "startup/pytest": collected,
    "startup/torch": beside_torch,
}
