"""The switches of the command line and of the configuration file."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, TypeAlias, cast

import pytest

from bnguard.pytest_plugin.report import REPORTS
from bnguard.words import suggestion

Wanted: TypeAlias = Literal["raise", "no-grad", "warn", "off"]
_WANTED: Final = ("raise", "no-grad", "warn", "off")


@dataclasses.dataclass(frozen=True, slots=True)
class Switches:
    """The command line and the configuration file.

    Attributes:
        on_change: What to do about an update in any test.
        place: Where ``on_change`` was given, for messages.
        report: Where to write a report: ``"terminal"``, ``"github"`` or the path of a JSON file; None for no report.
        may_update: Patterns of test files whose tests may update.
    """

    on_change: Wanted
    place: str
    report: str | None
    may_update: list[str]

    @property
    def reports(self) -> bool:
        """Whether to write a report."""
        return self.report is not None

    @property
    def sees_every_model(self) -> bool:
        """Whether to see every model that runs."""
        return self.on_change != "off" or self.reports


def add_switches(parser: pytest.Parser) -> None:
    """Adds the switches to the command line and the configuration file."""
    group = parser.getgroup("bnguard", "running statistics of BatchNorm layers (bnguard)")
    group.addoption(
        "--bn-frozen",
        choices=_WANTED,
        help="Fail every test that moves the running statistics of any model ('raise'), or only those in which a "
        "forward without gradients does ('no-grad'), or warn about it ('warn'); 'off' overrides the configuration "
        "file. Tests marked bn_updates may move them.",
    )
    group.addoption(
        "--bn-report",
        nargs="?",
        const="terminal",
        metavar="FILE.json|github",
        help="List which tests moved the running statistics of which layers, how often and from which line: in the "
        "summary, in a JSON file, or as annotations of GitHub.",
    )
    parser.addini(
        "bn_updates", "Patterns of test files, such as tests/train/*: their tests may move running statistics.",
        type="linelist", default=[],
    )  # fmt: skip
    parser.addini("bn_frozen", "As --bn-frozen: what to do about tests that move running statistics.", default="off")


def read_switches(config: pytest.Config) -> Switches:
    """What they say.

    Raises:
        pytest.UsageError: There is no such value.
    """
    in_file = str(config.getini("bn_frozen")).strip() or "off"
    if in_file not in _WANTED:
        raise pytest.UsageError(f"{config.inipath}: bn_frozen = {in_file}: {suggestion(in_file, _WANTED)}")
    on_line = config.getoption("bn_frozen")
    place = f"--bn-frozen={on_line}" if on_line else f"bn_frozen = {in_file}"
    report = config.getoption("bn_report")
    if report is not None and report not in REPORTS and not report.endswith(".json"):
        raise pytest.UsageError(
            f"--bn-report={report}: give github or the path of a .json file; to test {report}, put it before "
            "--bn-report"
        )
    return Switches(cast("Wanted", on_line or in_file), place, report, config.getini("bn_updates"))
