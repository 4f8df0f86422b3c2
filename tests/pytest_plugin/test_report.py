"""``--bn-report``: which tests moved what, in the summary, in JUnit's file, and across processes."""

import xml.etree.ElementTree as ElementTree

import pytest

from bnguard.pytest_plugin.report import move_text, moves_of, report_lines
from bnguard.records import StatsChange
from tests.suites import Suite, suite

__all__ = ["suite"]

SOURCE = """
def train(net, times):
    for _ in range(times):
        net(IMAGES)

def test_trains():
    train(make(), 3)

@pytest.mark.bn_updates("it trains")
def test_allowed():
    train(nn.Sequential(make(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 2)

@pytest.mark.bn_updates
def test_without_reason():
    make()(IMAGES)

def test_fine():
    make().eval()(IMAGES)

def test_restores(model, bn_frozen):
    bn_frozen(model, "restore")
    model(IMAGES)

def test_writes(model, bn_frozen):
    bn_frozen(model, "warn")
    model[1].running_mean.data.add_(1)
"""
LINES = """\
5 tests moved running statistics: 12 updates.
test_it.py::test_trains
  test_it.py:20 in train: 3 updates made, 1 layer: 1 (BatchNorm2d)
test_it.py::test_allowed  (bn_updates: it trains)
  test_it.py:20 in train: 8 updates made, 4 layers: 0.1 (BatchNorm2d), 1 (BatchNorm2d), 2 (BatchNorm2d) and 1 more
test_it.py::test_without_reason  (bn_updates)
  test_it.py:31 in test_without_reason: 1 update made, 1 layer: 1 (BatchNorm2d)
test_it.py::test_writes
  changed without a forward that could be seen: 1 (BatchNorm2d)"""


def section(result):
    """The lines of the section, without its title."""
    lines = result.outlines
    first = next(number for number, line in enumerate(lines) if line.startswith("=") and " running statistics " in line)
    last = next(number for number in range(first + 1, len(lines)) if lines[number].startswith("="))
    return [line for line in lines[first + 1 : last] if line]


def test_report_lists_what_moved_without_a_switch(suite: Suite):
    """No test fails, none warns of its own; each line of code that moved statistics is there, with counts."""
    result = suite.run(SOURCE, "--bn-report", passed=6)
    assert section(result) == LINES.replace("5 tests", "4 tests").splitlines()
    # That of test_writes, which asks for one.
    assert "\n".join(result.outlines).count(": BNGuardWarning: ") == 1


def test_report_of_a_watched_suite(suite: Suite):
    """Updates that were stopped are told apart from those that were made."""
    result = suite.run(SOURCE, "--bn-report", "--bn-frozen=raise", passed=5, failed=1)
    lines = section(result)
    assert lines[:4] == [
        "3 tests moved running statistics: 9 updates.",
        "1 test was stopped before it moved any: 1 update.",
        "test_it.py::test_trains",
        "  test_it.py:20 in train: 1 update stopped, 1 layer: 1 (BatchNorm2d)",
    ]


def test_report_across_processes(suite: Suite):
    """Under pytest-xdist the report is that of all processes."""
    result = suite.run(SOURCE, "--bn-report", "-n2", passed=6)
    lines = section(result)
    assert lines[0] == "4 tests moved running statistics: 12 updates."
    assert sorted(lines) == sorted(LINES.replace("5 tests", "4 tests").splitlines())


def test_report_of_a_suite_that_moves_nothing(suite: Suite):
    """Silence is no report."""
    result = suite.run("def test_it():\n    make().eval()(IMAGES)", "--bn-report", passed=1)
    assert section(result) == ["No test moved running statistics."]


def test_no_report_unless_asked(suite: Suite):
    """Without the switch there is no section."""
    suite.run(SOURCE, passed=6).stdout.no_fnmatch_line("*== running statistics ==*")


def test_properties_reach_junit(suite: Suite):
    """Each line of code is a property of its test case."""
    suite.run(SOURCE, "--bn-report", "--junitxml=out.xml", "-o", "junit_family=xunit1", passed=6)
    tree = ElementTree.parse(suite.pytester.path / "out.xml")
    found = {
        case.get("name"): [p.get("value") for p in case.iter("property") if p.get("name") == "bn_updates"]
        for case in tree.iter("testcase")
    }
    assert found["test_trains"] == ["test_it.py:20 in train: 3 updates made, 1 layer: 1 (BatchNorm2d)"]
    assert found["test_writes"] == ["changed without a forward that could be seen: 1 (BatchNorm2d)"]
    assert found["test_fine"] == []
    assert found["test_restores"] == []


@pytest.mark.parametrize("where", ["train.py:4 in step", None])
def test_moves_are_put_together_by_line(where):
    """Layers of one line are counted together, one layer in two guards once."""
    change = StatsChange(("a",), "BatchNorm2d", ("running_mean",), 2, where, None)
    other = StatsChange(("b",), "BatchNorm2d", ("running_mean",), 1, where, None)
    (move,) = moves_of([change, other, change], None)
    assert move.layers == ["a (BatchNorm2d)", "b (BatchNorm2d)"]
    assert move.updates == 5
    told = "train.py:4 in step: 5 updates made, 2 layers" if where else "changed without a forward that could be seen"
    assert move_text(move) == f"{told}: a (BatchNorm2d), b (BatchNorm2d)"
    assert report_lines({"test": [move]})[0] == "1 test moved running statistics: 5 updates."
