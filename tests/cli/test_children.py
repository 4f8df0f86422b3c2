"""Processes that a script starts: what they update unseen is said, and is no green gate."""

from __future__ import annotations

import json
import multiprocessing.spawn
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bnguard.cli import main
from tests import forks

pytestmark = pytest.mark.usefixtures("interpreter")

PREAMBLE = """\
import subprocess
import sys
import torch
from torch import nn

net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def train():
    for _ in range(2):
        net(torch.randn(8, 4)).square().mean().backward()


def evaluate():
    net.eval()
    net(torch.randn(8, 4))


class Rows(torch.utils.data.Dataset):
    def __init__(self, work):
        self.work = work

    def __len__(self):
        return 4

    def __getitem__(self, number):
        if self.work is not None:
            self.work()
        return torch.zeros(4)


def load(work):
    for rows in torch.utils.data.DataLoader(Rows(work), 2, num_workers=2, multiprocessing_context="fork"):
        pass


def start(work, method):
    process = torch.multiprocessing.get_context(method).Process(target=work)
    process.start()
    process.join()


if __name__ == "__main__":
    """


def run(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A script under ``bnguard run``, as in CI."""
    (folder / "train.py").write_text(PREAMBLE + code + "\n")
    return forks.run("-m", "bnguard", "run", *options, "train.py", cwd=folder)


WATCHED_ELSEWHERE = {
    "spawn": (
        "start(train, 'spawn')",
        "1 child process updated running statistics, first at train.py:11 in train, and was",
    ),
    "fork": (
        "start(train, 'fork')",
        "1 child process updated running statistics, first at train.py:11 in train, and was",
    ),
    "workers": ("load(train)", "2 child processes updated running statistics, first at train.py:11 in train, and were"),
    "launcher": (
        "subprocess.run([sys.executable, '-c', ''])",
        "No model ran in this process. 1 Python process started by it was not watched: have them run 'bnguard run ",
    ),
}


@pytest.mark.parametrize(("code", "text"), WATCHED_ELSEWHERE.values(), ids=WATCHED_ELSEWHERE)
def test_updates_in_other_processes_are_said(tmp_path: Path, code: str, text: str) -> None:
    """The report says so; with --fail-on the exit code is not that of a clean run."""
    done = run(tmp_path, code, "--fail-on", "all")
    assert text in done.stdout, done.stderr
    assert f"bnguard run: {text}" in done.stderr
    assert done.returncode == 2


def test_without_a_gate_the_exit_code_is_the_scripts(tmp_path: Path) -> None:
    """What is said on stdout is enough."""
    done = run(tmp_path, "start(train, 'fork')")
    assert "1 child process updated" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


UNREMARKABLE = {
    "workers": "load(None)",
    "workers that evaluate": "load(evaluate)",
    "child that evaluates": "start(evaluate, 'fork')",
    "new child that evaluates": "start(evaluate, 'spawn')",
    "another program": "subprocess.run(['true'])",
    "another Python": "subprocess.run([sys.executable, '-c', ''])",
}


@pytest.mark.parametrize("code", UNREMARKABLE.values(), ids=UNREMARKABLE)
def test_processes_that_update_nothing_are_not_mentioned(tmp_path: Path, code: str) -> None:
    """Every script has worker processes; a run is as quiet as without them, and its gate is open."""
    done = run(tmp_path, f"evaluate(); {code}", "--fail-on", "all", "--json", "run.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2:] == ["no finding; no update", "", f"Written: {tmp_path / 'run.json'}"]
    assert json.loads((tmp_path / "run.json").read_text())["updates"] == []


def test_a_finding_counts_before_what_was_not_watched(tmp_path: Path) -> None:
    """Its exit code is 1."""
    done = run(tmp_path, "start(train, 'fork'); torch.no_grad()(train)()", "--fail-on", "all")
    assert (done.returncode, "1 child process updated" in done.stdout) == (1, True)


def test_nothing_of_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No patch, no file; a call without arguments fails as ever."""
    monkeypatch.setattr(sys, "argv", ["bnguard"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess\ntry:\n    subprocess.Popen()\nexcept TypeError as error:\n    assert 'args' in str(error)\n"
    )
    before = subprocess.Popen.__init__, multiprocessing.spawn.get_preparation_data
    assert main(["run", str(script)]) == 0
    assert (subprocess.Popen.__init__, multiprocessing.spawn.get_preparation_data) == before
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
