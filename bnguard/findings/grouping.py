"""Groups the evidence of several layers into findings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from bnguard.findings.rule import Evidence, EvidenceGroup, Rule, Variant
from bnguard.findings.rules import RULES
from bnguard.records import Finding, Severity
from bnguard.report.places import library_line

_ORDER: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "note": 2}


def group_evidence(evidence: Iterable[Evidence], *, is_audit: bool = False) -> tuple[Finding, ...]:
    """Makes one finding of all evidence with the same code, line and detail.

    Args:
        evidence: The evidence.
        is_audit: Whether it is that of an audit, whose sentences differ from those of a run.

    Returns:
        The findings, the most severe first, then those that happened most often, then by code.
    """
    groups: dict[tuple[str, str | None, Any, str], list[Evidence]] = {}
    for one in evidence:
        groups.setdefault((one.code, one.where, one.detail, one.variant), []).append(one)
    findings: list[tuple[int, Finding]] = []
    for (code, where, detail, variant), members in groups.items():
        rule = RULES[code]
        words: type[Rule] | Variant = rule.variants[variant] if variant else rule
        layers = tuple(dict.fromkeys(one.layer for one in members))
        group = EvidenceGroup(layers, tuple([one.number for one in members]), detail, where)
        what = ((rule.in_audit if is_audit and not variant else "") or words.in_run).format(g=group)
        short = what if is_audit else (words.in_brief or words.in_run).format(g=group)
        severity = (rule.audit_severity if is_audit else None) or words.severity or rule.severity
        in_library = words.fix_in_library if library_line(where) else ""
        verdict = f"{short}: {in_library or words.short_fix}"
        finding = Finding(code, rule.title, severity, layers, where, what, in_library or words.fix, verdict)
        findings.append((sum(group.numbers), finding))
    findings.sort(key=lambda counted: (-counted[0], counted[1].code))
    return by_severity([finding for _, finding in findings])


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, the most severe first, else in their order."""
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))
