"""``python -m benchmarks.transcript``: makes the README's transcript of ``bnguard run`` and its picture, anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.results import FOLDER

__all__ = ["PICTURE", "TRANSCRIPT", "main", "transcript"]

TRANSCRIPT: Final = FOLDER / "digits.txt"
PICTURE: Final = FOLDER / "digits.png"
_COMMAND: Final = ("run", "--plot", "drift.png", "digits.py")


def transcript(folder: Path) -> str:
    """Runs the command in a folder, which gets the picture, and returns what it prints."""
    (folder / "digits.py").write_text((Path(__file__).parent / "digits.py").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "bnguard", *_COMMAND]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    printed = done.stdout.replace(f"{folder.resolve()}/", "")
    return f"$ bnguard {' '.join(_COMMAND)}\n{printed}"


def main() -> None:
    """Writes both into the results."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        TRANSCRIPT.write_text(transcript(Path(name)), encoding="utf-8")
        PICTURE.write_bytes((Path(name) / "drift.png").read_bytes())
    print(f"written: {TRANSCRIPT}\nwritten: {PICTURE}")


if __name__ == "__main__":
    main()
