"""Report before SIGTERM ends this process. Launchers and schedulers send it: ``torchrun``, Slurm, containers.

Note [SIGTERM]

By default SIGTERM ends Python at once, and a script sees no exception. That stays as it is, and a handler that the
script installs replaces ours.

1. The main thread reports, between two of its instructions. If it waits in C for a device or for another rank, no
   handler of Python's runs. Python writes the number of each signal into the wakeup descriptor even then, so a thread
   reads from there, and reports if the main thread does not begin to.
2. A forked child must not have the handler, which would write into the pipe of its parent. The signal is blocked
   around each fork, and the child installs the default handler before it unblocks the signal.
3. Only the main thread may call ``signal.signal()``. To end the process by the signal from any thread,
   ``PyOS_setsig()`` installs the default handler.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Final, Self

EXIT_CODE: Final = 128 + signal.SIGTERM  # what a shell reports
_PATIENCE: Final = 20.0  # seconds; most launchers send SIGKILL after 30
_IN_C: Final = 1.0  # seconds after which the main thread is taken to wait in C
_LOWEST: Final = 200  # of our descriptors: scripts close, or expect to get, the numbers after those that they know
_CLOSED: Final = -1


class BeforeTermination:
    """Calls a function before SIGTERM ends the process, while SIGTERM has its default handler.

    The process ends after 20 seconds in any case. Does nothing outside the main thread, on systems without this signal,
    and if a library uses the wakeup descriptor already. If a library begins to use that later, as ``asyncio`` does in
    ``add_signal_handler()``, the signal waits until the main thread returns from C.

    Args:
        report: The function.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._reader = self._writer = _CLOSED
        self._is_left_to_caller = False
        self._turn = threading.Lock()
        self._begun = threading.Event()
        self._done = threading.Event()
        self._masks = threading.local()

    def leave_to_caller(self) -> None:
        """Lets the caller report from now on; after a signal, the process ends when the block does."""
        self._is_left_to_caller = True

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if not hasattr(os, "register_at_fork") or not is_main or _is_taken():  # not on every system
            return self
        self._reader, self._writer = _high_pipe()
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._handle)
        threading.Thread(target=self._wait, name="bnguard", daemon=True).start()
        # Rule 2 of Note [SIGTERM]
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._leave_child)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer != _CLOSED:
            self._done.set()
            if self._begun.is_set():
                _die()
            self._uninstall()
            writer, self._writer = self._writer, _CLOSED
            _close(writer)  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread. A handler of the script's may call it: then the script decides."""
        if self._is_installed() and not self._begun.is_set():
            self._begun.set()
            if not self._is_left_to_caller:
                self._report_once()
                _die()

    def _wait(self) -> None:
        """Runs in the thread. Rule 1 of Note [SIGTERM]."""
        with suppress(OSError):  # the script may have closed the descriptor
            while number := os.read(self._reader, 1):
                if number[0] == signal.SIGTERM and self._is_installed():
                    if not self._begun.wait(_IN_C) and not self._is_left_to_caller:
                        threading.Thread(target=self._report_once, name="bnguard", daemon=True).start()
                    self._done.wait(_PATIENCE)
                    _die()
        _close(self._reader)

    def _report_once(self) -> None:
        with self._turn:
            if not self._done.is_set():
                try:
                    self._report()
                finally:
                    self._done.set()

    def _is_installed(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._handle

    def _uninstall(self) -> None:
        """Leaves a handler and a wakeup descriptor that the script has installed."""
        if self._is_installed():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        current = signal.set_wakeup_fd(_CLOSED)
        if current != self._writer:
            with suppress(OSError):  # the script may have closed its descriptor
                signal.set_wakeup_fd(current)

    def _block(self) -> None:
        if self._writer != _CLOSED:
            self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def _unblock(self) -> None:
        mask = self._masks.__dict__.pop("before", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _leave_child(self) -> None:
        if self._writer != _CLOSED:
            self._uninstall()
            _close(self._reader, self._writer)
            self._writer = _CLOSED
        self._unblock()


def _is_taken() -> bool:
    """Whether SIGTERM has a handler, or a library uses the wakeup descriptor."""
    descriptor = signal.set_wakeup_fd(_CLOSED)
    if descriptor != _CLOSED:
        signal.set_wakeup_fd(descriptor)
    return descriptor != _CLOSED or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def _high_pipe() -> tuple[int, int]:
    import fcntl  # not on every system

    reader, writer = low = os.pipe()
    with suppress(OSError):  # the limit of the process is lower
        reader, writer = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST) for descriptor in low]
        _close(*low)
    os.set_blocking(writer, False)  # which set_wakeup_fd() demands
    return reader, writer


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        with suppress(OSError):  # the script may have closed it
            os.close(descriptor)


def _die() -> None:
    """Ends the process by the signal. Rule 3 of Note [SIGTERM]."""
    ctypes.pythonapi.PyOS_setsig(int(signal.SIGTERM), None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
