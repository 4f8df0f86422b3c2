"""The processes of a distributed run: what they tell each other at the end of a block.

Over the store by which they have found each other, not by a collective operation: that waits for no device, cannot be
paired with an operation of the training's own, and a process that fails tells the others without waiting for them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from bnguard._words import ranks_text, short_repr

__all__ = ["Group", "Ranks", "Told", "UnansweredError", "check_group"]

Group: TypeAlias = "ProcessGroup | bool | None"

_REMEMBERED: Final = 16  # meetings of one place: more than threads that meet there
_MOST_NAMED: Final = 62  # bits of a number in the store
_PATIENCE: Final = 10.0  # seconds after which one says for whom one waits
_log: Final = logging.getLogger("bnguard")


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


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank has told the others.

    Attributes:
        rank: Its global rank.
        kind: ``"changed"``: statistics did, or were about to; ``"error"``: something else went wrong.
        text: What it says about that.
        layers: First names of the layers concerned.
        asks: Ranks, and layers of which it wants to know their statistics.
    """

    rank: int
    kind: str
    text: str
    layers: tuple[str, ...] = ()
    asks: tuple[tuple[int, str], ...] = ()


class UnansweredError(Exception):
    """Some ranks have not come in time.

    Attributes:
        missing: Their global ranks; empty where that cannot be told.
        seconds: How long was waited for them.
    """

    def __init__(self, missing: tuple[int, ...], seconds: float) -> None:
        super().__init__(missing, seconds)
        self.missing = missing
        self.seconds = seconds


class _Meetings:
    """How often the ranks of one store have met at each place: equally often in all that go the same way.

    A store knows nothing of it: with another one, after a restart, counting begins anew.
    """

    def __init__(self, store: Store) -> None:
        self.lock = threading.Lock()
        self._original = weakref.ref(store)
        self._local = threading.local()
        self.count: Counter[str] = Counter()
        self.totals: dict[str, int] = {}  # by meeting: what was told there

    @property
    def store(self) -> Any:
        """A connection of this thread's own: one that waits on it keeps others from using it."""
        found = getattr(self._local, "store", None)
        if found is None:
            original: Any = self._original()
            if original is None:
                raise dist.DistError("the process group is destroyed")
            found = self._local.store = original.clone()
        return found


_meetings: weakref.WeakKeyDictionary[Any, _Meetings] = weakref.WeakKeyDictionary()
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
        meetings = _meetings.get(store)
        if meetings is None:
            _meetings[store] = meetings = _Meetings(store)
        self._meetings = meetings
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
        members = tuple(dist.get_process_group_ranks(chosen if chosen is not None else dist.group.WORLD))
        me = dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        if len(members) < 2 or me not in members or store is None or type(store).__name__ == "FakeStore":
            return None
        if store in _inherited:
            return None
        of_store: timedelta = store.timeout  # type: ignore[attr-defined]
        timeout = min(of_store, _timeout_of(chosen if chosen is not None else dist.group.WORLD, of_store))
        return cls(store, members, me, timeout)

    @property
    def is_over(self) -> bool:
        """Whether the process group has been destroyed."""
        return not dist.is_initialized()

    def release(self) -> None:
        """Lets go of the store, which ends with its process group. Nobody is to be told anything after that."""
        self._kept = None

    def meet(self, place: str, told: Told | None, *, waits: bool) -> tuple[Told, ...]:
        """Tells the others something, or that there is nothing, and hears what they tell.

        Args:
            place: Where; the same in all ranks.
            told: What to tell them.
            waits: Whether to wait for them; else nothing is heard.

        Returns:
            What all of them, this one included, have told.

        Raises:
            UnansweredError: Some have not come in time.
            torch.distributed.DistError: The store cannot be reached.
        """
        meetings, size = self._meetings, len(self.members)
        store, base = meetings.store, self._next(place)
        key, _, number = base.rpartition("/")
        if told is not None:
            index = store.add(f"{base}/told", 1) - 1
            store.set(f"{base}/told/{index}", json.dumps([told.rank, told.kind, told.text, told.layers, told.asks]))
        names_them = size <= _MOST_NAMED
        everybody = (1 << size) - 1 if names_them else size
        here = store.add(f"{base}/here", 1 << self.members.index(self.me) if names_them else 1)
        if here == everybody:
            store.set(f"{base}/all", str(store.add(f"{base}/told", 0)))
            self._sweep(key, int(number) - _REMEMBERED)
        if not waits:
            return ()
        if here != everybody:
            self._wait(base, place)
        total = int(store.get(f"{base}/all"))
        meetings.totals[base] = total
        heard = [json.loads(store.get(f"{base}/told/{index}")) for index in range(total)]
        all_told = [
            Told(rank, kind, text, tuple(layers), tuple(map(tuple, asks))) for rank, kind, text, layers, asks in heard
        ]
        return tuple(sorted(all_told, key=lambda one: one.rank))

    def tell(self, place: str, text: str) -> None:
        """Tells the first rank something, and does not wait for it."""
        self._meetings.store.set(f"{self._next(place)}/{self.me}", text)

    def collect(self, place: str, timeout: timedelta) -> dict[int, str]:
        """What the other ranks have told the first one, which this is, by rank; of those that tell it in time."""
        store, base = self._meetings.store, self._next(place)
        end = time.monotonic() + timeout.total_seconds()
        heard = {}
        for rank in self.members:
            if rank == self.me:
                continue
            key = f"{base}/{rank}"
            while not store.check([key]) and time.monotonic() < end:
                time.sleep(0.02)
            if not store.check([key]):
                continue
            heard[rank] = store.get(key).decode()
            store.delete_key(key)
        return heard

    def _next(self, place: str) -> str:
        """The key of the next meeting at a place."""
        key = f"bnguard/{self.members}/{place}"
        with self._meetings.lock:
            number = self._meetings.count[key]
            self._meetings.count[key] += 1
        return f"{key}/{number}"

    def _wait(self, base: str, place: str) -> None:
        """Until all are here. In slices: Ctrl-C is seen."""
        store, start, pause, is_said = self._meetings.store, time.monotonic(), 1e-4, False
        while not store.check([f"{base}/all"]):
            waited = time.monotonic() - start
            if waited > self.timeout.total_seconds():
                raise UnansweredError(self._missing(base), self.timeout.total_seconds())
            if waited > _PATIENCE and not is_said:
                is_said = True
                missing = ranks_text(self._missing(base))
                _log.warning(
                    "bnguard: rank %s waits at the end of %s for %s; do they enter it? else it needs group=False",
                    self.me, place, missing,
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _missing(self, base: str) -> tuple[int, ...]:
        here = self._meetings.store.add(f"{base}/here", 0)
        if len(self.members) > _MOST_NAMED:
            return ()
        return tuple([rank for index, rank in enumerate(self.members) if not here >> index & 1])

    def _sweep(self, key: str, number: int) -> None:
        """Deletes what was told at a meeting so long ago that every thread has heard it."""
        total = self._meetings.totals.pop(f"{key}/{number}", None)
        if total is not None:
            for name in ("told", "here", "all", *[f"told/{index}" for index in range(total)]):
                self._meetings.store.delete_key(f"{key}/{number}/{name}")


def _timeout_of(group: Any, default: timedelta) -> timedelta:
    """The timeout of a process group, which its backend has."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return default
