"""What a run ignores: entries of the command line or of ``pyproject.toml``, and comments in the files that ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from bnguard.findings.comments import comments_in
from bnguard.findings.ignores import FilteredFindings, Ignore, filter_findings
from bnguard.records import Finding
from bnguard.report.places import path_from, place_of
from bnguard.torch_internals.callsite import origin_of


class RunIgnores:
    """The entries of one run.

    Args:
        entries: Those of the command line or of ``pyproject.toml``.

    Attributes:
        folder: The working directory when the run began.
    """

    def __init__(self, entries: Sequence[Ignore]) -> None:
        self._entries = entries
        self.folder = os.getcwd()  # which the script may change

    def filter(self, findings: Sequence[Finding]) -> FilteredFindings:
        """Takes out the findings that are meant. Reads the files that the script has loaded so far."""
        loaded = _loaded_files()
        comments = [
            comments_in(path, path_from(self.folder, path)) for path in sorted({*loaded, *self._files_of(findings)})
        ]
        ignores = [*self._entries, *[one for comment in comments for one in comment.ignores]]
        problems = tuple([problem for comment in comments for problem in comment.problems])
        filtered = filter_findings(findings, ignores, self.folder, loaded)
        return filtered._replace(problems=problems)

    def _files_of(self, findings: Iterable[Finding]) -> list[str]:
        """The files of some findings, which may be those of a library."""
        places = [place_of(finding.where) for finding in findings]
        return [os.path.normpath(os.path.join(self.folder, place.file)) for place in places if place is not None]


def _loaded_files() -> set[str]:
    """The files of the user's code that this process has loaded."""
    # Not getattr(): a module that loads its parts when they are asked for, as that of six, may fail to.
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    files = [vars(module).get("__file__") for module in modules]
    sources = [file for file in files if isinstance(file, str) and file.endswith(".py")]
    return {os.path.abspath(file) for file in sources if origin_of(file) == "user"}
