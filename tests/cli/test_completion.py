"""Completion for shells, as the shells themselves read it."""

import shutil
import subprocess
import sys

import pytest

from bnguard.cli import main

TRY = """
try() { COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=(); _shtab_bnguard; echo "${COMPREPLY[*]}"; }
"""


def printed(capsys, shell):
    """The completion for a shell."""
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], {"run", "audit", "diff", "explain", "demo"}),
        (["ru"], {"run"}),
        (["run", "--on"], {"--on-change"}),
        (["run", "--on-change", ""], {"raise", "warn", "restore"}),
        (["run", "tra"], {"train.py"}),
        (["run", "--json", "tra"], {"train.py"}),
        (["diff", "tra"], {"train.py"}),
        (["explain", "BN00"], {f"BN00{number}" for number in range(1, 10)}),
    ],
)
def test_bash_completes(capsys, tmp_path, words, expected):
    """Commands, options, their values, files and codes."""
    (tmp_path / "train.py").write_text("")
    script = f"{printed(capsys, 'bash')}\n{TRY}\ntry bnguard {' '.join(word or chr(39) * 2 for word in words)}\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_valid(capsys, shell):
    """The shell parses it; without the shell, it names at least every command and option."""
    text = printed(capsys, shell)
    for word in ("run", "audit", "diff", "explain", "demo", "on-change", "print-completion"):
        assert word in text
    if shell != "bash":
        assert "look at a model without running it" in text
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=text, text=True, check=True)


def test_missing_package_is_one_sentence(monkeypatch, capsys):
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 2
    line = "bnguard: --print-completion needs shtab: pip install 'bnguard[completion]'\n"
    assert capsys.readouterr() == ("", f"{line}See bnguard --help.\n")
