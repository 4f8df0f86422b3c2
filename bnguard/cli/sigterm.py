"""Do something before SIGTERM ends this process, as launchers and schedulers end it: ``torchrun``, Slurm, a container.

By default that signal ends Python at once, whatever it does. So it stays: the script gets no exception, and where it
has a handler of its own, or composes one with what it finds, that alone decides.
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

__all__ = ["EXIT_CODE", "BeforeTermination"]

EXIT_CODE: Final = 128 + signal.SIGTERM  # as a shell tells it
_PATIENCE: Final = 20.0  # seconds; launchers send SIGKILL after 30, as a rule
_IN_C: Final = 1.0  # seconds after which the main thread is not in Python
_RESERVED: Final = 32  # of the numbers of descriptors, the last
_NONE: Final = -1
_DEFAULT: Final = None  # of C, a null pointer
# What signal.signal() does, without the table that Python looks its handlers up in.
_set_handler: Final = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(
    ("PyOS_setsig", ctypes.pythonapi)
)


class BeforeTermination:
    """Has SIGTERM do something before it ends the process, as long as its handler is the default one.

    The main thread does it, between two of its instructions; or another thread, while that one waits for a device or
    for another rank, where no handler of Python's can run. After 20 seconds the process ends in any case. Does nothing
    in other threads than the main one, on systems without that signal, and where a library listens to signals already.
    Children that are forked have the default handler. Where a library has listened to signals in the meantime, as
    ``asyncio`` does for ``add_signal_handler()``, a main thread that waits in C is not noticed any more.

    Args:
        last: What to do.
    """

    def __init__(self, last: Callable[[], None]) -> None:
        self._last = last
        self._reader = self._writer = _NONE
        self._process = 0
        self._forking = threading.RLock()
        self._forks = 0  # that are under way
        self._set_aside_handler: int | None = None
        self._has_come = False
        self._caller_does_it = False
        self._turn = threading.Lock()
        self._begins = threading.Event()
        self._is_done = threading.Event()

    def leave_to_caller(self) -> None:
        """From now on the caller does it, and the signal ends the process when this is left."""
        self._caller_does_it = True

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if os.name != "posix" or not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return self
        listening = signal.set_wakeup_fd(_NONE)
        if listening != _NONE:
            signal.set_wakeup_fd(listening)
            return self
        self._process = os.getpid()
        self._reader, self._writer = map(_out_of_the_way, os.pipe())
        self._pipe = os.fstat(self._writer).st_ino
        os.set_blocking(self._writer, False)  # as set_wakeup_fd() demands
        threading.Thread(target=self._wait, name="bnguard", daemon=True).start()
        os.register_at_fork(
            before=self._set_aside, after_in_parent=self._take_up_again, after_in_child=self._leave_child
        )
        self._install()
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader == _NONE or os.getpid() != self._process:
            return
        self._is_done.set()
        while self._has_come:  # the thread ends the process
            time.sleep(1)
        self._uninstall()
        writer, self._writer = self._writer, _NONE
        if self._has_pipe(writer):
            os.write(writer, b"\0")
            os.close(writer)

    def _install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _uninstall(self) -> None:
        """Leaves what the script has put there since."""
        if self._is_ours():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        listening = signal.set_wakeup_fd(_NONE)
        if listening != self._writer:
            with suppress(OSError):  # it has been closed
                signal.set_wakeup_fd(listening)

    def _has_pipe(self, number: int) -> bool:
        """Whether a descriptor is still that of the pipe: the script may have closed all that it does not know."""
        try:
            return os.fstat(number).st_ino == self._pipe
        except OSError:
            return False

    def _is_ours(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._handle

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as that is back in Python."""
        # Once more; or called by the handler of somebody who has found this one.
        if self._begins.is_set() or not self._is_ours():
            return
        self._has_come = True
        self._begins.set()
        if not self._caller_does_it:
            self._do()
            _die()
        elif signal.set_wakeup_fd(_NONE) != self._writer or not self._has_pipe(self._writer):
            threading.Thread(target=self._end, name="bnguard", daemon=True).start()  # nobody else has heard of it

    def _wait(self) -> None:
        """In the thread: for the signal, or the end."""
        try:
            while number := os.read(self._reader, 1):
                if number == b"\0":
                    break
                if number[0] == signal.SIGTERM and self._is_ours():
                    self._has_come = True
                    self._end()
        except OSError:  # the script has closed it
            return
        if self._has_pipe(self._reader):
            os.close(self._reader)

    def _end(self) -> None:
        """In a thread: sees to it that the process ends."""
        if not self._caller_does_it and not self._begins.wait(_IN_C):
            threading.Thread(target=self._do, name="bnguard", daemon=True).start()
        self._is_done.wait(_PATIENCE)
        _die()

    def _do(self) -> None:
        """Once, in whichever thread is first; the other one waits."""
        with self._turn:
            if not self._is_done.is_set():
                try:
                    self._last()
                finally:
                    self._is_done.set()

    # A child that is forked must not have the handler for a moment: it would write into the pipe of its parent. Any
    # thread may fork, and only the main one may call signal.signal().

    def _set_aside(self) -> None:
        with self._forking:
            if self._forks == 0 and self._writer != _NONE and self._is_ours():
                self._set_aside_handler = _set_handler(signal.SIGTERM, _DEFAULT)
            self._forks += 1

    def _take_up_again(self) -> None:
        with self._forking:
            self._forks -= 1
            if self._forks == 0 and self._set_aside_handler is not None:
                handler, self._set_aside_handler = self._set_aside_handler, None
                if self._writer != _NONE and self._is_ours():
                    _set_handler(signal.SIGTERM, handler)

    def _leave_child(self) -> None:
        self._forking._at_fork_reinit()  # type: ignore[attr-defined]
        self._forks, self._set_aside_handler = 0, None
        if self._writer != _NONE:
            self._uninstall()
            for number in (self._reader, self._writer):
                if self._has_pipe(number):
                    os.close(number)
            self._writer = _NONE


def _out_of_the_way(number: int) -> int:
    """The descriptor, with a number that a script will not count on: some close all that follow those they know."""
    import fcntl  # neither is on every system
    import resource

    limit = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, limit - _RESERVED)
    except OSError:
        return number
    os.close(number)
    return moved


def _die() -> None:
    """Of the signal, by the default handler."""
    _set_handler(signal.SIGTERM, _DEFAULT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
