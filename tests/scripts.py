"""Start a script that says when it is ready, and end it by a signal."""

from tests import forks

__all__ = ["ended_by", "started"]

LIMIT = 60  # seconds


def started(folder, *command):
    """A Python command, once it has printed ``ready``."""
    program = forks.start(*command, cwd=folder)
    program.wait_for_line("ready")
    return program


def ended_by(program, signal):
    """How it ends after a signal: the exit code, and the rest of stdout and stderr."""
    done = program.end(signal, timeout=LIMIT)
    return done.returncode, done.stdout, done.stderr
