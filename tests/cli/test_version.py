"""``bnguard --version``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bnguard
from bnguard.cli import main
from bnguard.layers import kinds


def version(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_version_names_a_known_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """The torch that the suite runs with is known."""
    known = f"torch {torch.__version__} (its normalisation layers are known)"
    assert version(capsys) == f"bnguard {bnguard.__version__}, {known}\n"


def test_version_says_what_follows_from_an_unknown_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are guarded all the same."""
    monkeypatch.setattr(kinds, "is_known", lambda function: function is not torch.nn.BatchNorm2d.forward)
    unknown = "(its normalisation layers are not known: they are compared after each forward, which is slower)"
    assert version(capsys) == f"bnguard {bnguard.__version__}, torch {torch.__version__} {unknown}\n"


def test_version_without_torch() -> None:
    """It is said; nothing fails."""
    code = "import sys; sys.modules['torch'] = None; from bnguard.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"bnguard {bnguard.__version__}, torch is not installed\n"
