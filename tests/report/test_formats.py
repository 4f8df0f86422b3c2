"""Findings as annotations of GitHub and as SARIF."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bnguard.records import Finding, Severity
from bnguard.report.document import Document
from bnguard.report.formats import formatted
from bnguard.report.github import annotation
from bnguard.report.places import Place, path_from, place_of

WHERE = "src/a b.py:42 in train_step"


def finding(code: str = "BN002", where: str | None = WHERE, severity: Severity = "warning") -> Finding:
    """A finding with some texts."""
    return Finding(code, f"title of {code}", severity, ("bn",), where, "50% of it: moved", "call eval()", "verdict")


def document(*findings: Finding, file: str = "") -> Document:
    """A report with some findings."""
    return Document("", "summary", findings, (), file=file)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("train.py:42 in train_step", Place("train.py", 42)),
        ("/a/b:c.py:3 in <module>", Place("/a/b:c.py", 3)),
        ("<stdin>:1 in <module>", Place("<stdin>", 1)),
        ("DDP broadcast at forward", None),
        (None, None),
    ],
)
def test_place_is_read_out_of_a_text(where: str | None, place: Place | None) -> None:
    """The file may have a colon; what is no line has no place."""
    assert place_of(where) == place


def test_paths_are_relative_inside_the_folder() -> None:
    """Else they stay as they are; no path stays none."""
    assert path_from("/a", "/a/b/c.py") == "b/c.py"
    assert path_from("/a", "/b/c.py") == "/b/c.py"
    assert path_from("/a", "") == ""


@pytest.mark.parametrize(("severity", "kind"), [("error", "error"), ("warning", "warning"), ("note", "notice")])
def test_finding_is_an_annotation_at_its_line(severity: Severity, kind: str) -> None:
    """What GitHub would take for a part of the command is escaped, other in properties than in the text."""
    assert formatted(document(finding(severity=severity)), "github") == (
        f"::{kind} file=src/a b.py,line=42,title=BN002 title of BN002::50%25 of it: moved.%0ACall eval()."
    )


def test_annotation_without_a_line() -> None:
    """It has a title all the same; without that, no property."""
    assert annotation("error", "a,b:c\r\n", None, "50%: a,b") == "::error title=50%25%3A a%2Cb::a,b:c%0D%0A"
    assert annotation("notice", "text", None) == "::notice::text"


def test_annotations_are_lines() -> None:
    """One for each finding; none for none."""
    assert formatted(document(finding("BN001"), finding("BN002")), "github").count("\n") == 1
    assert formatted(document(), "github") == ""


def sarif(*findings: Finding, file: str = "") -> dict[str, Any]:
    """The only run of the SARIF file of some findings."""
    content = json.loads(formatted(document(*findings, file=file), "sarif"))
    assert content["version"] == "2.1.0"
    assert content["$schema"].endswith("sarif-2.1.0.json")
    (run,) = content["runs"]
    assert run["tool"]["driver"]["name"] == "bnguard"
    return dict(run)


def test_finding_is_a_result_of_sarif() -> None:
    """With what the schema requires of it, and a rule for each code once."""
    run = sarif(finding("BN012", severity="error"), finding("BN002"), finding("BN012", "b.py:1 in f", severity="note"))
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["BN012", "BN002"]
    assert [rules[result["ruleIndex"]]["id"] for result in run["results"]] == ["BN012", "BN002", "BN012"]
    assert [result["ruleId"] for result in run["results"]] == ["BN012", "BN002", "BN012"]
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]
    assert rules[1]["shortDescription"] == {"text": "title of BN002"}
    result = run["results"][1]
    assert result["message"] == {"text": "50% of it: moved. Call eval()."}
    assert result["locations"] == [
        {"physicalLocation": {"artifactLocation": {"uri": "src/a%20b.py"}, "region": {"startLine": 42}}}
    ]


def test_sarif_without_findings_is_a_file_too() -> None:
    """Code scanning closes its alerts by it."""
    run = sarif()
    assert (run["results"], run["tool"]["driver"]["rules"]) == ([], [])


def test_places_of_sarif() -> None:
    """An absolute path is a URI of its own; a finding without a line is at the beginning of the program."""

    def places(where: str | None, file: str = "") -> list[tuple[str, int]]:
        locations = [
            place["physicalLocation"] for place in sarif(finding(where=where), file=file)["results"][0]["locations"]
        ]
        return [(place["artifactLocation"]["uri"], place["region"]["startLine"]) for place in locations]

    assert places("/a b/c.py:3 in f") == [("file:///a%20b/c.py", 3)]
    assert places(None, "train.py") == [("train.py", 1)]
    assert places(WHERE, "train.py") == [("src/a%20b.py", 42)]
    assert places(None) == []


def test_formats_are_known_without_torch() -> None:
    """Usage and help appear at once."""
    code = "import sys, bnguard.report.formats; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
