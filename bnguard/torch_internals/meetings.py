"""How the ranks of a process group tell each other something: over the store by which they have found each other.

A collective operation would wait for a device, could be paired with an operation of the training's own, and would have
a process that fails wait for the others.

A store may be older than the process group, and hold what an earlier attempt of an elastic run has written. So the
first rank draws a number, which is in the key of every meeting, and gives it to each other rank that answers with a
number of its own: only a living one can. What is told before that has the time of telling, and is passed over if that
is older than this process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from bnguard.words import ranks_text

__all__ = ["Heard", "Meetings", "Place", "Told", "UnansweredError"]

_PER_WORD: Final = 31  # ranks of which one number in the store tells whether they are there, and have left
_LOOKS: Final = 0.25  # seconds between two looks for ranks that will not come
_WITHOUT_NUMBER: Final = 3.0  # seconds for which ranks that the first one has left behind wait for each other
_PATIENCE: Final = 10.0  # seconds after which one says for whom one waits
_log: Final = logging.getLogger("bnguard")


@dataclass(frozen=True, slots=True)
class Place:
    """Where ranks meet, once.

    Attributes:
        key: The same in all of them, wherever their code lies.
        text: For people: ``the end of frozen() at train.py:12 in main``.
    """

    key: str
    text: str

    @property
    def digest(self) -> str:
        """The key, in few characters."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:20]


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

    def as_text(self) -> str:
        """For another process."""
        return json.dumps([self.rank, self.kind, self.text, self.layers, self.asks])

    @classmethod
    def of_text(cls, text: str | bytes) -> Told:
        """What another process has told."""
        rank, kind, said, layers, asks = json.loads(text)
        return cls(rank, kind, said, tuple(layers), tuple([(source, name) for source, name in asks]))


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of a meeting.

    Attributes:
        told: What all of them, this one included, have told, by rank.
        left: Ranks that went on without waiting.
        again: Has those meet again that are left; takes the name of that and what to tell.
    """

    told: tuple[Told, ...]
    left: frozenset[int]
    again: Callable[[str, Told | None], Heard]


class UnansweredError(Exception):
    """Some ranks have not come in time.

    Attributes:
        missing: Their global ranks.
        seconds: How long was waited for them.
        elsewhere: Where those of them wait that wait themselves.
    """

    def __init__(self, missing: tuple[int, ...], seconds: float, elsewhere: Mapping[int, str]) -> None:
        super().__init__(missing, seconds)
        self.missing = missing
        self.seconds = seconds
        self.elsewhere = elsewhere


def _process_start() -> float:
    """When this process began, in seconds since the epoch; at the latest now."""
    now = time.time()
    try:
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return min(now, now - since_boot + ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):  # another system
        return now


_PROCESS_START: Final = _process_start()


class _OfStore:
    """What is kept for one store.

    Attributes:
        since: What is older than this was not told by a process of this process group.
    """

    last_contact = _PROCESS_START  # with any store

    def __init__(self) -> None:
        self.since = _OfStore.last_contact
        self.by_members: dict[tuple[int, ...], Meetings] = {}


_stores: Final[weakref.WeakKeyDictionary[Any, _OfStore]] = weakref.WeakKeyDictionary()


class Meetings:
    """The meetings of some ranks, as one of them sees them.

    Args:
        store: Their store.
        members: Global ranks of all.
        me: This one's.
        since: What is older was not told by them.

    Attributes:
        members: The ranks.
        me: This one.
    """

    def __init__(self, store: Store, members: tuple[int, ...], me: int, since: float) -> None:
        self.members = members
        self.me = me
        self._since = since
        self._original = weakref.ref(store)
        self._local = threading.local()
        self._numbers: dict[str, Iterator[int]] = {}  # by place, of what begins there
        self._token = secrets.token_hex(8)
        self._number: str | None = self._token if me == members[0] else None  # what all of them have in their keys
        self._welcomed: set[int] = {me}  # who have it, as far as the first one knows
        self._prefix = f"bnguard/{hashlib.sha256(repr(members).encode()).hexdigest()[:16]}"

    @classmethod
    def of(cls, store: Store, members: tuple[int, ...], me: int) -> Meetings:
        """Those of a store, which last as long as that."""
        kept = _stores.get(store) or _stores.setdefault(store, _OfStore())
        found = kept.by_members.get(members)
        return found or kept.by_members.setdefault(members, cls(store, members, me, kept.since))

    @property
    def store(self) -> Any:
        """A connection of this thread's own: one that waits on it keeps others from using it."""
        found = getattr(self._local, "store", None)
        if found is None:
            original: Any = self._original()
            if original is None:
                raise dist.DistError("the process group is destroyed")
            found = self._local.store = original.clone()
        _OfStore.last_contact = time.time()
        return found

    def meet(
        self, place: Place, told: Told | None, *, waits: bool, seconds: float = 0, around: Sequence[Place] = ()
    ) -> Heard:
        """Tells the others something, or that there is nothing, and hears what they tell.

        Args:
            place: Where; never the same place twice.
            told: What to tell them.
            waits: Whether to wait for them; else nothing is heard.
            seconds: How long.
            around: Where this rank is to meet them later on, as it is inside of those: who is there has left here.

        Raises:
            UnansweredError: Some have not come in time.
            torch.distributed.DistError: The store cannot be reached.
        """
        base = place.digest
        if not waits:
            self._leave(base, told)
            return Heard((), frozenset(), _never)
        wait, bases = _Wait(place, seconds, self), [one.digest for one in around]
        try:
            if self._number is None and not self._is_welcomed(base, told, wait, bases):
                return self._hear_those_without_number(base, told, wait)
            return _Round(self, base, self.members, wait, bases).hold(told)
        finally:
            wait.end()

    def count(self, place: str) -> int:
        """How often this rank has begun something at a place before."""
        return next(self._numbers.setdefault(place, itertools.count()))

    def tell(self, place: str, text: str) -> None:
        """Tells the first rank something, and does not wait for it."""
        key = f"{self._prefix}/{place}#{self.count(place)}"
        self.store.set(f"{key}/{self.me}", _dated(text))

    def collect(self, place: str, seconds: float) -> dict[int, str]:
        """What the other ranks have told the first one, which this is, by rank; of those that tell it in time."""
        store, key = self.store, f"{self._prefix}/{place}#{self.count(place)}"
        end, heard = time.monotonic() + seconds, {}
        for rank in self.members:
            if rank == self.me:
                continue
            text = self.fresh(f"{key}/{rank}")
            while text is None and time.monotonic() < end:
                time.sleep(0.02)
                text = self.fresh(f"{key}/{rank}")
            if text is not None:
                heard[rank] = text
                store.delete_key(f"{key}/{rank}")
        return heard

    # For the rounds of a meeting.

    @property
    def has_number(self) -> bool:
        """Whether this rank has what all of them have in their keys."""
        return self._number is not None

    def key(self, base: str) -> str:
        """A key of these ranks, and of no earlier ones."""
        return f"{self._prefix}/{self._number}/{base}"

    def fresh(self, key: str) -> str | None:
        """What a rank of this process group has told there, with the time."""
        if not self.store.check([key]):
            return None
        at, text = json.loads(self.store.get(key))
        return str(text) if at >= self._since else None

    def welcome(self, missing: Iterable[int]) -> None:
        """Gives those the number that have asked for it; the first rank's task."""
        if self._number != self._token:
            return
        if len(self._welcomed) == 1:
            self.store.set(f"{self._prefix}/number", self._token)
        for rank in missing:
            reply = f"{self._prefix}/reply/{rank}"
            if rank not in self._welcomed and self.store.check([reply]):
                text = self.store.get(reply).decode()
                if text.startswith(self._token):
                    self.store.set(f"{self._prefix}/welcome/{rank}", text)
                    self._welcomed.add(rank)

    def who_has_left(
        self, missing: Iterable[int], base: str, around: Iterable[str] = ()
    ) -> dict[int, tuple[Told, ...]]:
        """Of those: who has left this meeting, or one around it, without the number; what it has told here."""
        left: dict[int, tuple[Told, ...]] = {}
        for rank in missing:
            text = self.fresh(f"{self._prefix}/left/{base}/{rank}")
            if text is not None:
                left[rank] = (Told.of_text(text),) if text else ()
            elif any([self.fresh(f"{self._prefix}/left/{outer}/{rank}") is not None for outer in around]):
                left[rank] = ()
        return left

    # Parts.

    def _leave(self, base: str, told: Told | None) -> None:
        if self._number is not None:
            _Round(self, base, self.members, None, ()).pass_by(told)
        if self._number is None or (self._number == self._token and len(self._welcomed) < len(self.members)):
            text = "" if told is None else told.as_text()
            self.store.set(f"{self._prefix}/left/{base}/{self.me}", _dated(text))

    def _is_welcomed(self, base: str, told: Told | None, wait: _Wait, around: Sequence[str]) -> bool:
        """Gets the number from the first rank; False where that one has left."""
        first, replied, welcome = self.members[0], "", f"{self._prefix}/welcome/{self.me}"
        try:
            while True:
                if self.store.check([f"{self._prefix}/number"]):
                    number = self.store.get(f"{self._prefix}/number").decode()
                    if f"{number} {self._token}" != replied:
                        replied = f"{number} {self._token}"
                        self.store.set(f"{self._prefix}/reply/{self.me}", replied)
                if replied and self.store.check([welcome]) and self.store.get(welcome).decode() == replied:
                    self._number = replied.partition(" ")[0]
                    return True
                if wait.is_time_to_look() and self.who_has_left([first], base, around):
                    return False
                wait.pause((first,))
        except BaseException:
            with suppress(dist.DistError):
                self._leave(base, told)
            raise

    def _hear_those_without_number(self, base: str, told: Told | None, wait: _Wait) -> Heard:
        """What those tell each other that the first rank has not welcomed before it left."""
        self._leave(base, told)
        others = [rank for rank in self.members if rank != self.me]
        end = time.monotonic() + _WITHOUT_NUMBER
        left = self.who_has_left(others, base)
        while len(left) < len(others) and time.monotonic() < end:
            time.sleep(0.05)
            left = self.who_has_left(others, base)
        heard = [one for several in left.values() for one in several]
        if told is not None:
            heard.append(told)
        return Heard(tuple(sorted(heard, key=lambda one: one.rank)), frozenset([self.members[0]]), _never)


