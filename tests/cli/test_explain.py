"""``bnguard explain``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bnguard.cli import main
from bnguard.findings.codes import CODES
from bnguard.findings.explanations import explanation_of


def explained(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command prints."""
    assert main(["explain", *args]) == 0
    return capsys.readouterr().out


def test_a_code_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What, why it hurts, an example that can be copied, remedies, and when it is fine; in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    text = explained(capsys, "bn003")
    explanation = explanation_of("BN003")
    parts = text.split("\n\n")
    assert parts[0] == "BN003 several updates per optimizer step"
    assert parts[1].replace("\n", " ") == explanation.meaning
    heads = [part.splitlines()[0] for part in parts[2:]]
    assert [head for head in heads if not head.startswith(" ")] == [
        "Why it hurts:",
        "An example:",
        "What to do:",
        "When it is fine:",
        "Then ignore it:",
    ]
    assert "".join([f"  {line}".rstrip() + "\n" for line in explanation.example.splitlines()]) in text
    assert text.count("\n  - ") == len(explanation.remedies)
    assert " ".join(explanation.harm.split()) in " ".join(text.split())
    assert " ".join(explanation.fine.split()) in " ".join(text.split())
    assert text.endswith("  # bnguard: ignore[BN003]  as a comment on that line\n")
    assert max(map(len, text.splitlines())) <= 80


def test_every_code_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for code in CODES:
        assert max(map(len, explained(capsys, code).splitlines())) <= 80


def test_codes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With their titles."""
    assert explained(capsys).splitlines() == [f"{code}  {spec.title}" for code, spec in CODES.items()]


@pytest.mark.parametrize(("code", "nearest"), [("BN3", "BN003"), ("BN0013", "BN013"), ("bm005", "BN005")])
def test_nearest_code_is_suggested(capsys: pytest.CaptureFixture[str], code: str, nearest: str) -> None:
    """A code that does not exist is a wrong argument."""
    with pytest.raises(SystemExit) as ended:
        main(["explain", code])
    assert ended.value.code == 2
    problem = (
        f"argument CODE: unknown code {code!r}: did you mean {nearest!r}? (valid are {min(CODES)} to {max(CODES)})"
    )
    assert capsys.readouterr().err == f"bnguard explain: {problem}\nSee bnguard explain --help.\n"


def test_explaining_imports_no_torch() -> None:
    """The text comes at once."""
    code = "import sys; from bnguard.cli import main; main(['explain', 'BN001']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BN001 ")
