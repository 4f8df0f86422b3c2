"""What every test file shares: devices, the number of processes, and the proof that no guard outlives its test."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

# Before torch is imported, and for every process that a test starts: each has a core of its own, and threads of several
# processes that wait for each other on one core cost ten times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by cuBLAS when it starts; without it deterministic algorithms refuse matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch.nn.modules import module as torch_module

from tests import forks
from tests.families import KEPT
from tests.old_torch import OLD_AUTOCAST, RELEASE
from tests.suites import Keeper

# The module-level tables in which bnguard notes open guards. They are empty between tests; a name that is not there
# fails every test.
TABLES = {
    "bnguard.guard.hold": "guards",
    "bnguard.guard.affine": "_held",
    "bnguard.layers.swaps": "swaps",
}
DEFAULT = "not slow"  # as in pyproject.toml
MEMORY = 3 * 2**30  # bytes that one process takes at most


def pytest_configure(config: pytest.Config) -> None:
    """Chooses how many random examples to run, and names failures at once."""
    is_quick = config.option.markexpr == DEFAULT
    os.environ.setdefault("HYPOTHESIS_PROFILE", "quick" if is_quick else "ci")  # read by tests/strategies.py
    if RELEASE < (2, 5):  # torch's own checkpoint() uses it
        config.addinivalue_line("filterwarnings", f"ignore:{re.escape(OLD_AUTOCAST)}:FutureWarning")
    if not hasattr(config, "workerinput") and config.option.verbose <= 0:
        config.pluginmanager.register(_Failures(config))


def pytest_xdist_auto_num_workers() -> int:
    """As many processes as there are cores, or as fit into memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(cores, memory // MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow tests.

    Those in ``tests/slow``, all but some cases of large families, and property tests where they run all their examples.
    """
    slow = Path(__file__).with_name("slow")
    seen: Counter[str] = Counter()
    for item in items:
        file, function = item.nodeid.split("::")[0], getattr(item, "originalname", item.name)
        seen[f"{file}::{function}"] += 1
        is_property = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        has_all_examples = config.option.markexpr != DEFAULT and is_property
        is_one_more = seen[f"{file}::{function}"] > KEPT.get(file, {}).get(function, len(items))
        if has_all_examples or is_one_more or slow in item.path.parents:
            item.add_marker("slow")


class _Failures:
    """Names each failed test when its report arrives, in the process that prints."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            outcome = "FAILED" if report.when == "call" else "ERROR"
            terminal.write(f"\n{outcome} {report.nodeid}\n", red=True)  # after the letter that stands for it


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU and, where there is one, a GPU; there results are deterministic, so that two runs can be compared."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield torch.device(request.param)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["forked", pytest.param("real", marks=pytest.mark.slow)])
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the programs of ``tests.forks`` in forked processes, and among the slow tests in real ones too."""
    with forks.real_processes() if request.param == "real" else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> None:
    """Garbage collections, and searches for references, pass over what was there before the tests of a file.

    That is a million objects of torch and pytest: a pass over them takes longer than most tests, and suites that run in
    this process collect at their end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    """After each test the tables of open guards are empty, and no hook is left that sees all modules."""
    Keeper.put_back()
    yield
    hooks = torch_module._global_forward_pre_hooks
    tables = [getattr(importlib.import_module(module), name) for module, name in TABLES.items()]
    left = [*hooks], [len(table) for table in tables if table]
    for table in (hooks, *tables):  # one failure must not become many
        table.clear()
    assert left == ([], []), "a guard, or a hook of its, outlived its test"


@pytest.fixture
def no_graphs() -> None:
    """As in a process that has compiled nothing."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is not None:
        utils.counters.clear()
