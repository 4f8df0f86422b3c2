"""Groups the evidence of several layers into findings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from bnguard.findings.rule import Evidence, EvidenceGroup
from bnguard.findings.rules import RULES
from bnguard.records import Finding, Severity

_ORDER: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "note": 2}


def group_evidence(evidence: Iterable[Evidence], *, is_audit: bool = False) -> tuple[Finding, ...]:
    """Makes one finding of all evidence with the same code, line and detail.

    Args:
        evidence: The evidence.
        is_audit: Whether it is that of an audit, whose sentences differ from those of a run.

    Returns:
        The findings, the most severe first, then by code, in the order of the evidence.
    """
    groups: dict[tuple[str, str | None, Any], list[Evidence]] = {}
    for one in evidence:
        groups.setdefault((one.code, one.where, one.detail), []).append(one)
    findings = []
    for (code, where, detail), members in groups.items():
        rule = RULES[code]
        layers = tuple(dict.fromkeys(one.layer for one in members))
        group = EvidenceGroup(layers, tuple([one.number for one in members]), detail, where)
        what = ((rule.in_audit if is_audit else "") or rule.in_run).format(g=group)
        short = what if is_audit else (rule.in_brief or rule.in_run).format(g=group)
        severity = (rule.audit_severity if is_audit else None) or rule.severity
        verdict = f"{short}: {rule.short_fix}"
        findings.append(Finding(code, rule.title, severity, layers, where, what, rule.fix, verdict))
    return by_severity(findings)


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, the most severe first, then by code."""
    return tuple(sorted(findings, key=lambda finding: (_ORDER[finding.severity], finding.code)))