class _Round:
    """Some ranks at one place, once.

    Args:
        meetings: Theirs.
        base: The place and the number of the meeting.
        expected: Who is to come.
        wait: How long; None for a rank that does not.
        around: Places of meetings around this one.
    """

    def __init__(
        self, meetings: Meetings, base: str, expected: tuple[int, ...], wait: _Wait | None, around: Sequence[str]
    ) -> None:
        self._meetings = meetings
        self._base = base
        self._key = meetings.key(base)
        self._expected = expected
        self._wait = wait
        self._around = around
        self._size = -(-len(expected) // _PER_WORD)

    def pass_by(self, told: Told | None) -> None:
        """Tells, and goes on."""
        self._arrive(told, has_left=True)

    def hold(self, told: Told | None) -> Heard:
        """Tells, waits for the others, and hears them."""
        store = self._meetings.store
        end = self._arrive(told, has_left=False)
        told_early: tuple[Told, ...] = ()
        if end is None:
            end, told_early = self._await()
        total, left = end
        heard = [Told.of_text(store.get(f"{self._key}/told/{index}")) for index in range(total)]
        if store.add(f"{self._key}/read", 1) == len(self._expected) - len(left):
            self._sweep(total, left)
        remaining = tuple([rank for rank in self._expected if rank not in left])

        def again(name: str, told: Told | None) -> Heard:
            try:
                return _Round(self._meetings, f"{self._base}/{name}", remaining, self._wait, self._around).hold(told)
            finally:
                if self._wait is not None:
                    self._wait.end()

        return Heard(tuple(sorted([*heard, *told_early], key=lambda one: one.rank)), left, again)

    def _arrive(self, told: Told | None, *, has_left: bool) -> tuple[int, frozenset[int]] | None:
        """Comes; the last one gets what the meeting is to know, and tells it."""
        store, key = self._meetings.store, self._key
        if told is not None:
            index = store.add(f"{key}/told", 1) - 1
            store.set(f"{key}/told/{index}", told.as_text())
        word, place = divmod(self._expected.index(self._meetings.me), _PER_WORD)
        here = store.add(f"{key}/here/{word}", (3 if has_left else 1) << 2 * place)
        if here & _present(self._in_word(word)) != _present(self._in_word(word)):
            return None
        if self._size > 1 and store.add(f"{key}/words", 1) < self._size:
            return None
        words = [here] if self._size == 1 else self._words()
        left = self._ranks_in(words, 2)
        total = store.add(f"{key}/told", 0)
        if len(left) == len(self._expected):
            self._sweep(total, left)
        else:
            store.set(f"{key}/all", json.dumps([total, sorted(left)]))
        return total, left

    def _await(self) -> tuple[tuple[int, frozenset[int]], tuple[Told, ...]]:
        """Until all are here that will come."""
        store, wait, meetings = self._meetings.store, self._wait, self._meetings
        assert wait is not None
        while not store.check([f"{self._key}/all"]):
            words = self._words()
            here = self._ranks_in(words, 1)
            missing = tuple([rank for rank in self._expected if rank not in here])
            meetings.welcome(missing)
            if missing and wait.is_time_to_look():
                gone = meetings.who_has_left(missing, self._base, self._around)
                for base in self._around:
                    passed = _Round(meetings, base, meetings.members, None, ())
                    gone.update(dict.fromkeys([rank for rank in passed.present() if rank in missing], ()))
                if len(gone) == len(missing):
                    left = self._ranks_in(words, 2) | frozenset(missing)
                    total = store.add(f"{self._key}/told", 0)
                    return (total, left), tuple([one for told in gone.values() for one in told])
            wait.pause(missing)
        total, left_ranks = json.loads(store.get(f"{self._key}/all"))
        return (total, frozenset(left_ranks)), ()

    def present(self) -> frozenset[int]:
        """Who is here, or was and has left."""
        keys = [f"{self._key}/here/{word}" for word in range(self._size)]
        if not any([self._meetings.store.check([key]) for key in keys]):
            return frozenset()
        return self._ranks_in(self._words(), 1)

    def _words(self) -> list[int]:
        return [self._meetings.store.add(f"{self._key}/here/{word}", 0) for word in range(self._size)]

    def _in_word(self, word: int) -> int:
        """How many ranks one number tells of."""
        return min(_PER_WORD, len(self._expected) - word * _PER_WORD)

    def _ranks_in(self, words: Sequence[int], bit: int) -> frozenset[int]:
        """The ranks that are there (1), or have left (2)."""
        return frozenset(
            [
                rank
                for index, rank in enumerate(self._expected)
                if words[index // _PER_WORD] >> 2 * (index % _PER_WORD) & bit
            ]
        )

    def _sweep(self, total: int, left: frozenset[int]) -> None:
        """Deletes what was told, when all have heard it."""
        names = ["told", "all", "read", "words"] if self._size > 1 else ["told", "all", "read"]
        if len(left) == len(self._expected):
            names.remove("all")
            names.remove("read")
        names += [f"here/{word}" for word in range(self._size)]
        for name in (*names, *[f"told/{index}" for index in range(total)]):
            self._meetings.store.delete_key(f"{self._key}/{name}")


class _Wait:
    """The patience of a rank, at one place.

    Args:
        place: Where.
        seconds: How long it waits at most.
        meetings: The meetings.
    """

    def __init__(self, place: Place, seconds: float, meetings: Meetings) -> None:
        self._place = place
        self._seconds = seconds
        self._meetings = meetings
        self._start = time.monotonic()
        self._pause = 1e-4
        self._next_look = self._start + _LOOKS / 10
        self._has_said = self._has_logged = False

    def is_time_to_look(self) -> bool:
        """Whether to look again for what is seldom."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _LOOKS
        return True

    def pause(self, missing: tuple[int, ...]) -> None:
        """Waits a little. In slices: Ctrl-C is seen.

        Raises:
            UnansweredError: That was long enough.
        """
        waited = time.monotonic() - self._start
        if waited > self._seconds:
            self._has_said = False  # where this rank has waited stays to be read by those who still do
            raise UnansweredError(missing, self._seconds, self._elsewhere(missing))
        if waited > _PATIENCE and not self._has_said and self._meetings.has_number:
            self._has_said = True
            self._meetings.store.set(self._key(self._meetings.me), self._place.text)
        if waited > _PATIENCE + 1 and not self._has_logged:
            self._has_logged = True
            where = "".join([f"; rank {rank} waits at {place}" for rank, place in self._elsewhere(missing).items()])
            _log.warning(
                "bnguard: rank %s waits at %s for %s%s. A block that not all ranks enter needs "
                "group=False", self._meetings.me, self._place.text, ranks_text(missing), where,
            )  # fmt: skip
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 0.05)

    def end(self) -> None:
        """Waits no more."""
        if self._has_said:
            self._has_said = False
            self._meetings.store.delete_key(self._key(self._meetings.me))

    def _elsewhere(self, missing: Iterable[int]) -> dict[int, str]:
        store = self._meetings.store
        keys = {rank: self._key(rank) for rank in missing}
        return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}

    def _key(self, rank: int) -> str:
        return self._meetings.key(f"waits/{rank}")


def _present(ranks: int) -> int:
    """A number in the store that says of so many ranks that they are there."""
    return ((1 << 2 * ranks) - 1) // 3


def _dated(text: str) -> str:
    return json.dumps([time.time(), text])


def _never(name: str, told: Told | None) -> Heard:
    """Of a meeting that is over."""
    raise AssertionError
