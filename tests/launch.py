"""Start the ranks of a distributed run, with a hard limit, and gather what they report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

__all__ = ["LIMIT", "ROOT", "TORCHRUN", "check", "job", "once", "start"]

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds for a whole job
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(command, folder=ROOT, **environment):
    """Runs a Python command; after the limit, ends it and all that it has started."""
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # a rank whose launcher is gone waits for the others
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def job(folder, *command, backend="gloo"):
    """Runs ranks that write what they report into a folder."""
    check(folder, start(command, BACKEND=backend))


def check(folder, done):
    """That the processes of such a job have succeeded."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert done.returncode == 0, [result.get("failed") for result in results] or done.stderr


def once(tmp_path_factory, name, run):
    """Runs a job for all processes of the test run; what each rank reports."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock", timeout=2 * LIMIT):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            run(folder)
            (folder / "done").touch()
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
