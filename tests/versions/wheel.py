"""``python -m tests.versions.wheel``: builds what is published, and runs the quickstart with nothing else."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.readme import PAGES, code, is_suite
from tests.versions.environment import CONSTRAINTS, ROOT, Environment


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises where a step fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions.wheel", description=__doc__.partition(": ")[2])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the wheel and the source archive there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = build(folder)
        wheel = next(path for path in archives if path.suffix == ".whl")
        assert others_in(wheel) == set(), "the wheel holds the package alone"
        user = Environment(folder / "user")
        user.create(sys.executable)
        user.pip(str(wheel), "--constraint", str(CONSTRAINTS))
        empty = folder / "empty"
        empty.mkdir()
        (empty / "quickstart.py").write_text(quickstart(), encoding="utf-8")
        subprocess.run([user.python, "quickstart.py"], cwd=empty, check=True)
        subprocess.run([user.python, "-m", "bnguard", "--version"], cwd=empty, check=True)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            for archive in archives:
                shutil.copy2(archive, options.keep)
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


def others_in(wheel: Path) -> set[str]:
    """What a wheel would install beside ``bnguard`` and its metadata: documentation, tests and benchmarks are not."""
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
    return {folder for folder in folders if folder != "bnguard" and not folder.endswith(".dist-info")}


def quickstart() -> str:
    """The blocks of the page, one after the other; the complete test file is for pytest."""
    return "\n".join([block for block in code(PAGES["docs/quickstart.md"]) if not is_suite(block)])


if __name__ == "__main__":
    sys.exit(main())
