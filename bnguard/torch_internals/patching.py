"""Patch torch as long as at least one user needs the patch.

Note [Interrupted anywhere]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
A block may end between any two lines of bnguard's code: the garbage collector closes a generator that contains it, a
signal handler raises or ends the block, the user presses Ctrl-C, another thread ends the block at the same time, or the
process forks. A lock is not enough: the garbage collector and signal handlers run in the thread that holds it. So:

1. The desired state is one immutable tuple, the users. It is changed by compare-and-swap: the new tuple is computed
   from the old one, and stored only if the old one is still current, with no call in between.
2. ``sync`` makes the patch conform to the current tuple. It does not depend on what has changed, so it may be run any
   number of times, by any thread, and again after an interruption.
3. At its end, ``sync`` reads the tuple again. If a block has ended in the meantime, it starts over.
4. Whether the patch is in place is read from torch itself. A separate flag could be wrong after an interruption.
5. The lock is reentrant, and is never held while user code runs. It is free in a forked child, although another thread
   of the parent may have held it; but not if the thread that forked holds it itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import autograd
from torch.optim import optimizer as torch_optimizer

from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock

U = TypeVar("U")


class Patch(Generic[U]):
    """A patch that is in place while it has users. See Note [Interrupted anywhere].

    Args:
        conform: Applies the patch if the tuple has users, else removes it. It may be called any number of times, and
            after a call that was interrupted.

    Attributes:
        users: The current users.
    """

    def __init__(self, conform: Callable[[tuple[U, ...]], None]) -> None:
        self.users: tuple[U, ...] = ()
        self._conform = conform
        self._lock = RLock()
        renew_after_fork(self._lock)  # rule 5

    def add(self, user: U) -> None:
        """Adds a user. Has no effect if it has been added already."""
        self.swap(lambda users: users if any(other is user for other in users) else (*users, user))

    def remove(self, user: U) -> None:
        """Removes a user. Has no effect if it has been removed already."""
        self.swap(lambda users: tuple([other for other in users if other is not user]))

    def swap(self, changed: Callable[[tuple[U, ...]], tuple[U, ...]]) -> None:
        """Replaces the users with ``changed(users)``, and makes the patch conform.

        Args:
            changed: Returns the new users, given the old ones. It is called again if the users have changed in the
                meantime, and must be idempotent.
        """
        with self._lock:
            while True:
                old = self.users
                new = changed(old)
                self.users = new if self.users is old else self.users  # rule 1: one line, without a call
                if self.users is new:
                    break
            self.sync()

    def sync(self) -> None:
        """Makes the patch conform to the users."""
        with self._lock:
            while True:
                users = self.users
                self._conform(users)
                if self.users is users:  # rule 3
                    return


class AttributePatch(Patch[U]):
    """A torch function that is wrapped while the patch has users.

    If other code has wrapped the wrapper in the meantime, the wrapper is not removed. So without users, it must only
    call the original function.

    Args:
        owner: The module or class that has the function.
        name: The name of the function.
        wrap: Given the current function, returns its replacement.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        super().__init__(self._wrap_or_unwrap)
        self._owner = owner
        self._name = name
        self._wrap = wrap

    def _wrap_or_unwrap(self, users: tuple[U, ...]) -> None:
        current = getattr(self._owner, self._name)
        is_wrapped = getattr(current, "_bnguard_patch", None) is self
        if users and not is_wrapped:
            wrapper: Any = self._wrap(current)
            wrapper._bnguard_patch, wrapper._bnguard_original = self, current
            setattr(self._owner, self._name, wrapper)
        elif not users and is_wrapped:
            setattr(self._owner, self._name, current._bnguard_original)


def backward_patch(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> AttributePatch[Any]:
    """Makes a patch of the function that ``torch.autograd.backward()`` and ``torch.autograd.grad()`` call once each."""
    return AttributePatch(autograd, "_engine_run_backward", wrap)


def step_hook_patch(hook: Callable[..., None]) -> Patch[Any]:
    """Makes a patch that registers a hook to run after each step of every optimizer.

    It works like ``register_optimizer_step_post_hook``.
    """
    hooks: dict[Any, Any] = torch_optimizer._global_optimizer_post_hooks

    def conform(users: tuple[Any, ...]) -> None:
        if users:
            hooks.setdefault("bnguard", hook)
        else:
            hooks.pop("bnguard", None)

    return Patch(conform)
