"""The lock that bnguard takes, on every Python: held by one thread, free again after every way to leave it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest

from bnguard.torch_internals.locks import RLock


@contextmanager
def on_a_stack(lock: Any) -> Iterator[None]:
    """The lock entered by an ``ExitStack``, which takes both methods from its class."""
    with ExitStack() as stack:
        stack.enter_context(lock)
        yield


@pytest.mark.parametrize("entered", [lambda lock: lock, on_a_stack], ids=["with", "exit stack"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_lock_is_held_and_then_free(entered: Callable[[Any], AbstractContextManager[None]], fails: bool) -> None:
    """Another thread cannot enter it inside a block, nested or not, and can after it."""
    lock = RLock()
    inside, after = [], []
    try:
        with entered(lock), entered(lock):
            inside.append(is_free(lock))
            if fails:
                raise KeyError
    except KeyError:
        after.append(fails)
    assert inside == [False]
    assert is_free(lock)
    assert after == [True] * fails


def is_free(lock: Any) -> bool:
    """Whether another thread can enter it within some time."""
    entered = threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    return entered.wait(0.5)
