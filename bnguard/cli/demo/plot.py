"""Plot the drift that the demo measured, per layer and step."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from bnguard.cli.demo.finetune import DemoResult
from bnguard.report.plots import format_of


def draw(result: DemoResult, path: Path) -> None:
    """Draws one panel per run with one line per layer, and writes the figure to ``path``."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(result.runs), sharex=True, sharey=True)
    for axes, run in zip(panels, result.runs, strict=True):
        # Styles, because lines of two layers may lie on each other.
        for (layer, shifts), style in zip(run.drift.items(), itertools.cycle(("-", "--", ":"))):
            axes.plot(range(1, len(shifts) + 1), shifts, style, label=layer, linewidth=2)
        axes.set_title(run.name)
        axes.set_xlabel("fine-tuning step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest shift of a running mean\n(standard deviations)")
    panels[0].legend(frameon=False, loc="center right")
    figure.suptitle("Drift of a backbone frozen with requires_grad_(False)")
    figure.savefig(path, format=format_of(path), dpi=120)
