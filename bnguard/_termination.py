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
from types import FrameType
from typing import Final, Self

__all__ = ["EXIT_CODE", "BeforeTermination"]

EXIT_CODE: Final = 128 + signal.SIGTERM  # as a shell tells it
_PATIENCE: Final = 20.0  # seconds; launchers send SIGKILL after 30, as a rule
_NONE: Final = -1
_DEFAULT: Final = None  # of C, a null pointer
# What signal.signal() does, without the table that Python looks its handlers up in.
_set_handler: Final = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(
    ("PyOS_setsig", ctypes.pythonapi)
)


class BeforeTermination:
    """Has SIGTERM do something before it ends the process, as long as its handler is the default one.

    It is done in a thread, since the main thread may wait for a device or for another rank, where no handler of
    Python's can run; the main thread rests meanwhile. After 20 seconds the process ends in any case. Does nothing in
    other threads than the main one, on systems without that signal, and where a library listens to signals already.
    Children that are forked have the default handler.

    Args:
        last: What to do.
    """

    def __init__(self, last: Callable[[], None]) -> None:
        self._last = last
        self._reader = self._writer = _NONE
        self._process = 0
        self._forking = threading.Lock()
        self._forks = 0  # that are under way
        self._set_aside_handler: int | None = None
        self._has_come = False
        self._caller_does_it = False
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
        self._reader, self._writer = os.pipe()
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
            signal.set_wakeup_fd(listening)

    def _is_ours(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._handle

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as that is back in Python."""
        if not self._is_ours():  # called by the handler of somebody who found this one
            return
        with_others = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False) != self._writer
        if with_others:  # who would have been woken in the place of the thread
            os.write(self._writer, bytes([number]))
        self._has_come = True
        while not self._caller_does_it:
            time.sleep(1)

    def _wait(self) -> None:
        """In the thread: for the signal, or the end."""
        while number := os.read(self._reader, 1)[0]:
            if number == signal.SIGTERM and self._is_ours():
                self._has_come = True
                self._end()
        os.close(self._reader)

    def _end(self) -> None:
        if self._caller_does_it:
            self._is_done.wait(_PATIENCE)
        else:
            work = threading.Thread(target=self._last, name="bnguard", daemon=True)
            work.start()
            work.join(_PATIENCE)
        _set_handler(signal.SIGTERM, _DEFAULT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)

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
        self._forks, self._set_aside_handler = 0, None
        if self._writer != _NONE:
            self._uninstall()
            os.close(self._reader)
            os.close(self._writer)
            self._writer = _NONE
