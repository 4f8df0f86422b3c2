"""``python -m tests.versions.wheel``: builds what is published, and runs the quickstart with nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.readme import PAGES, code, is_suite
from tests.versions.environment import CONSTRAINTS, ROOT, Environment


def main() -> int:
    """The command; raises where a step fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = build(folder)
        wheel = next(path for path in archives if path.suffix == ".whl")
        user = Environment(folder / "user")
        user.create(sys.executable)
        user.pip(str(wheel), "--constraint", str(CONSTRAINTS))
        empty = folder / "empty"
        empty.mkdir()
        (empty / "quickstart.py").write_text(quickstart(), encoding="utf-8")
        subprocess.run([user.python, "quickstart.py"], cwd=empty, check=True)
        subprocess.run([user.python, "-m", "bnguard", "--version"], cwd=empty, check=True)
    return 0


def build(folder: Path) -> list[Path]:
    """Builds the wheel and the source archive, and has twine read them as the index does."""
    tools = Environment(folder / "tools")
    tools.create(sys.executable)
    tools.pip("build", "twine")
    subprocess.run([tools.python, "-m", "build", "--outdir", folder / "dist", ROOT], check=True)
    archives = sorted((folder / "dist").iterdir())
    subprocess.run([tools.python, "-m", "twine", "check", "--strict", *archives], check=True)
    return archives


def quickstart() -> str:
    """The blocks of the page, one after the other; the complete test file is for pytest."""
    return "\n".join([block for block in code(PAGES["docs/quickstart.md"]) if not is_suite(block)])


if __name__ == "__main__":
    sys.exit(main())
