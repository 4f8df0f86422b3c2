"""Run code around a method of one object, such as a trainer or one of its callbacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, TypeAlias

Around: TypeAlias = Callable[..., AbstractContextManager[object]]


class Wrapped:
    """Replaces a method of one object, and runs each call of it inside context managers.

    Args:
        owner: The object.
        name: The name of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self._had_own = name in vars(owner)
        self._method = getattr(owner, name)
        self._around: list[Around] = []

    @classmethod
    def add(cls, owner: Any, name: str, around: Around) -> Callable[[], None]:
        """Runs the calls of a method inside ``around(*args, **kwargs)``, within what has been added before.

        Returns:
            A function that undoes this. Calling it twice does nothing.
        """
        present = vars(owner).get(name)
        wrapped = present if isinstance(present, cls) else cls(owner, name)
        wrapped._around.append(around)
        setattr(owner, name, wrapped)
        return partial(wrapped._remove, around)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for around in tuple(self._around):
                stack.enter_context(around(*args, **kwargs))
            return self._method(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy of the object has the method itself.
        return (copy.copy, (self._method,)) if self._had_own else (getattr, (self._owner, self._name))

    def _remove(self, around: Around) -> None:
        """Restores the object after the last removal, unless other code has replaced the method since."""
        self._around = [other for other in self._around if other is not around]
        if self._around or vars(self._owner).get(self._name) is not self:
            return
        if self._had_own:
            setattr(self._owner, self._name, self._method)
        else:
            delattr(self._owner, self._name)
