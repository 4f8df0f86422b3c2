"""A patch of torch's is in place exactly while it has users, wherever its code is interrupted."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from bnguard.torch_internals import patching
from bnguard.torch_internals.patching import AttributePatch


class Patched:
    """A function that is patched, with what each call has passed through."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.owner = SimpleNamespace(function=self.original)
        self.function = self.owner.function
        self.patch: AttributePatch[str] = AttributePatch(self.owner, "function", self.wrap)

    def original(self) -> None:
        self.calls.append("original")

    def wrap(self, function: Callable[[], None]) -> Callable[[], None]:
        def wrapped() -> None:
            self.calls.extend(self.patch.users)
            function()

        return wrapped

    def called(self) -> list[str]:
        """What a call passes through."""
        self.calls.clear()
        self.owner.function()
        return self.calls


class AtLine:
    """Calls ``action`` before the ``target``-th line of the module that runs; counts the lines.

    Then whatever traced before goes on, as a debugger or the measurement of coverage does.
    """

    def __init__(self, action: Callable[[], None], target: int | None) -> None:
        self.action = action
        self.target = target
        self.lines = 0
        self._inside: set[int] = set()  # frames in a ``with``

    def __enter__(self) -> AtLine:
        self._previous = sys.gettrace()
        sys.settrace(self._enters)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _enters(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename == patching.__file__ else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self._leaves_with(frame):
            self.lines += 1
            if self.lines - 1 == self.target:
                sys.settrace(None)
                self.action()
        return self._line

    def _leaves_with(self, frame: FrameType) -> bool:
        """Whether the line is a ``with`` whose block is over: Python runs nothing else before it leaves the lock."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with"):
            return False
        is_second = id(frame) in self._inside
        self._inside ^= {id(frame)}
        return is_second


def change(patched: Patched, *, adds: bool) -> None:
    """What is interrupted: the first user comes, or the last one goes."""
    if adds:
        patched.patch.add("first")
    else:
        patched.patch.remove("first")


def prepared(*, adds: bool) -> Patched:
    """Before that."""
    patched = Patched()
    if not adds:
        patched.patch.add("first")
    return patched


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("other_adds", [True, False])
def test_another_change_may_come_between_any_lines(adds: bool, other_adds: bool) -> None:
    """In the same thread, as the garbage collector's: both take effect."""

    def run(target: int | None) -> int:
        patched = prepared(adds=adds)
        if not other_adds:
            patched.patch.add("second")

        def other() -> None:
            (patched.patch.add if other_adds else patched.patch.remove)("second")

        with AtLine(other, target) as counter:
            change(patched, adds=adds)
        if target is not None:
            expected = ["first"] * adds + ["second"] * other_adds
            assert sorted(patched.called()) == sorted([*expected, "original"])
            assert (patched.owner.function == patched.function) is not bool(expected)
        return counter.lines

    lines = run(None)
    assert lines > 10
    for target in range(lines):
        run(target)


def test_a_user_may_come_while_another_is_added() -> None:
    """Neither is lost."""
    patched = Patched()

    def changed(users: tuple[str, ...]) -> tuple[str, ...]:
        patched.patch.add("second")
        return (*users, "first")

    patched.patch.swap(changed)
    assert patched.called() == ["second", "first", "original"]


def test_the_last_user_may_go_while_the_patch_is_applied() -> None:
    """The function is then the original one."""
    patched = Patched()

    def wrap(function: Callable[[], None]) -> Callable[[], None]:
        patched.patch.remove("user")
        return patched.wrap(function)

    patched.patch._wrap = wrap
    patched.patch.add("user")
    assert patched.owner.function == patched.function


@pytest.mark.parametrize("adds", [True, False])
def test_an_exception_may_come_between_any_lines(adds: bool) -> None:
    """As Ctrl-C's: when the user is removed after all, nothing is left, and the lock is free."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def run(target: int | None) -> int:
        patched = prepared(adds=adds)
        try:
            with AtLine(interrupt, target) as counter:
                change(patched, adds=adds)
        except KeyboardInterrupt:
            pass
        done = threading.Thread(target=patched.patch.remove, args=("first",))
        done.start()
        done.join(20)
        assert not done.is_alive()
        assert patched.called() == ["original"]
        assert patched.owner.function == patched.function
        return counter.lines

    for target in range(run(None)):
        run(target)


def test_a_wrapper_of_other_code_stays() -> None:
    """Ours is beneath it then, and does nothing without users; torch's own function is reached once."""
    patched = Patched()
    patched.patch.add("user")
    ours = patched.owner.function

    def foreign() -> None:
        patched.calls.append("foreign")
        ours()

    patched.owner.function = foreign
    patched.patch.remove("user")
    assert patched.owner.function is foreign
    assert patched.called() == ["foreign", "original"]
    for _ in range(3):
        patched.patch.add("again")
        assert patched.called()[0] == "again"
        assert patched.calls.count("original") == 1
        patched.patch.remove("again")
        assert patched.owner.function is foreign


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork in a process with threads
def test_a_forked_child_has_free_locks() -> None:
    """Another thread of the parent is in the middle of a change at the fork."""
    patched = Patched()
    inside, go = threading.Event(), threading.Event()

    def slow(users: tuple[str, ...]) -> tuple[str, ...]:
        inside.set()
        go.wait(60)
        return users

    thread = threading.Thread(target=patched.patch.swap, args=(slow,))
    thread.start()
    assert inside.wait(20)
    child = os.fork()
    if not child:
        worker = threading.Thread(target=patched.patch.add, args=("child",), daemon=True)
        worker.start()
        worker.join(20)
        os._exit(0 if not worker.is_alive() and patched.called() == ["child", "original"] else 1)
    go.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork in a process with threads
def test_a_child_that_is_forked_in_the_middle_of_a_change_completes_it() -> None:
    """The thread that forks holds the lock, and still does in the child."""
    patched, children = Patched(), []

    def forks(users: tuple[str, ...]) -> tuple[str, ...]:
        children.append(os.fork())
        return (*users, "user")

    has_failed = True
    try:
        patched.patch.swap(forks)
        has_failed = patched.called() != ["user", "original"]
    finally:
        if not children[0]:
            os._exit(has_failed)
    assert not has_failed
    assert os.waitpid(children[0], 0)[1] == 0


def test_threads_lose_no_change() -> None:
    """Each of many threads adds and removes a user again and again: nothing is left, and no user is lost."""
    patched = Patched()

    def work(number: int) -> None:
        user = f"user {number}"
        for _ in range(200):
            patched.patch.add(user)
            assert user in patched.patch.users
            patched.patch.remove(user)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patched.patch.users == ()
    assert patched.owner.function == patched.function
