"""Run Python programs in processes forked from one that has imported torch and bnguard: 0.06 s each instead of 4 s.

``run()`` and ``start()`` take what would follow ``python`` on a command line. Output, exit codes, signals and the end
of the interpreter are real. A program finds torch, ``torch._dynamo`` and bnguard imported already, so what a test
asserts about imports needs a process of its own. Inside ``real_processes()`` every program has one.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import ModuleType

__all__ = ["ROOT", "Program", "real_processes", "run", "start"]

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch", "torch._dynamo", "bnguard.cli.watched_run", "bnguard.integrations", "matplotlib.figure")
LIMIT = 120  # seconds for one program


class Program:
    """A program that runs; its output goes to files, so that it never waits for a reader."""

    def __init__(self, args: tuple[str, ...], cwd: Path, environment: dict[str, str], terminal: str | None) -> None:
        self.args = args
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        self._out.touch()
        self._err.touch()
        self._read = 0
        self._process: subprocess.Popen[bytes] | None = None
        if _REAL or not hasattr(os, "fork"):
            with open(terminal or self._out, "wb") as out, self._err.open("wb") as err:
                command = [sys.executable, "-c", _AS_ON_A_TERMINAL, sys.executable, *args]
                self._process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err)
            self.pid = self._process.pid
        else:
            self._server = _server()
            self.pid = self._server.fork(
                _Request(args, str(cwd), environment, terminal or str(self._out), str(self._err))
            )

    def wait_for_line(self, line: str) -> None:
        """Waits until the program has printed a line, or has ended without it; ``end()`` returns what follows it."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            has_ended = self._has_ended(0.01)
            text = self._out.read_bytes()
            position = text.find(f"{line}\n".encode())
            if position >= 0:
                self._read = position + len(line) + 1
            if has_ended or position >= 0:
                return
        raise TimeoutError(f"{self.args} did not print {line!r} in {LIMIT} seconds")

    def end(self, number: int | None = None, timeout: float = LIMIT) -> subprocess.CompletedProcess[str]:
        """Waits for the end of the program, after a signal where there is a number.

        Raises:
            TimeoutError: The program has not ended in time, and was killed.
        """
        if number is not None:
            os.kill(self.pid, number)
        if not self._has_ended(timeout):
            os.kill(self.pid, signal.SIGKILL)
            self._has_ended(LIMIT)
            raise TimeoutError(f"{self.args} did not end in {timeout} seconds: {self._err.read_text()}")
        code = self._process.returncode if self._process is not None else self._server.exit_code
        out, err = self._out.read_bytes()[self._read :].decode(), self._err.read_text()
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.args, code, out, err)

    def _has_ended(self, timeout: float) -> bool:
        if self._process is None:
            return self._server.has_ended(timeout)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def start(
    *args: object, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, terminal: str | None = None
) -> Program:
    """Starts ``python args...`` in a folder, with this checkout on its path; one program at a time.

    Where ``terminal`` names a device, stdout goes there, and not into the result of ``end()``.
    """
    variables = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
    return Program(tuple(map(str, args)), cwd, variables, terminal)


def run(
    *args: object, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, timeout: float = LIMIT
) -> subprocess.CompletedProcess[str]:
    """Runs ``python args...`` to its end, as ``subprocess.run(capture_output=True, text=True)``."""
    return start(*args, cwd=cwd, environment=environment).end(timeout=timeout)


_REAL = False
# Programs in the background of a shell ignore Ctrl-C, and so does what they start.
_AS_ON_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@contextmanager
def real_processes(wanted: bool = True) -> Iterator[None]:
    """Gives every program an interpreter of its own inside the block, or a forked one where that is not wanted."""
    global _REAL
    before, _REAL = _REAL, wanted
    try:
        yield
    finally:
        _REAL = before


@dataclass(frozen=True, slots=True)
class _Request:
    """What a program is started with."""

    args: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    out: str
    err: str


class _Server:
    """The process that forks, as its client sees it."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the server
        self._connection, other = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(other.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ""},
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        other.close()
        atexit.register(self.close)

    def fork(self, request: _Request) -> int:
        """Starts a program; returns its process's number."""
        self._connection.send(request)
        try:
            pid = self._connection.recv()
        except EOFError:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode()) from None
        self.exit_code = None
        return int(pid)

    def has_ended(self, timeout: float) -> bool:
        """Whether the program ends within some seconds."""
        if self.exit_code is None and self._connection.poll(timeout):
            self.exit_code = self._connection.recv()
        return self.exit_code is not None

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.wait()
        self._log.close()


_servers: dict[int, _Server] = {}


def _server() -> _Server:
    """The server of this process; a forked child of it starts its own."""
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _Server()
    return _servers[os.getpid()]


def _serve(connection: Connection) -> _Request:
    """Forks a child for each request, and reports how it ended; returns in the children only."""
    while True:
        try:
            request: _Request = connection.recv()
        except EOFError:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            connection.close()
            return request
        connection.send(pid)
        _, status = os.waitpid(pid, 0)
        connection.send(os.waitstatus_to_exitcode(status))


def _become(request: _Request) -> None:
    """Gives this process the environment, the folder and the output of the request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.cwd)
    for number, path in ((1, request.out), (2, request.err)):
        file = os.open(path, os.O_WRONLY | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)


def _execute(args: tuple[str, ...]) -> None:
    """Runs ``-m module``, ``-c code`` or a file as ``__main__``, as the interpreter does."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__, __cached__=None)
    target, *rest = args
    if target == "-m":
        _set_path(os.getcwd(), "-m", *rest[1:])
        runpy._run_module_as_main(rest[0])
        return
    if target == "-c":
        _set_path("", "-c", *rest[1:])
        code = compile(rest[0], "<string>", "exec", dont_inherit=True)
    else:
        _set_path(os.path.dirname(os.path.realpath(target)), *args)
        main.__file__ = os.path.abspath(target)
        main.__loader__ = SourceFileLoader("__main__", main.__file__)
        code = compile(Path(target).read_bytes(), main.__file__, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _set_path(first: str, *argv: str) -> None:
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = [first, *more]
    sys.argv = list(argv)


class _Exit:
    """Ends a process after its threads and exit handlers, before the teardown of modules: that takes 0.6 s."""

    def __init__(self) -> None:
        self.code: int | None = None  # None: the interpreter ends as it likes
        atexit.register(self._leave)  # the first registered is called last

    def _leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        # joblib's finalizers give semaphores back, and a warning says so where they do not run.
        if self.code is not None and "joblib" not in sys.modules:
            os._exit(self.code & 0xFF)


def _run_as_python(args: tuple[str, ...], leave: _Exit) -> None:
    """Runs the program, and prints an exception that ends it without the frames of this file."""
    try:
        _execute(args)
        leave.code = 0
    except SystemExit as end:
        leave.code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException as error:
        leave.code = 1 if isinstance(error, Exception) else None
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.excepthook = lambda *_: None  # printed already; the interpreter still ends as after this exception
        raise


if __name__ == "__main__":
    leave = _Exit()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    request = _serve(Connection(int(sys.argv[1])))
    _become(request)
    _run_as_python(request.args, leave)
