"""Start a script that says when it is ready, and end it by a signal."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ENVIRONMENT", "ended_by", "started"]

LIMIT = 60  # seconds
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
# A shell has what it runs in the background ignore Ctrl-C, and so what that starts, such as a test.
AS_ON_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


def started(folder, *command):
    """A Python command, once it has printed ``ready``."""
    start = [sys.executable, "-c", AS_ON_A_TERMINAL, sys.executable, *command]
    process = subprocess.Popen(
        start, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    for line in process.stdout:
        if line == "ready\n":
            break
    return process


def ended_by(process, signal):
    """How it ends after a signal: the exit code, and the rest of stdout and stderr."""
    process.send_signal(signal)
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, out, err
