"""The processes of a distributed run: what they tell each other at the end of a block.

Over the store by which they have found each other, not by a collective operation: that waits for no device, cannot be
paired with an operation of the training's own, and a process that fails tells the others without waiting for them.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from bnguard._report import ranks_text

__all__ = ["Group", "Ranks", "Told", "UnansweredError", "check_group"]

Group: TypeAlias = "ProcessGroup | bool | None"

_MOST_NAMED: Final = 62  # bits of a number in the store
_PATIENCE: Final = timedelta(seconds=10)  # after which one says for whom one waits
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
            f"got {group!r}"
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank has told the others.

    Attributes:
        rank: Its global rank.
        kind: ``"changed"``: statistics did, or were about to; ``"error"``: something else went wrong.
        text: What it says about that.
        layers: First names of the layers concerned.
        asks: Layers of which it wants to know the statistics of the first rank.
    """

    rank: int
    kind: str
    text: str
    layers: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


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
        self.store: Any = store.clone()  # type: ignore[attr-defined]  # one that waits keeps others from using it
        self.count: Counter[str] = Counter()
        self.totals: dict[str, int] = {}  # by place: what was told at the last meeting


_meetings: weakref.WeakKeyDictionary[Any, _Meetings] = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of one process group.

    Attributes:
        me: This process' global rank.
        members: Global ranks of all, in the order of the group.
        speaks: Whether this is the one that warns for all.
        timeout: How long they wait for each other: that of the process group.
    """

    def __init__(self, store: Store, members: tuple[int, ...], me: int) -> None:
        meetings = _meetings.get(store)
        if meetings is None:
            _meetings[store] = meetings = _Meetings(store)
        self._meetings = meetings
        self.members = members
        self.me = me
        self.speaks = me == members[0]
        self.timeout: timedelta = store.timeout  # type: ignore[attr-defined]

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
        return cls(store, members, me)

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
            self._sweep(key, int(number) - 1)
        if not waits:
            meetings.totals.pop(key, None)
            return ()
        if here != everybody:
            self._wait(base, place)
        total = int(store.get(f"{base}/all"))
        meetings.totals[key] = total
        heard = [json.loads(store.get(f"{base}/told/{index}")) for index in range(total)]
        all_told = [Told(rank, kind, text, tuple(layers), tuple(asks)) for rank, kind, text, layers, asks in heard]
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
            left = timedelta(seconds=max(0.001, end - time.monotonic()))
            try:
                store.wait([key], left)
            except RuntimeError:
                if not store.check([key]):
                    continue
            heard[rank] = store.get(key).decode()
            store.delete_key(key)
        return heard

    def _next(self, place: str) -> str:
        """The key of the next meeting at a place."""
        key = f"bnguard/{self.members}/{place}"
        number = self._meetings.count[key]
        self._meetings.count[key] += 1
        return f"{key}/{number}"

    def _wait(self, base: str, place: str) -> None:
        """Until all are here."""
        store, patience = self._meetings.store, min(_PATIENCE, self.timeout)
        try:
            store.wait([f"{base}/all"], patience)
            return
        except RuntimeError:  # of the time out, each store has its own
            missing = self._missing(base)
            if patience < self.timeout:
                _log.warning(
                    "bnguard: rank %s waits at the end of %s for %s; do they enter it? else it needs group=False",
                    self.me, place, ranks_text(missing),
                )  # fmt: skip
        if patience < self.timeout:
            try:
                store.wait([f"{base}/all"], self.timeout - patience)
                return
            except RuntimeError:
                missing = self._missing(base)
        raise UnansweredError(missing, self.timeout.total_seconds())

    def _missing(self, base: str) -> tuple[int, ...]:
        here = self._meetings.store.add(f"{base}/here", 0)
        if len(self.members) > _MOST_NAMED:
            return ()
        return tuple([rank for index, rank in enumerate(self.members) if not here >> index & 1])

    def _sweep(self, key: str, number: int) -> None:
        """Deletes what was told at an earlier meeting: whoever is here has heard it."""
        store, total = self._meetings.store, self._meetings.totals.get(key)
        if total is not None:
            names = ["told", "here", "all", *[f"told/{index}" for index in range(total)]]
            for name in names:
                store.delete_key(f"{key}/{number}/{name}")
