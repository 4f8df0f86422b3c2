"""``python -m tests.versions 2.8.0``: runs the core tests under this torch and adds a row to the table of versions."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.versions.environment import ROOT, Environment, Packages
from tests.versions.table import TABLE, Row, read_junit, read_table, write_table

# What depends on torch. Integrations, examples and packaging are tested with the pinned versions.
CORE = ("guard", "layers", "torch_internals", "recording", "findings", "report", "cli", "pytest_plugin")


def main() -> int:
    """The command; 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("torch", nargs="?", default="", help="such as 2.8.0; default: the one that pip takes")
    parser.add_argument("--python", default=sys.executable, help="the interpreter; default: this one")
    parser.add_argument("--packages", choices=("pinned", "floor", "newest"), default="pinned",
                        help="the other packages: the oldest that setup.cfg allows, or the newest")  # fmt: skip
    parser.add_argument(
        "--full", action="store_true", help="install the libraries for CUDA that torch asks for as well"
    )
    parser.add_argument("--find-links", action="append", default=[], help="where pip looks for archives, too")
    parser.add_argument("--keep", type=Path, help="keep the environment here, or use the one that is here")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table (benchmarks/results/versions.md)")
    parser.add_argument("--tests", nargs="+", help="run these, and leave the table as it is; default: the core")
    parser.add_argument("--dry-run", action="store_true", help="leave the table as it is")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = Environment(folder.absolute())
        if not environment.python.exists():
            environment.make(
                options.python, options.torch, options.packages, is_full=options.full, find_links=options.find_links
            )
        if missing := environment.missing(options.packages):
            parser.error(f"{folder} lacks {', '.join(missing)}: remove it, and it is made anew")
        if not options.torch:
            environment.list_versions("torch")
        row = run(environment, options.packages, options.tests or [f"tests/{name}" for name in CORE])
    rows = read_table(options.table)
    if not options.tests and not options.dry_run:
        write_table([*rows, row], options.table)
    print(row)
    if rows and row.torch_numbers > max(row.torch_numbers for row in rows):
        print("newer than every torch in the table: not an error")
        return 0
    return 1 if row.failed or not row.passed else 0


def run(environment: Environment, packages: Packages, tests: list[str]) -> Row:
    """Runs tests in an environment."""
    version = environment.output("import torch; print(torch.__version__)")
    python = environment.output("import platform; print(platform.python_version())")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, "PATH": path})
        passed, failed, skipped = read_junit(report)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Row(version, environment.build(), python, packages, today, passed, failed, skipped)


if __name__ == "__main__":
    sys.exit(main())
