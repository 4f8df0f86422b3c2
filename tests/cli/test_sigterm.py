"""SIGTERM, as launchers and schedulers send it: it ends a script as without us, and the report is there."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from tests import forks
from tests.scripts import ended_by, started

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs signals"),
    pytest.mark.usefixtures("interpreter"),
]

SCRIPT = """\
import ctypes, multiprocessing, os, signal, sys, threading, time
import torch
from torch import nn

net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def train():
    for _ in range(3):
        net(torch.randn(8, 3, 8, 8)).sum().backward()


{first}
train()
print("ready", flush=True)
try:
    {then}
except BaseException as error:
    print("except", repr(error), flush=True)
    raise
finally:
    print("finally", flush=True)
"""
IN_PYTHON = "time.sleep(60)"
# Waits for itself, as for a device that does not answer: no handler of Python's can run meanwhile.
IN_C = "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
SAID = "SIGTERM has ended the run; this is what was recorded until then."


def trained(folder, *options, first="", then=IN_PYTHON, is_plain=False):
    """The script, once it has trained."""
    (folder / "train.py").write_text(SCRIPT.replace("{first}", first).replace("{then}", then))
    process = started(folder, *([] if is_plain else ["-m", "bnguard", "run", *options]), "train.py")
    time.sleep(0.3)
    return process


def terminated(process):
    """How it ends: the exit code, stdout, stderr."""
    return ended_by(process, signal.SIGTERM)


@pytest.mark.parametrize("then", [IN_PYTHON, IN_C])
def test_report_then_death_of_the_signal(tmp_path, then):
    """No part of the script runs any more, as in plain Python; files are written too."""
    assert terminated(trained(tmp_path, then=then, is_plain=True)) == (-signal.SIGTERM, "", "")
    code, out, err = terminated(trained(tmp_path, "--json", "report.json", then=then))
    assert (code, err) == (-signal.SIGTERM, "")
    assert "no finding; 3 updates of 1 layer" in out
    assert SAID in out
    assert "except" not in out
    assert "finally" not in out
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["exit_code"] == 128 + signal.SIGTERM
    assert content["updates"][0]["count"] == 3


SETTING = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))"
# As Lightning: with whatever was there before.
COMPOSING = """\
old = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *call: (callable(old) and old(*call), sys.exit(5)))
"""


@pytest.mark.parametrize("first", [SETTING, COMPOSING])
def test_handler_of_the_script_decides(tmp_path, first):
    """It ends as its handler says, and the report is the usual one."""
    code, out, _ = terminated(trained(tmp_path, first=first))
    assert code == 5
    assert out.startswith("except SystemExit(5)\nfinally\n")
    assert "no finding; 3 updates of 1 layer" in out
    assert SAID not in out


def test_ignored_signal_stays_ignored(tmp_path):
    """SIG_IGN."""
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code, out, err = terminated(trained(tmp_path, first=ignoring, then="time.sleep(2)"))
    assert (code, err) == (0, "")
    assert out.startswith("finally\n")


FORKED = """\
def child(is_main):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=time.sleep, args=(60,))
    process.start()
    time.sleep({pause})
    process.terminate()
    process.join(20)
    print("child", process.exitcode, signal.getsignal(signal.SIGTERM) == here, flush=True)

here = signal.getsignal(signal.SIGTERM)
child(True)
thread = threading.Thread(target=child, args=(False,))
thread.start()
thread.join()
"""


def ended(folder, first):
    """The script with something before its training, and nothing after it."""
    (folder / "train.py").write_text(SCRIPT.replace("{first}", first).replace("{then}", "pass"))
    return forks.run("-m", "bnguard", "run", "train.py", cwd=folder, timeout=60)


@pytest.mark.parametrize("pause", [0, 0.2])
def test_forked_children_die_by_themselves(tmp_path, pause):
    """Workers that are terminated end as of plain Python; the run goes on, whichever thread has forked them."""
    done = ended(tmp_path, FORKED.replace("{pause}", str(pause)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("child -15 True") == 2
    assert done.stdout.count("no finding; 3 updates of 1 layer") == 1
    assert SAID not in done.stdout


def test_report_also_after_a_fork(tmp_path):
    """The handler, which no child may have, is there again."""
    first = "child = multiprocessing.get_context('fork').Process(target=int)\nchild.start()\nchild.join()"
    code, out, err = terminated(trained(tmp_path, first=first))
    assert (code, err) == (-signal.SIGTERM, "")
    assert "no finding; 3 updates of 1 layer" in out
    assert SAID in out


def test_signal_after_the_script_waits_for_the_report(tmp_path):
    """It does not cut the report short."""
    first = (
        "import bnguard.cli.watched_run as run\n"
        "publish = run.publish\n"
        "run.publish = lambda *call: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(1), publish(*call))[2]"
    )
    done = ended(tmp_path, first)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert done.stdout.count("no finding; 3 updates of 1 layer") == 1
    assert SAID not in done.stdout


CLOSING = """\
os.closerange(3, 64)
files = [open(f"f{number}", "wb", buffering=0) for number in range(8)]
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_script_that_closes_descriptors_keeps_its_files(tmp_path):
    """As daemons do: nothing is written into files that have the next numbers."""
    done = ended(tmp_path, CLOSING)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.read_bytes() for path in tmp_path.glob("f?")} == {b""}


def test_signal_while_a_lock_is_held(tmp_path):
    """The report needs what the main thread was in the middle of."""
    first = """\
import bnguard.recording.recorder as recorder
measure = recorder.Recorder._measure
def slow(*call):
    print("ready", flush=True)
    time.sleep(5)
    return measure(*call)
recorder.Recorder._measure = slow
optimizer = torch.optim.SGD(net.parameters(), 0.1)
"""
    then = "net(torch.randn(8, 3, 8, 8)).sum().backward(); optimizer.step()"
    process = trained(tmp_path, "--every", "1", first=first, then=f"time.sleep(0.3); {then}")
    time.sleep(1.5)  # in the middle of a measurement
    code, out, err = terminated(process)
    assert code == -signal.SIGTERM, err
    assert SAID in out


def test_nothing_is_left_behind(tmp_path, capsys, monkeypatch):
    """Of a run in this process: handler, listener, thread."""
    from bnguard.cli import main

    monkeypatch.setattr(sys, "argv", ["bnguard"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "empty.py").write_text("import signal; print(signal.getsignal(signal.SIGTERM))")
    main_module = sys.modules["__main__"]
    handler, listening = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.set_wakeup_fd(-1)
    try:
        assert main(["run", str(tmp_path / "empty.py")]) == 0
        assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == (signal.SIG_DFL, -1)
    finally:
        sys.modules["__main__"] = main_module
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(listening)
    assert "BeforeTermination" in capsys.readouterr().out
    for _ in range(100):
        if "bnguard" not in [thread.name for thread in threading.enumerate()]:
            break
        time.sleep(0.05)
    assert "bnguard" not in [thread.name for thread in threading.enumerate()]
