"""Pictures of drift and updates. The colours can be distinguished with colour blindness, and in grey."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from bnguard.records import Drift, DriftSeries, UpdateSeries
from bnguard.words import count_text, name_text

_WIDTH: Final = 10.0  # inches
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
_STYLES: Final = ("-", "--", "-.", ":")
_BEFORE, _AFTER = "#999999", "#0072b2"
_SMALL: Final = 8.0  # points
_SPAN: Final = 1e3  # smaller values than the largest divided by this share one colour
_BROKEN: Final = "#d55e00"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and the function that draws it.

    Attributes:
        title: What it shows.
        description: What it shows, in one sentence with the numbers: the alternative text.
        height: In inches; all pictures have the same width.
        draw: Draws it onto a figure.
    """

    title: str
    description: str
    height: float
    draw: Callable[[FigureBase], None]


def watch_pictures(drift: Sequence[Drift], series: DriftSeries, updates: UpdateSeries) -> list[Picture]:
    """Drift over the steps, updates by line over the steps, and the channels of the layer that moved most."""
    pictures = []
    if bool((series.divergence > 0).any()):
        pictures.append(_heat_map(series))
    if updates.lines:
        pictures.append(_updates(updates))
    return pictures + _channels_of_the_biggest_mover(drift)


def diff_pictures(drift: Sequence[Drift]) -> list[Picture]:
    """Divergence by layer, and the channels of the layer that moved most."""
    moved = [one for one in drift if one.has_moved]
    return [*([_bars(moved)] if moved else []), *_channels_of_the_biggest_mover(drift)]


def problem_with_format(path: Path) -> str | None:
    """Why no picture can be of the format that a path asks for, or None."""
    formats = Figure().canvas.get_supported_filetypes()
    if format_of(path) in formats:
        return None
    known = ", ".join([f".{one}" for one in ("png", "svg", "pdf", *sorted({*formats} - {"png", "svg", "pdf"}))])
    return f"expected a name that ends in {known}, got {path.name!r}"


def save(pictures: Sequence[Picture], path: Path) -> None:
    """Draws pictures below each other, and writes them as one file."""
    heights = [picture.height for picture in pictures]
    with _our_style():
        figure = Figure(figsize=(_WIDTH, sum(heights) or 1.0), layout="constrained")
        if not pictures:
            figure.text(0.5, 0.5, "nothing moved", ha="center", va="center")
        else:
            parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
            for picture, part in zip(pictures, parts, strict=True):
                picture.draw(part)
        figure.savefig(path, format=format_of(path), dpi=120)


def as_svg(picture: Picture) -> str:
    """Draws one picture as SVG; the same picture gives the same text."""
    text = io.StringIO()
    with _our_style():
        figure = Figure(figsize=(_WIDTH, picture.height), layout="constrained")
        picture.draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


@contextmanager
def _our_style() -> Iterator[None]:
    """Whatever style, device and warnings a script has chosen for itself."""
    with rc_context(), warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        rcdefaults()
        rcParams["svg.hashsalt"] = "bnguard"  # the same ids each time
        yield


def format_of(path: Path) -> str:
    """The format that a path asks for; PNG where it has no suffix."""
    return path.suffix[1:].lower() or "png"


# Drift over the steps.


