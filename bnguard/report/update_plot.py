"""The picture of the updates over the steps, by calling line."""

from __future__ import annotations

from collections import Counter
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bnguard.records import UpdateSeries
from bnguard.report.picture import COLOURS, SMALL, Picture, shortened, wrapped
from bnguard.words import count_text, first_of

_HATCHES: Final = ("", "//", "..", "\\\\", "xx", "--", "")  # which grey keeps
_REST: Final = "#bbbbbb"  # lines that the legend counts
_MOST_PANELS: Final = 4


def updates_picture(series: UpdateSeries) -> Picture:
    """Draws a panel for each group of layers that the same lines update, with the lines on top of each other.

    Two lines that each update a layer once a step so make 2. The updates of a line are divided by the number of layers
    that it updates, as in ``UpdateSeries.rates``.
    """
    rates = series.rates
    order = sorted(range(len(series.lines)), key=lambda line: -int(series.counts[:, line].sum()))
    groups = Counter([lines for lines in series.by_layer if lines])
    highest = {lines: float(rates[:, list(lines)].sum(dim=1).max()) for lines in groups}
    panels = sorted(groups, key=lambda lines: -float(rates[:, list(lines)].sum()))[:_MOST_PANELS]
    shown = [line for line in order[: len(COLOURS)] if any([line in lines for lines in panels])]
    busiest = max(groups, key=lambda lines: highest[lines])
    have = "has" if groups[busiest] == 1 else "have"
    of = first_of([series.lines[line] for line in busiest], 2)
    median = float(rates[:, list(busiest)].sum(dim=1).median())
    updates = "1 update" if median == 1 else f"{median:.3g} updates"
    most = "" if median == highest[busiest] else f" (the median), and up to {highest[busiest]:.3g}"
    what = f"{count_text(groups[busiest], 'layer')} {have} {updates} per optimizer step{most}"
    more = [f"and {count_text(len(order) - len(shown), 'line')} with fewer updates"] * (len(order) > len(shown))
    more += [f"and {count_text(len(groups) - len(panels), 'group')} of layers"] * (len(groups) > len(panels))
    height = 0.8 + 2.4 * len(panels) + 0.2 * (len(shown) + bool(more))

    def draw_panel(axes: Axes, lines: tuple[int, ...]) -> None:
        edges = [*series.steps, series.end]
        bottom = rates.new_zeros(len(series.steps))
        for line in sorted(lines, key=order.index):
            place = shown.index(line) if line in shown else None
            top = bottom + rates[:, line]
            axes.stairs(
                top.numpy(), edges, baseline=bottom.numpy(), fill=True, edgecolor="white", linewidth=0,
                facecolor=_REST if place is None else COLOURS[place], hatch="" if place is None else _HATCHES[place],
            )  # fmt: skip
            axes.stairs(top.numpy(), edges, baseline=None, color="black", linewidth=0.7)
            bottom = top
        axes.axhline(1, color="black", linewidth=1, linestyle="--")
        axes.set_ylim(0, max(1.2, 1.1 * highest[lines]))
        axes.set_xlim(0, series.end)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("updates per layer\nand optimizer step", fontsize=SMALL)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(count_text(groups[lines], "layer"), fontsize=SMALL, loc="right")

    def draw(figure: FigureBase) -> None:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, lines in zip(rows, panels, strict=True):
            draw_panel(axes, lines)
        rows[-1].set_xlabel("step of the layer's optimizer")
        title = f"Updates by calling line, on top of each other; plain training has 1\n{what}, from {of}"
        figure.suptitle(wrapped(title), fontsize=10, x=0.01, ha="left", parse_math=False)
        keys = [
            Patch(
                facecolor=COLOURS[place], hatch=_HATCHES[place], edgecolor="white", linewidth=0,
                label=f"{shortened(series.lines[line], 90)} ({count_text(series.layers[line], 'layer')})",
            )
            for place, line in enumerate(shown)
        ]  # fmt: skip
        legend = figure.legend(
            handles=keys, loc="outside lower left", frameon=False, fontsize=SMALL, title="; ".join(more) or None,
            title_fontsize=SMALL,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)

    return Picture("Updates over the steps", f"{what}, from {of}.", height, draw)
