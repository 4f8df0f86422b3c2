"""Entries and comments that ignore findings: what they match, and what cannot be read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bnguard.findings.codes import CODES, checked_code
from bnguard.findings.comments import comments_in
from bnguard.findings.ignores import filter_findings, parse_ignore, with_ignored
from bnguard.records import Finding
from bnguard.report.document import Document

HERE = "/project"


def finding(code: str = "BN003", where: str | None = "src/gan.py:40 in train_step") -> Finding:
    """A finding with some texts."""
    return Finding(code, "title", "warning", ("bn",), where, "what", "fix", "verdict")


@pytest.mark.parametrize(
    ("entry", "matched"),
    [
        ("BN003", True),
        ("bn003", True),
        ("BN003:gan.py", True),
        ("BN003:src/gan.py", True),
        ("BN003:./src/gan.py", True),
        ("BN003:src/*.py", True),
        ("BN003:project/src/gan.py", True),
        (f"BN003:{HERE}/src/gan.py", True),
        ("BN003:gan.py:40", True),
        (":gan.py", True),
        (":gan.py:40", True),
        ("gan.py", True),
        ("gan.py:40", True),
        ("*.py", True),
        (" BN003 : gan.py : 40 ", True),
        ("BN002", False),
        ("BN002:gan.py:40", False),
        ("BN003:an.py", False),
        ("BN003:GAN.py", False),
        ("BN003:src", False),
        ("BN003:other/gan.py", False),
        ("BN003:gan.py:4", False),
        ("BN003:gan.py:41", False),
        ("gan.py:400", False),
    ],
)
def test_entry_matches_code_file_and_line(entry: str, matched: bool) -> None:
    """Each part narrows it down: the file is a pattern on the relative path or on the end of the path."""
    filtered = filter_findings([finding()], [parse_ignore(entry, "command line")], HERE)
    assert (filtered.kept == ()) is matched
    assert (filtered.unused == ()) is matched
    assert [str(ignore) for _, ignore in filtered.ignored] == [f"{entry.strip()} (command line)"] * matched


@pytest.mark.parametrize(("entry", "matched"), [("BN007", True), ("BN007:gan.py", False), ("*", False)])
def test_finding_without_a_line_is_ignored_by_its_code_alone(entry: str, matched: bool) -> None:
    """It is in no file."""
    filtered = filter_findings([finding("BN007", None)], [parse_ignore(entry, "command line")], HERE)
    assert (filtered.kept == ()) is matched


def test_all_entries_that_match_are_used() -> None:
    """None of two that match the same finding is called unused; the first is named."""
    ignores = [parse_ignore(entry, "pyproject.toml") for entry in ("gan.py", "BN003", "BN006")]
    filtered = filter_findings([finding(), finding("BN002", "a.py:1 in f")], ignores, HERE)
    assert filtered.kept == (finding("BN002", "a.py:1 in f"),)
    assert [str(one) for one in filtered.unused] == ["BN006 (pyproject.toml)"]
    (ignored,) = filtered.content()["ignored"]
    assert (ignored["code"], ignored["ignored_by"]) == ("BN003", "gan.py (pyproject.toml)")


def test_report_counts_what_is_ignored() -> None:
    """One line for each entry without effect; nothing is added where there is no entry."""
    document = Document("", "no finding", (), (), notes=("earlier",))
    ignores = [parse_ignore(entry, "command line") for entry in ("BN003", "BN006", "x.py:3")]
    filtered = filter_findings([finding(), finding(where="b.py:1 in f")], ignores, HERE)
    told = with_ignored(document, filtered)
    assert told.summary == "no finding; 2 findings ignored"
    assert told.notes == ("earlier", "Unused ignore: BN006 (command line)\nUnused ignore: x.py:3 (command line)")
    assert with_ignored(document, filter_findings([finding()], [], HERE)) == document


def test_relative_path_of_a_program_that_changed_its_folder() -> None:
    """The only file of the program that ends so is meant."""
    entry = [parse_ignore("BN003:/project/src/gan.py", "command line")]
    moved = finding(where="project/src/gan.py:40 in train_step")
    assert filter_findings([moved], entry, "/project/src", ["/project/src/gan.py"]).kept == ()
    files = ["/a/project/src/gan.py", "/b/project/src/gan.py"]
    exact = [parse_ignore("BN003:/a/project/src/gan.py", "command line")]
    assert filter_findings([moved], exact, "/c", files).kept == (moved,)


FORMS = "write CODE, CODE:FILE, CODE:FILE:LINE, FILE or FILE:LINE, such as BN003:gan.py:40"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("", f"cannot read '': {FORMS}"),
        (":", f"cannot read ':': {FORMS}"),
        ("BN003:", f"cannot read 'BN003:': {FORMS}"),
        ("BN003:a.py:1:2", f"cannot read 'BN003:a.py:1:2': {FORMS}"),
        ("BN003:40", f"line 40 of 'BN003:40' has no file: {FORMS}"),
        (":40", f"line 40 of ':40' has no file: {FORMS}"),
        ("BN003::40", f"cannot read 'BN003::40': {FORMS}"),
        ("gan.py:0", "the line of 'gan.py:0' must be a positive integer, got '0'"),
        ("gan.py:last", "the line of 'gan.py:last' must be a positive integer, got 'last'"),
        ("BN999", "unknown code 'BN999': "),
        ("gan", f"unknown code 'gan': valid are BN001 to {max(CODES)}"),
        ("BN3:gan.py", "unknown code 'BN3': did you mean 'BN003'? (valid are "),
        ("BM003", "unknown code 'BM003': did you mean 'BN003'? (valid are "),
    ],
)
def test_entry_that_cannot_be_read_is_refused(entry: str, problem: str) -> None:
    """Value, rule, and what is right."""
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        parse_ignore(entry, "command line")


def test_codes_are_checked() -> None:
    """In either case; nothing else is a code."""
    assert checked_code("bn015") == "BN015"
    with pytest.raises(ValueError, match=re.escape("unknown code 'bn15': did you mean 'BN015'?")):
        checked_code("bn15")


SOURCE = '''\
net(x)  # bnguard: ignore[BN002]
loss(
    net(x),  # any reason first  # bnguard: ignore[BN002, bn003]
    net(y),
)
for x in load(
    net(y),
):  # bnguard: ignore[BN003]
    net(x); net(y)  # bnguard:ignore
text = "# bnguard: ignore[BN001]"
# bnguard: ignored
match net(x):
    case 1:  # bnguard: ignore [BN004]
        pass
x = """
# bnguard: ignore
"""
'''


def test_comments_are_about_their_statements(tmp_path: Path) -> None:
    """All lines of a simple statement, one line of another; a string and another word are no comments."""
    path = tmp_path / "a[1].py"
    path.write_text(SOURCE)
    comments = comments_in(str(path), "a.py")
    assert comments.problems == ()
    assert [(str(one), one.code, one.lines) for one in comments.ignores] == [
        ("BN002 (a.py:1)", "BN002", range(1, 2)),
        ("BN002 (a.py:3)", "BN002", range(2, 6)),
        ("BN003 (a.py:3)", "BN003", range(2, 6)),
        ("BN003 (a.py:8)", "BN003", range(8, 9)),
        ("# bnguard:ignore (a.py:9)", None, range(9, 10)),
        ("BN004 (a.py:13)", "BN004", range(13, 14)),
    ]
    findings = [finding("BN002", f"{name}:{line} in f") for name in ("a[1].py", "b/a[1].py") for line in (4, 8)]
    filtered = filter_findings(findings, comments.ignores, str(tmp_path))
    assert filtered.kept == tuple(findings[1:])


@pytest.mark.parametrize(
    ("comment", "problem"),
    [
        ("ignore[BN02]", "a.py:1: unknown code 'BN02': did you mean 'BN002'? (valid are BN001 to "),
        ("ignore[]", "a.py:1: unknown code '': valid are BN001 to "),
        ("ignore[BN002", "a.py:1: 'ignore[BN002' has no closing bracket; the comment has no effect"),
    ],
)
def test_comment_that_cannot_be_read_has_no_effect(tmp_path: Path, comment: str, problem: str) -> None:
    """It is told, and does not ignore more than was meant."""
    (tmp_path / "a.py").write_text(f"net(x)  # bnguard: {comment}\n")
    comments = comments_in(str(tmp_path / "a.py"), "a.py")
    assert comments.ignores == ()
    (told,) = comments.problems
    assert told.startswith(problem)


@pytest.mark.parametrize(
    "content", [b"x = (  # bnguard: ignore\n", b"\xff # bnguard: ignore\n", b"\0 # bnguard: ignore"]
)
def test_file_that_is_no_python_has_no_comments(tmp_path: Path, content: bytes) -> None:
    """Neither has one that is gone."""
    (tmp_path / "a.py").write_bytes(content)
    assert comments_in(str(tmp_path / "a.py"), "a.py").ignores == ()
    assert comments_in(str(tmp_path / "b.py"), "b.py").ignores == ()


def test_entries_are_read_without_torch() -> None:
    """So that a wrong one is told at once."""
    code = "import sys, bnguard.findings.comments, bnguard.findings.ignores; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
