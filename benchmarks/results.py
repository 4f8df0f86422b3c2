"""The rows of the tables, and the files they are written to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.race import Race, Spread

__all__ = [
    "Benchmark", "Conditions", "Row", "compared", "conditions", "environment", "from_json", "line", "to_json", "write",
]  # fmt: skip

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Conditions:
    """When a figure was measured, and how busy the machine was.

    Attributes:
        date: In ISO format.
        load: Processes that ran or waited, on average over a minute, the benchmark included.
    """

    date: str
    load: float

    def __str__(self) -> str:
        return f"measured on {self.date} at a load of {self.load:.1f}"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        benchmark: The key that ``python -m benchmarks`` takes.
        title: What that measures.
        subject: What was measured.
        reference: What it is divided by; or, where the title ends with "more", what is taken off; or, where it ends
            with "a layer", how many layers there were.
        ratio: The figure: a ratio, or that difference or time in the unit of the title.
        target: What it should be at most; None where it is given for comparison.
        conditions: Under which it was measured; None in results of versions that did not note them.
    """

    benchmark: str
    title: str
    subject: str
    reference: str
    ratio: Spread
    target: float | None = None
    conditions: Conditions | None = None

    @property
    def columns(self) -> tuple[str, str]:
        """What the reference is to the subject, and what the figure is."""
        if self.title.endswith(" more"):
            return "more than", "by"
        return ("among", "takes") if self.title.endswith(" a layer") else ("divided by", "ratio")

    @property
    def is_ratio(self) -> bool:
        """Whether the figure is without a unit."""
        return self.columns[1] == "ratio"

    @property
    def verdict(self) -> str:
        """Whether the target is met: by the median, or within the noise."""
        if self.target is None:
            return ""
        if self.ratio.median <= self.target:
            return "met"
        return "within noise" if self.ratio.low <= self.target else "missed"


Benchmark: TypeAlias = Callable[[], list[Row]]


def compared(
    benchmark: str, title: str, result: Race, reference: str, targets: Mapping[str, float] | None = None
) -> list[Row]:
    """A row for each contender but ``reference``, which they are divided by."""
    targets = targets or {}
    others = [name for name in result.seconds if name != reference]
    return [Row(benchmark, title, name, reference, result.ratio(name, reference), targets.get(name)) for name in others]


def conditions() -> Conditions:
    """Those of this minute."""
    return Conditions(date.today().isoformat(), os.getloadavg()[0])


def environment(device: str) -> dict[str, object]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device, "name": name, "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "threads": "1 unless the row says otherwise",
    }  # fmt: skip


def to_json(row: Row) -> dict[str, Any]:
    """A row as the data of a JSON file."""
    return {**asdict(row), "verdict": row.verdict}


def from_json(item: dict[str, Any]) -> Row:
    """The row again."""
    item = {key: value for key, value in item.items() if key != "verdict"}
    noted = item.get("conditions")
    return Row(**{**item, "ratio": Spread(**item["ratio"]), "conditions": Conditions(**noted) if noted else None})


def line(row: Row) -> str:
    """One row as Markdown."""
    ratio, target = row.ratio, "" if row.target is None else f"{row.target:g}"
    band = f"{ratio.low:.3f} to {ratio.high:.3f}"
    return f"| {row.subject} | {row.reference} | {ratio.median:.3f} | {band} | {target} | {row.verdict} |"


def write(device: str, rows: Sequence[Row], skipped: Iterable[str]) -> tuple[Path, Path]:
    """Writes ``results/<device>.md`` and ``.json``; returns their paths."""
    about = environment(device)
    head = [
        f"# What bnguard costs: {device}",
        "",
        "Written by `python -m benchmarks`. Each figure is a ratio of two things that took turns in one process, or",
        "how much more one takes, or its time, where the title says so: the median of the rounds, and their quartiles.",
        "A round of whole nets is one step of each. A target is met by the median, or within the noise by the lower",
        "quartile. The load is the average over the last minute, of which the benchmark itself is up to 1.",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    tables = []
    for key, group in groupby(rows, key=lambda row: row.benchmark):
        some = list(group)
        noted = "" if some[0].conditions is None else f", {some[0].conditions}"
        tables += ["", f"## {some[0].title}", "", f"`python -m benchmarks {key}`{noted}", ""]
        columns = " | ".join(some[0].columns)
        tables += [f"| what | {columns} | quartiles | target | |", "| --- | --- | --- | --- | --- | --- |"]
        tables += [line(row) for row in some]
    notes = ["", "## Not measured", "", *[f"- {reason}" for reason in skipped]] if skipped else []
    FOLDER.mkdir(exist_ok=True)
    markdown, data = FOLDER / f"{device}.md", FOLDER / f"{device}.json"
    markdown.write_text("\n".join([*head, *tables, *notes]) + "\n", encoding="utf-8")
    content = {"environment": about, "rows": list(map(to_json, rows)), "not_measured": list(skipped)}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return markdown, data
