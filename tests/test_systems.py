"""What macOS and Windows lack is missed by nobody: the code of a user runs, in a process that has been rid of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

WITHOUT = """
import os, signal, sys

import torch  # which may use it

for name in ("fork", "register_at_fork", "sched_getaffinity", "set_blocking", "sysconf", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
torch.distributed.is_available = lambda: False
for name in ("DistError", "get_rank", "is_initialized"):
    delattr(torch.distributed, name)

import bnguard

net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
images = torch.ones(4, 2, 3, 3)
"""
PROGRAMS = {
    "raise": """
        try:
            with bnguard.frozen(net):
                net(images)
        except bnguard.StatsChangedError:
            print("as expected")
    """,
    "restore": """
        with bnguard.frozen(net, "restore"):
            net(images)
        assert not net[1].running_mean.any()
        print("as expected")
    """,
    "recompute": """
        with bnguard.recompute_frozen(net):
            net(images)
        assert net[1].num_batches_tracked == 1
        print("as expected")
    """,
    "watch": """
        with bnguard.watch(net) as watch:
            net(images)
        assert [update.names for update in watch.updates] == [("1",)]
        print("as expected")
    """,
    "run": """
        from bnguard.cli import main

        with open("step.py", "w") as file:
            file.write("import torch; torch.nn.BatchNorm1d(2)(torch.randn(3, 2)); print('as expected')")
        main(["run", "step.py"])
    """,
    "diff": """
        from bnguard.cli import main

        torch.save(net.state_dict(), "net.pt")
        main(["diff", "net.pt", "net.pt"])
        print("as expected")
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_runs_without_what_only_linux_has(name: str, tmp_path: Path) -> None:
    """No fork, no signal but SIGINT and SIGTERM, no ``fcntl``, and a torch that was built without ``distributed``."""
    program = WITHOUT + textwrap.dedent(PROGRAMS[name])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "as expected" in done.stdout
