"""Small test suites that the tests of the pytest plugin write and run, and the same suites without the plugin."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import pytest

__all__ = ["HEAD", "Keeper", "Suite", "suite"]

HEAD = """
import pytest, torch
from torch import nn
import bnguard

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

IMAGES = torch.ones(2, 3, 8, 8)

@pytest.fixture
def model():
    return make()

def moved(model):
    return bool(model[1].num_batches_tracked) or bool(model[1].running_mean.any())
"""

# What stands in for the plugin in a twin.
TWIN = """
import contextlib
import pytest

@pytest.fixture
def bn_frozen():
    return lambda *args, **options: contextlib.nullcontext()
"""

INI = """
[pytest]
asyncio_default_fixture_loop_scope = function
{lines}
"""


class Keeper:
    """Keeps what suites have imported: pytester forgets it, and torch does not take being imported again."""

    modules: ClassVar[dict[str, ModuleType]] = {}
    _lasting = ("torch", "hypothesis", "bnguard", "sympy", "numpy", "networkx", "_hypothesis_pytestplugin")

    def pytest_unconfigure(self) -> None:
        """Takes in what a suite has imported."""
        self.take()

    @classmethod
    def take(cls) -> None:
        """Takes in what is imported now."""
        lasting = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in cls._lasting}
        cls.modules.update(lasting)

    @classmethod
    def put_back(cls) -> None:
        """Has it imported again."""
        sys.modules.update(cls.modules)


class Suite:
    """A directory with one test file."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.ini()

    def ini(self, *lines: str) -> None:
        """Writes the configuration file."""
        self.pytester.makeini(INI.format(lines="\n".join(lines)))

    def run(self, source: str, *args: str, **outcomes: int) -> pytest.RunResult:
        """Runs a file of tests after ``HEAD``, and asserts how they ended."""
        self.pytester.makepyfile(test_it=HEAD + source)
        return self.again(*args, **outcomes)

    def again(self, *args: str, **outcomes: int) -> pytest.RunResult:
        """Runs the file that is there."""
        result = self._run(*args)
        assert {name: n for name, n in result.parseoutcomes().items() if name != "warnings"} == outcomes
        return result

    def twin_passes(self) -> None:
        """Runs the same file without the plugin: every test passes."""
        self.pytester.makeconftest(TWIN)
        result = self._run("-p", "no:bnguard", "-W", "ignore")
        assert set(result.parseoutcomes()) == {"passed"}

    def _run(self, *args: str) -> pytest.RunResult:
        Keeper.put_back()
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # and not what this suite itself runs under
            return self.pytester.runpytest_inprocess("-p", "no:cacheprovider", *args, plugins=[Keeper()])

    def fails(self, source: str, *args: str, **outcomes: int) -> pytest.RunResult:
        """Runs tests of which some fail, but none of them without the plugin."""
        result = self.run(source, *args, **outcomes)
        assert outcomes.get("failed")
        self.twin_passes()
        return result


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Suite]:
    """An empty suite, whose report is the one at a desk: on CI pytest repeats whole messages in its summary."""
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    yield Suite(pytester)
    Keeper.take()


def block(result: pytest.RunResult, start: str) -> str:
    """The lines of an error ``E   ...`` from the one that contains ``start``, without what stands before each."""
    lines = result.outlines
    first = next(number for number, line in enumerate(lines) if start in line and line.startswith("E "))
    last = next(number for number in range(first, len(lines) + 1) if not lines[number].startswith("E "))
    indent = len(lines[first]) - len(lines[first][1:].lstrip())
    return "\n".join(line[indent:] for line in lines[first:last])