def _heat_map(series: DriftSeries) -> Picture:
    values = series.divergence
    rows = [number for number in range(len(series.layers)) if not bool(values[:, number].isnan().all())]
    values = values[:, rows]
    layers = [name_text(series.layers[row]) for row in rows]
    titles = [_shortened(layer, 60) for layer in layers]
    column, step = _where_largest(values)
    is_broken = bool(values.isinf().any())
    if is_broken:
        sentence = f"layer {titles[column]} is broken (NaN or infinite) from optimizer step {series.steps[step]} on"
    else:
        sentence = (
            f"layer {titles[column]} moved most: {float(values[step, column]):.3g} nats at optimizer step "
            f"{series.steps[step]}, its mean by {float(series.mean_shift[step, rows[column]]):.3g} standard deviations"
        )
    finite = values[values.isfinite()]
    largest = max(float(finite.max()) if len(finite) else 0.0, 1e-12)
    height = 1.7 + _height_of(len(layers))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        image = axes.pcolormesh(
            _edges(series.steps),
            range(len(layers) + 1),
            values.clamp(largest / _SPAN, 10 * largest).T.numpy(),  # infinite ones would be left out
            norm=LogNorm(largest / _SPAN, largest),
            cmap=colormaps["cividis"].with_extremes(bad="#ffffff", over=_BROKEN),
            rasterized=True,
        )
        _name_rows(axes, [row + 0.5 for row in range(len(layers))], layers, column)
        axes.set_ylim(len(layers), 0)
        axes.set_xlabel("optimizer step, of all optimizers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _entitle(axes, f"Drift from the beginning\n{sentence}")
        axes.plot(
            series.steps[step], column + 0.5, "o", markersize=11, markerfacecolor="none", markeredgecolor=_COLOURS[1],
            markeredgewidth=2, clip_on=False,
        )  # fmt: skip
        if not len(finite):
            return  # all of it is broken: there is no scale
        bar = figure.colorbar(
            image,
            ax=axes,
            pad=0.01,
            extend="both" if is_broken else "min",
            fraction=0.05,
            shrink=min(1.0, 3.0 / height),
            anchor=(0.0, 1.0),
        )
        above = ";\nabove: broken" if is_broken else ""
        bar.set_label(f"KL divergence of the channel\nthat moved most (nats){above}", fontsize=_SMALL)

    return Picture("Drift over the steps", f"{sentence}.", height, draw)


def _where_largest(values: torch.Tensor) -> tuple[int, int]:
    """Column and row of the first that is infinite, else of the largest value; NaN is none."""
    position = int(values.nan_to_num(nan=-1.0).argmax())
    row, column = divmod(position, values.shape[1])
    return column, row


def _edges(steps: Sequence[int]) -> list[float]:
    """Where the columns of the steps begin and end: in the middle between them."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(one + other) / 2 for one, other in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


# Updates over the steps.


def _updates(series: UpdateSeries) -> Picture:
    rates = series.rates
    order = sorted(range(len(series.lines)), key=lambda number: -int(series.counts[:, number].sum()))
    shown = order[: len(_COLOURS)]
    hidden = len(order) - len(shown)
    busiest = int(rates.max(dim=0).values.argmax())
    most = float(rates[:, busiest].max())
    sentence = f"{series.lines[busiest]} made up to {most:.3g} updates per layer and optimizer step"
    height = 3.2 + 0.2 * (len(shown) + bool(hidden))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        edges = [*series.steps, series.end]
        for place, number in enumerate(shown):
            layers = count_text(series.layers[number], "layer")
            axes.stairs(
                rates[:, number].numpy(), edges, baseline=None, linewidth=2, color=_COLOURS[place],
                linestyle=_STYLES[place % len(_STYLES)], label=f"{_shortened(series.lines[number], 90)} ({layers})",
            )  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.7, zorder=0)
        axes.set_ylim(0, max(1.2, 1.1 * most))
        axes.set_xlim(0, series.end)
        axes.set_xlabel("step of the layer's optimizer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("updates per layer\nand optimizer step")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        more = f"and {count_text(hidden, 'line')} with fewer updates" if hidden else None
        _entitle(axes, "Updates by calling line; plain training has 1")
        legend = figure.legend(
            loc="outside lower left", frameon=False, fontsize=_SMALL, title=more, title_fontsize=_SMALL
        )
        for text in legend.get_texts():
            text.set_parse_math(False)

    return Picture("Updates over the steps", f"{sentence}.", height, draw)


# One layer's channels.


def _channels_of_the_biggest_mover(drift: Sequence[Drift]) -> list[Picture]:
    moved = [one for one in drift if one.has_moved]
    return [_channels(max(moved, key=lambda one: one.largest))] if moved else []


def _channels(drift: Drift) -> Picture:
    name = _shortened(name_text(drift.names[0], drift.model), 60)
    channels = count_text(len(drift.divergence), "channel")
    shift, ratio = float(drift.mean_shift[drift.worst]), float(drift.variance_ratio[drift.worst])
    if math.isfinite(drift.largest):
        what = f"channel {drift.worst} by {shift:.3g} standard deviations, variance by a factor of {ratio:.3g}"
    else:
        what = f"channel {drift.worst} is broken (NaN or infinite)"
    sentence = f"layer {name} ({drift.type}, {channels}): {what}"
    deviations = tuple([variance.sqrt() for variance in drift.variances])

    def draw(figure: FigureBase) -> None:
        title = _wrapped(f"Channels of the layer that moved most\n{sentence}")
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
        panels = figure.subplots(1, 2)
        for axes, values, label in (
            (panels[0], drift.means, "running mean"),
            (panels[1], deviations, "running standard deviation"),
        ):
            _histogram(axes, values, f"{label} (activation units)")
        panels[0].set_ylabel("channels")
        panels[0].legend(frameon=False, fontsize=_SMALL)

    return Picture("Channels of the layer that moved most", f"{sentence}.", 3.4, draw)


def _histogram(axes: Axes, values: Sequence[torch.Tensor], label: str) -> None:
    """Both distributions, and below them a tick for each channel."""
    finite = [some[some.isfinite()] for some in values]
    both = torch.cat(finite)
    if len(both):
        low, high = float(both.min()), float(both.max())
        margin = 0.02 * (high - low) or max(abs(low) * 0.02, 1e-6)
        edges = torch.linspace(low - margin, high + margin, 31, dtype=torch.float64)
        counts = [torch.histogram(some, edges).hist for some in finite]
        top = max([float(some.max()) for some in counts])
        axes.stairs(counts[0].numpy(), edges.numpy(), fill=True, color=_BEFORE, alpha=0.6, label="before")
        axes.stairs(counts[1].numpy(), edges.numpy(), color=_AFTER, linewidth=2, label="after")
        for some, colour, height in zip(finite, (_BEFORE, _AFTER), (-0.05, -0.11), strict=True):
            axes.plot(some.numpy(), torch.full_like(some, height * top).numpy(), "|", color=colour, markersize=7)
        axes.set_ylim(-0.16 * top, 1.08 * top)
        axes.axhline(0, color="black", linewidth=0.7)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


# Divergence by layer.


def _bars(moved: Sequence[Drift]) -> Picture:
    names = [name_text(one.names[0], one.model) for one in moved]
    values = [one.largest for one in moved]
    biggest = values.index(max(values))
    is_broken = not math.isfinite(values[biggest])
    did = "is broken (NaN or infinite)" if is_broken else f"moved most: {values[biggest]:.3g} nats"
    sentence = f"layer {_shortened(names[biggest], 60)} {did}"
    height = 1.3 + _height_of(len(names))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        finite = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
        lengths = [value if math.isfinite(value) else 10 * max(finite) for value in values]
        colours = [_COLOURS[1] if row == biggest else _COLOURS[0] for row in range(len(names))]
        bars = axes.barh(range(len(names)), lengths, color=colours, height=0.7)
        for bar, value in zip(bars, values, strict=True):
            bar.set_hatch("" if math.isfinite(value) else "///")
        axes.set_xscale("log")
        axes.set_xlim(min(finite) / 3, 3 * max(lengths))
        _name_rows(axes, range(len(names)), names, biggest)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("KL divergence of the channel that moved most (nats)")
        _entitle(axes, f"Drift by layer\n{sentence}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    return Picture("Drift by layer", f"{sentence}.", height, draw)


# Rows with a layer each.


def _height_of(rows: int) -> float:
    """In inches."""
    return max(1.0, min(0.17 * rows, 16.0))


def _name_rows(axes: Axes, positions: Sequence[float], names: Sequence[str], bold: int) -> None:
    """Names of layers at an axis: as many as there is room for, evenly spaced, and one in bold."""
    every = math.ceil(0.13 * len(names) / _height_of(len(names)))
    shown = [row for row in range(len(names)) if row == bold or (row % every == 0 and abs(row - bold) >= every)]
    labels = [_shortened(names[row], 40) for row in shown]
    axes.set_yticks([positions[row] for row in shown], labels, fontsize=_SMALL, parse_math=False)
    for row, label in zip(shown, axes.get_yticklabels(), strict=True):
        if row == bold:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=2)


def _entitle(axes: Axes, text: str) -> None:
    axes.set_title(_wrapped(text), fontsize=10, loc="left", parse_math=False)


def _wrapped(text: str) -> str:
    """Lines that fit beside the names of layers."""
    return "\n".join([line for part in text.split("\n") for line in textwrap.wrap(part, 95)])


def _shortened(name: str, most: int) -> str:
    """A name cut to ``most`` characters: the end says more than the beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
