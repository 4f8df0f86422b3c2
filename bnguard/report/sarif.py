"""Findings as SARIF 2.1.0, which code scanning of GitHub and many editors read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from bnguard import __version__
from bnguard.records import Finding
from bnguard.report.document import Document
from bnguard.report.places import Place, place_of
from bnguard.words import sentence

_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif_text(document: Document) -> str:
    """The findings of a report as one SARIF file.

    GitHub shows no result without a location, so a finding without a line has the first line of ``document.file``.
    """
    rules = {finding.code: _rule(finding) for finding in document.findings}
    driver = {"name": "bnguard", "version": __version__, "rules": list(rules.values())}
    results = [_result(finding, list(rules).index(finding.code), document.file) for finding in document.findings]
    run = {"tool": {"driver": driver}, "results": results}
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(finding: Finding) -> dict[str, Any]:
    return {
        "id": finding.code,
        "shortDescription": {"text": finding.title},
        "help": {"text": sentence(finding.fix)},
        "defaultConfiguration": {"level": finding.severity},
    }


def _result(finding: Finding, rule: int, file: str) -> dict[str, Any]:
    place = place_of(finding.where) or (Place(file, 1) if file else None)
    return {
        "ruleId": finding.code,
        "ruleIndex": rule,
        "level": finding.severity,  # which SARIF calls by the same names
        "message": {"text": f"{finding.what}. {sentence(finding.fix)}"},
        "locations": [] if place is None else [_location(place)],
    }


def _location(place: Place) -> dict[str, Any]:
    path = Path(place.file)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": place.line}}}
