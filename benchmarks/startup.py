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
    """What ``frozen`` and ``bnguard run`` take once torch is imported, the time of which varies by more than that.

    This is the time of the processor and not of the clock. The least has as many modules, all of them empty.
    """
    title, plain = "Start beside torch, milliseconds of the processor more", "train.py, which imports torch"
    programs = {
        "the same with 'from bnguard import frozen'": ("from bnguard import frozen", 15.0),
        "bnguard run train.py": ("from bnguard.cli import main; main(['run', 'train.py'])", 60.0),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text("import torch\n")
        for name, (code, target) in programs.items():
            run_python("-c", f"import torch; {code}", cwd=folder)  # compiles our files
            _, modules = _beside_torch(code, folder)
            for number in range(modules):
                Path(folder, f"empty_{number}.py").touch()
            least = f"for number in range({modules}): __import__(f'empty_{{number}}')"
            taken = [(_beside_torch(code, folder)[0], _beside_torch(least, folder)[0]) for _ in range(12)]
            ours, theirs = map(spread, zip(*taken, strict=True))
            rows.append(Row("startup/torch", title, name, plain, ours, target))
            rows.append(Row("startup/torch", title, f"the least for that: {modules} empty modules", plain, theirs))
    return rows


_TIMED: Final = """\
import sys, time, torch
began = time.process_time()
{}
taken = 1000 * (time.process_time() - began)
print(taken, sum([name.startswith("bnguard") for name in sys.modules]), file=sys.stderr)
"""


def _beside_torch(code: str, folder: str) -> tuple[float, int]:
    """Milliseconds of code in a new process that has imported torch, and how many modules of ours it has at the end."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _TIMED.format(code)]
    done = subprocess.run(command, check=True, cwd=folder, env=kept, capture_output=True, text=True)
    taken, modules = done.stderr.split()
    return float(taken), int(modules)


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "startup/import": imported,
    "startup/pytest": collected,
    "startup/torch": beside_torch,
}
