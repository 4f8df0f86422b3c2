"""Put together what the ranks of a distributed run have recorded.

Note [Ranks without a collective operation]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
When a watch stops, each rank posts what it has recorded to the store of the default process group, and goes on. Rank 0
gathers the posts, waits ten seconds in all, and names the ranks that did not come. A collective operation could be
paired with one of the training, would wait for the device, and would wait for a rank that has failed.

1. The store is taken when the watch first meets a model, and kept: the script may destroy the process group before the
   watch stops, and the server of the store may live in this process.
2. Ranks find each other's posts by what is watched, and by how many watches of that have stopped before.
3. A post is dated. What is older than this module in rank 0 was left by an earlier run in a store that is used again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import torch.distributed as dist

from bnguard.findings.grouping import by_severity, group_evidence
from bnguard.findings.rules import RULES
from bnguard.records import Finding, Mode, StatsUpdates
from bnguard.torch_internals.distributed import default_store, own_connection
from bnguard.words import ranks_text

_PATIENCE: Final = 10.0  # seconds for which rank 0 waits in all
_SILENT: Final = 1.0  # seconds after which it says that it waits
_PAUSE: Final = 0.02
_IMPORTED: Final = time.time()

T = TypeVar("T", StatsUpdates, Finding)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Recorded:
    """What one rank has recorded.

    Attributes:
        updates: As in ``watch``.
        findings: As in ``watch``.
        digests: Digests of the final statistics by layer name, for layers that nothing keeps equal across ranks.
    """

    updates: tuple[StatsUpdates, ...]
    findings: tuple[Finding, ...]
    digests: Mapping[str, str]

    def as_text(self) -> str:
        """As JSON, for another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Recorded:
        """The inverse of ``as_text``."""
        content: dict[str, Any] = json.loads(text)
        updates = [
            StatsUpdates(**{**_with_tuples(update), "mode": Mode(**update["mode"])}) for update in content["updates"]
        ]
        findings = [Finding(**_with_tuples(finding)) for finding in content["findings"]]
        return cls(tuple(updates), tuple(findings), content["digests"])


class Merged(NamedTuple):
    """What all ranks have recorded.

    Attributes:
        updates: Equal records of several ranks once, with the ranks.
        findings: Equal findings of several ranks once, with the ranks.
        missing: Ranks that did not post in time.
    """

    updates: tuple[StatsUpdates, ...]
    findings: tuple[Finding, ...]
    missing: tuple[int, ...]


# By store: for each watched thing, how many watches of it have stopped in this process.
_numbers: Final[weakref.WeakKeyDictionary[Any, defaultdict[str, Iterator[int]]]] = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of the default process group. See Note [Ranks without a collective operation].

    Attributes:
        rank: The rank of this process.
        size: How many there are.
    """

    def __init__(self, store: Any) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._store = store
        self._process = os.getpid()

    @classmethod
    def here(cls) -> Ranks | None:
        """The ranks of this process; None if it is alone."""
        store = default_store()
        return None if store is None else cls(store)

    def exchange(self, own: Recorded, place: str) -> Merged | None:
        """Posts what this rank has recorded; on rank 0, gathers the posts of the others.

        Args:
            own: What this rank has recorded.
            place: What was watched, in words that are equal on all ranks.

        Returns:
            What all ranks have recorded on rank 0; None on the others.
        """
        if self._store is None or os.getpid() != self._process:  # stopped in a forked child
            return None
        number = next(_numbers.setdefault(self._store, defaultdict(itertools.count))[place])
        key = f"bnguard/{place}/{number}"
        posts = {0: own}
        if self.rank:
            with suppress(dist.DistError, RuntimeError):  # the server of the store has ended
                own_connection(self._store).set(f"{key}/{self.rank}", json.dumps([time.time(), own.as_text()]))
        else:
            self._wait_for(threading.Thread(target=self._gather, args=(self._store, key, posts), daemon=True), posts)
        self._store = None
        return None if self.rank else self._merged(dict(posts))

    def _wait_for(self, gathering: threading.Thread, posts: Mapping[int, Recorded]) -> None:
        """Waits for the posts, and says so if it takes a while. A call of the store may hang for its own timeout."""
        gathering.start()
        gathering.join(_SILENT)
        if gathering.is_alive():
            missing = ranks_text([rank for rank in range(self.size) if rank not in posts])
            text = f"bnguard: waiting up to {_PATIENCE:g} seconds for what was recorded on {missing}"
            print(text, file=sys.stderr, flush=True)
            gathering.join(_PATIENCE - _SILENT)

    def _gather(self, store: Any, key: str, posts: dict[int, Recorded]) -> None:
        """Adds the posts of the other ranks as they come, as long as rank 0 waits."""
        with suppress(dist.DistError, RuntimeError):  # the server of the store has ended
            self._take_posts(own_connection(store), key, posts)

    def _take_posts(self, store: Any, key: str, posts: dict[int, Recorded]) -> None:
        end, missing = time.monotonic() + _PATIENCE, set(range(1, self.size))
        while missing:
            for rank in sorted(missing):
                if store.check([f"{key}/{rank}"]):
                    at, text = json.loads(store.get(f"{key}/{rank}"))
                    if at >= _IMPORTED:
                        posts[rank] = Recorded.from_text(text)
                        missing.discard(rank)
                        store.delete_key(f"{key}/{rank}")
            if time.monotonic() >= end:
                break
            time.sleep(_PAUSE)

    def _merged(self, recorded: Mapping[int, Recorded]) -> Merged:
        digests = {rank: one.digests for rank, one in sorted(recorded.items())}
        across = group_evidence([evidence for rule in RULES.values() for evidence in rule.across_ranks(digests)])
        findings = _together({rank: one.findings for rank, one in recorded.items()})
        missing = tuple([rank for rank in range(self.size) if rank not in recorded])
        updates = _together({rank: one.updates for rank, one in recorded.items()})
        return Merged(updates, by_severity([*findings, *across]), missing)


def _together(by_rank: Mapping[int, Iterable[T]]) -> tuple[T, ...]:
    """Equal items once, with their ranks, in the order of the lowest rank that has them."""
    ranks: dict[T, list[int]] = {}
    for rank, items in sorted(by_rank.items(), key=lambda pair: pair[0]):
        for item in items:
            ranks.setdefault(item, []).append(rank)
    return tuple([dataclasses.replace(item, ranks=tuple(having)) for item, having in ranks.items()])


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
