"""The results as pictures, one for each kind of benchmark: a panel for each, a line for each row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from benchmarks.results import FOLDER, Row

__all__ = ["draw"]

_OURS, _OTHERS = "#0072b2", "#999999"  # of Okabe and Ito: told apart without red and green
_TARGET: Final = "#d55e00"


def draw(rows: Sequence[Row], device: str) -> list[Path]:
    """Draws the rows, and writes ``results/<device>-<kind>.png``; returns the paths."""
    kinds = {kind: list(group) for kind, group in groupby(rows, key=lambda row: row.benchmark.partition("/")[0])}
    return [_draw(some, FOLDER / f"{device}-{kind}.png") for kind, some in kinds.items()]


def _draw(rows: Sequence[Row], path: Path) -> Path:
    panels = [list(group) for _, group in groupby(rows, key=lambda row: row.benchmark)]
    heights = [len(panel) + 1.5 for panel in panels]
    figure = Figure(figsize=(11, 0.6 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for position, row in enumerate(panel):
            ratio = row.ratio
            names_us = any([word in row.subject for word in ("frozen(", "watch(", "guard")])
            colour = _OURS if names_us or row.benchmark.endswith("/parts") else _OTHERS
            axis.plot([ratio.low, ratio.high], [position, position], color=colour, linewidth=3, alpha=0.5)
            axis.plot(ratio.median, position, "o", color=colour, markersize=5)
            axis.annotate(
                f"{ratio.median:.2f}", (ratio.high, position), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
            if row.target:
                axis.plot(row.target, position, "|", color=_TARGET, markersize=11, markeredgewidth=2)
        relation, is_ratio = panel[0].columns[0], panel[0].is_ratio
        axis.axvline(1 if is_ratio else 0, color="black", linewidth=0.7)
        references = {row.reference for row in panel}
        sign = " /" if is_ratio else ","
        labels = [row.subject if len(references) == 1 else f"{row.subject}{sign} {row.reference}" for row in panel]
        axis.set_yticks(range(len(panel)), labels, fontsize=8)
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.margins(x=0.12)
        against = f" ({relation}: {references.pop()})" if len(references) == 1 else ""
        axis.set_title(f"{panel[0].title}{against}", fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Medians and quartiles; blue: bnguard; orange: at most", fontsize=9)
    figure.savefig(path, dpi=110)
    return path
