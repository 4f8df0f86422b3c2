"""A table of values by object, which does not keep the objects alive."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class ByIdentity(Generic[V]):
    """Values by the identity of an object: a model may be without a hash, or equal to another one."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], V]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def get(self, owner: object) -> V | None:
        """The value for this object; None if there is none."""
        entry = self._entries.get(id(owner))
        return entry[1] if entry is not None and entry[0]() is owner else None

    def put(self, owner: object, value: V) -> None:
        """Sets the value, for as long as the object lives.

        Raises:
            TypeError: Python cannot refer to the object weakly, as it has slots.
        """
        key = id(owner)
        self._entries[key] = weakref.ref(owner, lambda _: self._entries.pop(key, None)), value

    def drop(self, owner: object) -> bool:
        """Forgets the value for this object. Returns whether there was one."""
        entry = self._entries.get(id(owner))
        if entry is None or entry[0]() is not owner:
            return False
        return self._entries.pop(id(owner), None) is not None
