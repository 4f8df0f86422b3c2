"""What the ranks of a distributed run have recorded, put together on the first of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

from bnguard.findings.grouping import Finding, Sighting, findings_of
from bnguard.records import Mode, StatsUpdates
from bnguard.torch_internals.ranks import Ranks

__all__ = ["Merged", "Recorded", "merge"]

_PATIENCE: Final = timedelta(seconds=60)
_SHORT_PATIENCE: Final = timedelta(seconds=2)  # after an exception, which may have come to all of them

T = TypeVar("T", StatsUpdates, Finding)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one rank has recorded.

    Attributes:
        updates: See ``watch``.
        findings: See ``watch``.
        own: Digests of the statistics at the end, by layer, where nobody makes them equal on all ranks.
    """

    updates: tuple[StatsUpdates, ...]
    findings: tuple[Finding, ...]
    own: Mapping[str, str]

    def as_text(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Recorded:
        """What another process has sent."""
        content: dict[str, Any] = json.loads(text)
        updates = [
            StatsUpdates(**{**_with_tuples(update), "mode": Mode(**update["mode"])}) for update in content["updates"]
        ]
        findings = [Finding(**_with_tuples(finding)) for finding in content["findings"]]
        return cls(tuple(updates), tuple(findings), content["own"])


@dataclass(frozen=True, slots=True)
class Merged:
    """What all ranks have recorded, as far as they have told.

    Attributes:
        updates: Equal ones of several ranks once, with the ranks.
        findings: Likewise.
        missing: Ranks that have not told.
    """

    updates: tuple[StatsUpdates, ...]
    findings: tuple[Finding, ...]
    missing: tuple[int, ...]


def merge(ranks: Ranks, own: Recorded, place: str, *, waits: bool) -> Merged | None:
    """Tells the first rank what this one has recorded; on the first rank, puts all of it together.

    Args:
        ranks: The ranks.
        own: What this one has recorded.
        place: Where the watch began; the same in all of them.
        waits: Whether the first one waits for the others, at most a minute; else at most two seconds.

    Returns:
        All of it on the first rank, None on the others.

    Raises:
        torch.distributed.DistError: The other ranks cannot be reached.
    """
    if not ranks.speaks:
        ranks.tell(place, own.as_text())
        return None
    heard = ranks.collect(place, min(_PATIENCE if waits else _SHORT_PATIENCE, ranks.timeout))
    recorded = {ranks.me: own, **{rank: Recorded.of_text(text) for rank, text in heard.items()}}
    missing = tuple([rank for rank in ranks.members if rank not in recorded])
    findings = _together({rank: one.findings for rank, one in recorded.items()})
    differing = findings_of(_differing({rank: one.own for rank, one in recorded.items()}))
    severe = {"error": 0, "warning": 1, "note": 2}
    both = sorted([*findings, *differing], key=lambda finding: (severe[finding.severity], finding.code))
    return Merged(_together({rank: one.updates for rank, one in recorded.items()}), tuple(both), missing)


def _together(by_rank: Mapping[int, Iterable[T]]) -> tuple[T, ...]:
    """Each once, with its ranks, in the order of the first rank that has it."""
    ranks: dict[T, list[int]] = {}
    for rank, items in by_rank.items():
        for item in items:
            ranks.setdefault(item, []).append(rank)
    return tuple([dataclasses.replace(item, ranks=tuple(sorted(having))) for item, having in ranks.items()])


def _differing(by_rank: Mapping[int, Mapping[str, str]]) -> list[Sighting]:
    """Layers with other statistics than on the first rank."""
    first, *others = by_rank.items()
    sightings = []
    for name, digest in first[1].items():
        ranks = tuple([rank for rank, own in others if own.get(name, digest) != digest])
        if ranks:
            sightings.append(Sighting("BN015", name, None, 0, (first[0], ranks)))
    return sightings


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
