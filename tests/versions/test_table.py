"""The table of versions keeps its rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.versions.environment import Environment, Packages, canonical, floors, pinned, runtime_packages
from tests.versions.table import Row, read_junit, read_table, write_table

ROW = Row("2.8.0+cu128", "CUDA, without its libraries", "3.11.7", "pinned", "2026-01-01", 3, [], {"no CUDA device": 2})


def test_rows_are_read_back_in_order(tmp_path: Path) -> None:
    """A table is written in the order of versions, numbers compared as numbers, and read as it was."""
    path = tmp_path / "versions.md"
    rows = [ROW, Row("2.14.1", "CPU", "3.11.7", "newest", "2026-01-01", 2, ["tests.a.test_b"], {})]
    write_table(reversed(rows), path)
    assert read_table(path) == rows
    assert "- failed: `tests.a.test_b`" in path.read_text(encoding="utf-8")


def test_later_row_replaces_the_earlier_one(tmp_path: Path) -> None:
    """There is one row for each torch, Python and choice of packages."""
    path = tmp_path / "versions.md"
    later = Row("2.8.0", "CPU", "3.11.9", "pinned", "2026-02-02", 5, [], {})
    write_table([ROW, later], path)
    assert read_table(path) == [later]


def test_report_of_pytest_is_counted(tmp_path: Path) -> None:
    """Tests that failed or had an error are named, those that were skipped counted by reason."""
    path = tmp_path / "junit.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a" name="test_one"/>
        <testcase classname="tests.a" name="test_two"><failure message="assert"/></testcase>
        <testcase classname="tests.a" name="test_three"><error message="setup"/></testcase>
        <testcase classname="tests.a" name="test_four"><skipped message="no CUDA device"/></testcase>
        </testsuite></testsuites>""",
        encoding="utf-8",
    )
    assert read_junit(path) == (1, ["tests.a.test_two", "tests.a.test_three"], {"no CUDA device": 1})


def test_libraries_that_run_without_a_gpu_are_those_of_torch() -> None:
    """They have the versions that torch's metadata asks for, in its old and its new form."""
    old = "Requires-Dist: nvidia-cuda-runtime-cu12 (==12.1.105) ; platform_system == 'Linux'"
    new = "Requires-Dist: cuda-toolkit[cublas,cudart]==13.2.2; platform_system == 'Linux'"
    assert list(runtime_packages(old)) == ["nvidia-cuda-runtime-cu12==12.1.105"]
    assert list(runtime_packages(new)) == ["nvidia-cuda-runtime==13.2.*", "nvidia-cuda-cupti==13.2.*"]
    assert list(runtime_packages("Requires-Dist: sympy>=1.13.3\n")) == []


def test_floors_and_pins_name_every_package_that_runs_tests() -> None:
    """Both have wrapt and pytest; torch, which is chosen, is in neither."""
    for names in ({line.split("==")[0] for line in lines} for lines in (floors(), pinned())):
        assert {"wrapt", "pytest", "hypothesis", "transformers"} <= names
        assert "torch" not in names


@pytest.mark.parametrize("packages", ["pinned", "floor", "newest"])
def test_environment_that_lacks_a_package_is_seen(monkeypatch: pytest.MonkeyPatch, packages: Packages) -> None:
    """Else each test of an integration would be skipped or fail, and the row would say so."""
    there = [canonical(re.split("[<=]", line)[0]) for line in (pinned() if packages == "pinned" else floors())]
    environment = Environment(Path("there"))
    monkeypatch.setattr(environment, "output", lambda _: " ".join(name.replace("-", "_").title() for name in there))
    assert environment.missing(packages) == []
    there.remove("skorch")
    assert environment.missing(packages) == ["skorch"]
