"""A block that is open when the program ends is closed while Python shuts down, when torch can compare nothing more."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from torch import nn
import bnguard

def evaluate(net, policy, writes):
    with bnguard.frozen(net, policy, use_running_stats=policy == "restore"):
        if writes:
            net[0].running_mean.data.add_(1)
        yield net(torch.ones(2, 3))

@bnguard.strict
def strictly(net):
    yield net(torch.ones(2, 3))

kept = []
for policy in ("raise", "warn", "restore", "rollback"):
    for writes in (False, True):
        net = nn.Sequential(nn.BatchNorm1d(3)).eval()
        for _ in range(3):  # the long way, and the short one
            kept.append(evaluate(net, policy, writes))
            next(kept[-1])
kept.append(strictly(net))
next(kept[-1])
started = bnguard.frozen(net, check="deferred").start()
print("the end")
"""


def test_program_with_open_blocks_ends_as_it_does_without_them() -> None:
    """Whatever was written inside of them, with the exit code 0 and nothing on stderr."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")
