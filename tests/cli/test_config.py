"""The table ``[tool.bnguard]`` of ``pyproject.toml``: where it is found, and what it may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bnguard.cli.config import Config, load_config
from bnguard.cli.exit_codes import UsageError
from bnguard.findings.ignores import parse_ignore


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in a folder inside of which the command runs."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def test_table_is_read(project: Path) -> None:
    """From the folder or from the nearest one above; entries know their file."""
    (project / "pyproject.toml").write_text(
        '[tool.bnguard]\nignore = ["BN003:gan.py"]\nfail-on = ["bn001", "BN002"]\nfrozen = "backbone.*"\n'
    )
    shown = "../pyproject.toml"
    expected = Config(shown, (parse_ignore("BN003:gan.py", shown),), frozenset(["BN001", "BN002"]), "backbone.*")
    assert load_config() == expected
    (project / "inside" / "pyproject.toml").write_text("[tool.ruff]\nignore = 3\n")
    assert load_config() == expected
    (project / "inside" / "pyproject.toml").write_text("tool = 3\n")
    assert load_config() == expected
    (project / "inside" / "pyproject.toml").write_text('[tool.bnguard]\nfail-on = "all"\n')
    assert load_config() == Config("pyproject.toml", fail_on=frozenset(["all"]))
    (project / "inside" / "pyproject.toml").write_text("[tool.bnguard]\n")
    assert load_config() == Config("pyproject.toml")


def test_no_table_is_no_error(project: Path) -> None:
    """Most projects have none."""
    assert load_config() == Config()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("ignores = []", "unknown key 'ignores' in [tool.bnguard]: did you mean 'ignore'? (valid are "),
        ("fail_on = []", "unknown key 'fail_on' in [tool.bnguard]: did you mean 'fail-on'? (valid are "),
        ("ignore = 'BN003'", "ignore in [tool.bnguard]: must be a list of strings, got 'BN003'"),
        ("ignore = [3]", "ignore in [tool.bnguard]: must be a list of strings, got [3]"),
        ("ignore = ['BN03']", "ignore in [tool.bnguard]: unknown code 'BN03': did you mean 'BN003'? (valid are "),
        ("ignore = ['a.py:x']", "ignore in [tool.bnguard]: the line of 'a.py:x' must be a positive integer, got 'x'"),
        ("fail-on = 'BN003'", "fail-on in [tool.bnguard]: must be 'all' or a list of strings, got 'BN003'"),
        ("fail-on = true", "fail-on in [tool.bnguard]: must be 'all' or a list of strings, got True"),
        ("fail-on = ['BN3']", "fail-on in [tool.bnguard]: unknown code 'BN3': did you mean 'BN003'? (valid are "),
        ("frozen = ['a']", "frozen in [tool.bnguard]: must be a pattern on the names of layers, got ['a']"),
        ("frozen = ''", "frozen in [tool.bnguard]: must be a pattern on the names of layers, got ''"),
    ],
)
def test_wrong_table_is_a_usage_error(project: Path, content: str, problem: str) -> None:
    """It names the file and the key."""
    (project / "pyproject.toml").write_text(f"[tool.bnguard]\n{content}\n")
    with pytest.raises(UsageError, match=f"^{re.escape('../pyproject.toml: ' + problem)}"):
        load_config()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[tool]\nbnguard = 3\n", "../pyproject.toml: tool.bnguard must be a table, got 3"),
        (b"[tool.bnguard\n", "../pyproject.toml cannot be read: "),
        (b"\xff", "../pyproject.toml cannot be read: "),
    ],
)
def test_file_that_cannot_be_read_is_a_usage_error(project: Path, content: bytes, problem: str) -> None:
    """It may be the one that says what to ignore."""
    (project / "pyproject.toml").write_bytes(content)
    with pytest.raises(UsageError, match=f"^{re.escape(problem)}"):
        load_config()
