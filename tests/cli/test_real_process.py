"""A few commands in an interpreter of their own; most tests of the command line have one among the slow tests only."""

import signal

import pytest

from tests import forks
from tests.scripts import ended_by, started

SCRIPT = """\
import time
import torch
from torch import nn

net = nn.Sequential(nn.BatchNorm1d(2))
net(torch.ones(4, 2))
print("ready", flush=True)
{then}
"""


@pytest.fixture(autouse=True)
def script(tmp_path):
    """Writes the script, with something to do at its end, and has real processes started."""

    def write(then):
        (tmp_path / "train.py").write_text(SCRIPT.replace("{then}", then))

    with forks.real_processes():
        yield write


def test_report_and_exit_code(script, tmp_path):
    """The script's own output and exit code, and the report."""
    script("raise SystemExit(3)")
    done = forks.run("-m", "bnguard", "run", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("ready\n")
    assert "no finding; 1 update of 1 layer" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_report_after_a_signal(script, tmp_path):
    """SIGTERM ends the process, and the report is there."""
    script("time.sleep(60)")
    code, out, _ = ended_by(started(tmp_path, "-m", "bnguard", "run", "train.py"), signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert "no finding; 1 update of 1 layer" in out


def test_fork_and_real_process_are_alike(script, tmp_path):
    """A failing program: output, traceback and exit code of the forked process are those of the interpreter."""
    script("def fail():\n    raise ValueError('no')\n\nfail()")
    real = forks.run("train.py", cwd=tmp_path)
    with forks.real_processes(False):
        forked = forks.run("train.py", cwd=tmp_path)
    assert real.returncode == 1
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)
