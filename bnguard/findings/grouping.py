"""Findings: what several layers have in common that is wrong with how their running statistics are treated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bnguard.findings.codes import CODES, RUN, VERDICTS, Group, Severity
from bnguard.words import ranks_text, sentence

__all__ = ["Finding", "Sighting", "findings_of"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with how running statistics are treated.

    Attributes:
        code: ``"BN001"`` to ``"BN014"``.
        title: What the code is about.
        severity: ``"error"``: results are wrong; ``"warning"``: they very likely are not what was meant; ``"note"``:
            worth knowing.
        layers: First names of the layers concerned, in the order of ``state_dict()``.
        where: The user's line, ``"train.py:42 in train_epoch"``; None where it is not about one.
        what: What happened, in one sentence with the numbers.
        fix: What to do, in one sentence.
        verdict: What happened and what to do about it, in one line.
        ranks: Of a distributed run, the ranks concerned; empty where there is one process.
    """

    code: str
    title: str
    severity: Severity
    layers: tuple[str, ...]
    where: str | None
    what: str
    fix: str
    verdict: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = "" if self.where is None else f" at {self.where}"
        where = f" on {ranks_text(self.ranks)}" if self.ranks else ""
        return f"{self.code} {self.title}{place}{where}\n  {self.what}.\n  {sentence(self.fix)}"


@dataclass(frozen=True, slots=True)
class Sighting:
    """One layer's share in a finding.

    Attributes:
        code: As in ``Finding``.
        layer: The layer's first name.
        where: As in ``Finding``.
        number: How often; what that means depends on the code.
        detail: What the sentence needs besides; sightings with different details are different findings.
    """

    code: str
    layer: str
    where: str | None
    number: float = 0
    detail: Any = None


def findings_of(
    sightings: Iterable[Sighting],
    sentences: Mapping[str, Callable[[Any], str]] = RUN,
    verdicts: Mapping[str, Callable[[Any], str]] = VERDICTS,
    mild: frozenset[str] = frozenset(),
) -> tuple[Finding, ...]:
    """Puts together what several layers have in common; errors first, then by code, in the order of the sightings.

    Args:
        sightings: What was seen.
        sentences: What to say of each code; by default what is said of a run.
        verdicts: The same in short, without what to do about it.
        mild: Codes that are no more than a note here.
    """
    groups: dict[tuple[str, str | None, Any], list[Sighting]] = {}
    for sighting in sightings:
        groups.setdefault((sighting.code, sighting.where, sighting.detail), []).append(sighting)
    findings = []
    for (name, where, detail), sighted in groups.items():
        code = CODES[name]
        layers = tuple(dict.fromkeys(sighting.layer for sighting in sighted))
        group = Group(layers, [sighting.number for sighting in sighted], detail, where)
        verdict = f"{verdicts[name](group)}: {code.cure}"
        findings.append(
            Finding(
                name,
                code.title,
                "note" if name in mild else code.severity,
                layers,
                where,
                sentences[name](group),
                code.fix,
                verdict,
            )
        )
    rank = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(findings, key=lambda finding: (rank[finding.severity], finding.code)))
