"""The rows of the tables, and the files they are written to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.race import Race, Spread

__all__ = ["Benchmark", "Row", "compared", "environment", "from_json", "line", "to_json", "write"]

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        benchmark: The key that ``python -m benchmarks`` takes.
        title: What that measures.
        subject: What was measured.
        reference: What it is divided by; or, where the title ends with "more", what is taken off.
        ratio: The figure: a ratio, or that difference in the unit of the title.
        target: What it should be at most; None where it is given for comparison.
    """

    benchmark: str
    title: str
    subject: str
    reference: str
    ratio: Spread
    target: float | None = None

    @property
    def is_difference(self) -> bool:
        """Whether the figure says by how much, and not how many times."""
        return self.title.endswith(" more")

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
    return Row(**{**item, "ratio": Spread(**item["ratio"])})


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
        "how much more one takes, where the title says so: the median of the rounds, and their quartiles. A round of",
        "whole nets is one step of each. A target is met by the median, or within the noise by the lower quartile.",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    tables = []
    for key, group in groupby(rows, key=lambda row: row.benchmark):
        some = list(group)
        tables += ["", f"## {some[0].title}", "", f"`python -m benchmarks {key}`", ""]
        columns = "more than | by" if some[0].is_difference else "divided by | ratio"
        tables += [f"| what | {columns} | quartiles | target | |", "| --- | --- | --- | --- | --- | --- |"]
        tables += [line(row) for row in some]
    notes = ["", "## Not measured", "", *[f"- {reason}" for reason in skipped]] if skipped else []
    FOLDER.mkdir(exist_ok=True)
    markdown, data = FOLDER / f"{device}.md", FOLDER / f"{device}.json"
    markdown.write_text("\n".join([*head, *tables, *notes]) + "\n", encoding="utf-8")
    content = {"environment": about, "rows": list(map(to_json, rows)), "not_measured": list(skipped)}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return markdown, data
