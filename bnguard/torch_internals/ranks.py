"""The processes of a distributed run: which of them agree at the end of a block, and how long they wait."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from bnguard.torch_internals.meetings import Heard, Meetings, Place, Told
from bnguard.words import short_repr

__all__ = ["Group", "Ranks", "check_group"]

Group: TypeAlias = "ProcessGroup | bool | None"


def check_group(group: Any) -> None:
    """Checks the option ``group``.

    Raises:
        TypeError: It is no process group, None or False.
    """
    if group is None or group is False or group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group, None for the default group or False for none, "
            f"got {short_repr(group)}"
        )


_inherited: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child, such as a worker of a ``DataLoader``, is no rank, and its parent's connection not its own."""
    if dist.is_available() and dist.is_initialized():
        _inherited.add(dist.distributed_c10d._get_default_store())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Ranks:
    """The ranks of one process group.

    Attributes:
        me: This process' global rank.
        members: Global ranks of all, in the order of the group.
        speaks: Whether this is the one that warns for all.
        timeout: How long they wait for each other: that of the process group.
    """

    def __init__(self, store: Store, members: tuple[int, ...], me: int, timeout: timedelta) -> None:
        self._meetings = Meetings.of(store, members, me)
        self.members = members
        self.me = me
        self.speaks = me == members[0]
        self.timeout = timeout
        self._kept: Store | None = store  # whose server may be in this process

    @classmethod
    def of(cls, group: Group) -> Ranks | None:
        """Those of a group, or of the default one; None where this process is alone, or on its own."""
        if group is False or not dist.is_available() or not dist.is_initialized():
            return None
        chosen = group if isinstance(group, ProcessGroup) else None
        if group is not None and chosen is None:  # of which this process is no member
            return None
        process_group = dist.group.WORLD if chosen is None else chosen
        if process_group not in dist.distributed_c10d._world.pg_map:  # destroyed
            return None
        members, me = tuple(dist.get_process_group_ranks(process_group)), dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        if len(members) < 2 or me not in members or store is None or store in _inherited:
            return None
        if _is_fake(store) or dist.get_backend(process_group) == "fake":
            return None
        of_store: timedelta = store.timeout  # type: ignore[attr-defined]
        timeout = min(of_store, _timeout_of(process_group, of_store))
        return cls(store, members, me, timeout)

    @property
    def is_over(self) -> bool:
        """Whether the process group has been destroyed."""
        return not dist.is_initialized()

    def release(self) -> None:
        """Lets go of the store, which ends with its process group. Nobody is to be told anything after that."""
        self._kept = None

    def meet(self, place: Place, told: Told | None, *, waits: bool, around: Sequence[Place] = ()) -> Heard:
        """Tells the others something, and hears what they tell. See ``Meetings.meet``."""
        return self._meetings.meet(place, told, waits=waits, seconds=self.timeout.total_seconds(), around=around)

    def count(self, place: str) -> int:
        """How often this rank has begun something at a place before."""
        return self._meetings.count(place)

    def tell(self, place: str, text: str) -> None:
        """Tells the first rank something, and does not wait for it."""
        self._meetings.tell(place, text)

    def collect(self, place: str, timeout: timedelta) -> dict[int, str]:
        """What the other ranks have told the first one, which this is, by rank; of those that tell it in time."""
        return self._meetings.collect(place, timeout.total_seconds())


def _is_fake(store: Any) -> bool:
    """Whether there is nobody behind a store."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return type(store).__name__ == "FakeStore"


def _timeout_of(group: Any, default: timedelta) -> timedelta:
    """The timeout of a process group, which its backend has."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return default
