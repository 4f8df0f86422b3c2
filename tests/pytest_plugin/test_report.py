"""``--bn-report``: which tests moved what, in the summary, in JUnit's file, and across processes."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from bnguard.pytest_plugin.report import Move, TestMoves, github_lines, move_text, moves_of, report_lines
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
test_it.py:20 in train moved 4 layers in 2 tests, 11 updates:
  1 (BatchNorm2d), 0.1 (BatchNorm2d), 2 (BatchNorm2d) and 1 more
  test_it.py::test_trains
  test_it.py::test_allowed  (bn_updates: it trains)
test_it.py:31 in test_without_reason moved 1 layer in 1 test, 1 update:
  1 (BatchNorm2d)
  test_it.py::test_without_reason  (bn_updates)
without a forward that could be seen 1 layer in 1 test changed:
  1 (BatchNorm2d)
  test_it.py::test_writes"""


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
    assert lines[:2] == [
        "3 tests moved running statistics: 9 updates.",
        "1 test was stopped before it moved any: 1 update.",
    ]
    at = lines.index("test_it.py:20 in train was stopped: 1 layer in 1 test, 1 update:")
    assert lines[at + 1 : at + 3] == ["  1 (BatchNorm2d)", "  test_it.py::test_trains"]


def test_report_across_processes(suite: Suite):
    """Under pytest-xdist the report is that of all processes, in the order of the files."""
    result = suite.run(SOURCE, "--bn-report", "-n2", passed=6)
    assert section(result) == LINES.replace("5 tests", "4 tests").splitlines()


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
    assert report_lines([TestMoves("test", [move])])[0] == "1 test moved running statistics: 5 updates."


def test_long_report_is_short_and_narrow():
    """Of many tests and lines some are named, and the rest are counted; no line has more than 80 columns."""
    layers = [f"backbone.layer{number}.block.norm (BatchNorm2d)" for number in range(53)]
    tests = [
        TestMoves(
            f"tests/training/test_{number}.py::TestEverything::test_of_a_long_name[with-{'many' * 20}-parameters]",
            [
                Move("train.py:31 in step", layers, 106, False, None),
                Move(f"other.py:{number} in go", layers[:1], 1, False, None),
            ],
        )
        for number in range(125)
    ]
    lines = report_lines(tests)
    assert max(map(len, lines)) <= 80
    assert len(lines) < 120
    assert lines[1] == "train.py:31 in step moved 53 layers in 125 tests, 13250 updates:"
    assert "  and 120 more tests" in lines
    assert lines[-1] == "and 106 more lines"


def test_report_as_a_json_file(suite: Suite):
    """The path is that from where pytest was started; every test and layer is in it."""
    result = suite.run(SOURCE, "--bn-report=moved.json", passed=6)
    assert section(result)[-1] == "as JSON: moved.json"
    document = json.loads((suite.pytester.path / "moved.json").read_text())
    assert document["version"] == 1
    found = {entry["test"]: entry["moves"] for entry in document["tests"]}
    assert list(found) == [f"test_it.py::test_{name}" for name in ("trains", "allowed", "without_reason", "writes")]
    assert found["test_it.py::test_allowed"] == [
        {
            "where": "test_it.py:20 in train",
            "layers": ["0.1 (BatchNorm2d)", "1 (BatchNorm2d)", "2 (BatchNorm2d)", "3 (BatchNorm2d)"],
            "updates": 8,
            "prevented": False,
            "reason": "it trains",
        }
    ]


def test_lines_are_relative_to_the_rootdir_wherever_a_test_goes(suite: Suite):
    """A test that changes the working directory has no absolute path in the report."""
    source = "def test_it(monkeypatch, tmp_path):\n    monkeypatch.chdir(tmp_path)\n    make()(IMAGES)\n"
    lines = section(suite.run(source, "--bn-report", passed=1))
    assert lines[1] == "test_it.py:19 in test_it moved 1 layer in 1 test, 1 update:"


def test_report_as_annotations_of_github(suite: Suite):
    """A warning at the line; a notice where the test may update."""
    lines = suite.run(SOURCE, "--bn-report=github", passed=6).outlines
    assert (
        "::warning file=test_it.py,line=20::test_it.py::test_trains: test_it.py:20 in train: 3 updates made, "
        "1 layer: 1 (BatchNorm2d)"
    ) in lines
    assert [line.split("::")[1] for line in lines if line.startswith("::")] == [
        "warning file=test_it.py,line=20",
        "notice file=test_it.py,line=20",
        "notice file=test_it.py,line=31",
        "warning",
    ]


def test_annotations_keep_to_one_line():
    """What GitHub would take for a part of the command is escaped."""
    move = Move("a,b:c.py:3 in go", ["x (Norm)"], 1, False, None)
    (line,) = github_lines([TestMoves("test[50%\n]", [move])])
    assert (
        line == "::warning file=a%2Cb%3Ac.py,line=3::test[50%25%0A]: a,b:c.py:3 in go: 1 update made, 1 layer: x (Norm)"
    )


def test_path_after_the_switch_is_no_report(suite: Suite):
    """``pytest --bn-report tests`` would write over what it is to test."""
    suite.pytester.makepyfile(test_it="def test_it(): pass")
    result = suite.pytester.runpytest_inprocess("--bn-report", "test_it.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = "give github or the path of a .json file; to test test_it.py, put it before --bn-report"
    result.stderr.fnmatch_lines([f"*--bn-report=test_it.py: {text}"])


@pytest.mark.parametrize(("pattern", "is_allowed"), [("test_*.py", True), ("train/*", False)])
def test_files_may_update_by_the_configuration(pattern: str, is_allowed: bool, suite: Suite):
    """Where no marker says otherwise; the report gives the pattern as the reason."""
    suite.ini("bn_frozen = raise", f"bn_updates = {pattern}")
    source = (
        "def test_it():\n    make()(IMAGES)\n\n@pytest.mark.bn_frozen\ndef test_marked(model):\n    model(IMAGES)\n"
    )
    outcomes = {"passed": 1, "failed": 1} if is_allowed else {"failed": 2}
    result = suite.run(source, "--bn-report", **outcomes)
    said = f"  test_it.py::test_it  (bn_updates: {pattern} in tox.ini)"
    assert (said in section(result)) == is_allowed
