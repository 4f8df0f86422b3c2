"""Pictures of drift and updates, for a watch and for a comparison."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from bnguard.records import Drift, DriftSeries, Finding, UpdateSeries
from bnguard.report.picture import COLOURS, SMALL, Picture, shortened, wrapped
from bnguard.report.tables import codes_by_layer
from bnguard.report.update_plot import updates_picture
from bnguard.words import count_text, name_text

_WIDTH: Final = 10.0  # inches
_BEFORE, _AFTER = "#999999", "#0072b2"
_SPAN: Final = 1e3  # smaller values than the largest divided by this share one colour
_BROKEN: Final = "#d55e00"
_FLAGGED: Final = "#a63700"  # names of layers with findings


def watch_pictures(
    drift: Sequence[Drift], series: DriftSeries, updates: UpdateSeries, findings: Sequence[Finding] = ()
) -> list[Picture]:
    """Drift over the steps, updates by line over the steps, and the channels of the layer that moved most.

    Layers with findings come first, and of these the one that moved most is shown: what trains from scratch moves, too.
    """
    flagged = codes_by_layer(findings)
    moved = [one for one in drift if one.has_moved]
    biggest = max(moved, key=lambda one: (_name_of(one) in flagged, one.largest), default=None)
    pictures = []
    if bool((series.divergence > 0).any()):
        pictures.append(_heat_map(series, flagged, biggest))
    if updates.lines:
        pictures.append(updates_picture(updates))
    return pictures if biggest is None else [*pictures, _channels(biggest)]


def diff_pictures(drift: Sequence[Drift]) -> list[Picture]:
    """Divergence by layer, and the channels of the layer that moved most."""
    moved = [one for one in drift if one.has_moved]
    return [_bars(moved), _channels(max(moved, key=lambda one: one.largest))] if moved else []


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


def _heat_map(series: DriftSeries, flagged: Mapping[str, str], biggest: Drift | None) -> Picture:
    values = series.divergence
    rows = [number for number in range(len(series.layers)) if not bool(values[:, number].isnan().all())]
    rows.sort(key=lambda row: name_text(series.layers[row]) not in flagged)  # which keeps the order of the network
    values = values[:, rows]
    layers = [name_text(series.layers[row]) for row in rows]
    first = sum([layer in flagged for layer in layers])
    column, step = _where_largest(values[:, :first] if first else values)
    is_broken = bool(values.isinf().any())
    if is_broken:
        column, step = _where_largest(values)
    elif biggest is not None and _name_of(biggest) in layers:
        column, step = layers.index(_name_of(biggest)), len(series.steps) - 1  # the number is that of the tables
    title = shortened(layers[column], 60)
    if is_broken:
        sentence = f"layer {title} is broken (NaN or infinite) from optimizer step {series.steps[step]} on"
    elif biggest is not None:
        of = " of the layers with findings" if first < len(layers) and first else ""
        sentence = f"{f'{of[1:]}, ' if of else ''}layer {title} moved most: {biggest.largest:.3g} nats at the end"
    else:
        largest_one = float(values[step, column])
        sentence = f"layer {title} moved most: {largest_one:.3g} nats at optimizer step {series.steps[step]}, and back"
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
        _name_rows(axes, [row + 0.5 for row in range(len(layers))], layers, column, flagged)
        axes.set_ylim(len(layers), 0)
        if 0 < first < len(layers):
            axes.axhline(first, color="white", linewidth=4)  # between layers with findings and the others
        axes.set_xlabel("optimizer step, of all optimizers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _entitle(axes, f"Drift from the beginning\n{sentence}")
        axes.plot(
            series.steps[step], column + 0.5, "o", markersize=11, markerfacecolor="none", markeredgecolor=COLOURS[1],
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
        bar.set_label(f"KL divergence of the channel\nthat moved most (nats){above}", fontsize=SMALL)

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


# One layer's channels.


def _channels(drift: Drift) -> Picture:
    name = shortened(_name_of(drift), 60)
    channels = count_text(len(drift.divergence), "channel")
    shift, ratio = float(drift.mean_shift[drift.worst]), float(drift.variance_ratio[drift.worst])
    if math.isfinite(drift.largest):
        what = f"channel {drift.worst} by {shift:.3g} standard deviations, variance by a factor of {ratio:.3g}"
    else:
        what = f"channel {drift.worst} is broken (NaN or infinite)"
    sentence = f"layer {name} ({drift.type}, {channels}): {what}"
    deviations = tuple([variance.sqrt() for variance in drift.variances])

    def draw(figure: FigureBase) -> None:
        title = wrapped(f"Channels of the layer that moved most\n{sentence}")
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
        panels = figure.subplots(1, 2)
        for axes, values, label in (
            (panels[0], drift.means, "running mean"),
            (panels[1], deviations, "running standard deviation"),
        ):
            _histogram(axes, values, f"{label} (activation units)")
        panels[0].set_ylabel("channels")
        panels[0].legend(frameon=False, fontsize=SMALL)

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
    names = [_name_of(one) for one in moved]
    values = [one.largest for one in moved]
    biggest = values.index(max(values))
    is_broken = not math.isfinite(values[biggest])
    did = "is broken (NaN or infinite)" if is_broken else f"moved most: {values[biggest]:.3g} nats"
    sentence = f"layer {shortened(names[biggest], 60)} {did}"
    height = 1.3 + _height_of(len(names))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        finite = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
        lengths = [value if math.isfinite(value) else 10 * max(finite) for value in values]
        colours = [COLOURS[1] if row == biggest else COLOURS[0] for row in range(len(names))]
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


def _name_of(drift: Drift) -> str:
    """The name of a layer, as findings and series have it."""
    return name_text(drift.names[0], drift.model)


def _name_rows(
    axes: Axes, positions: Sequence[float], names: Sequence[str], bold: int, codes: Mapping[str, str] | None = None
) -> None:
    """Names of layers at an axis: as many as there is room for, evenly spaced, one in bold, those with codes marked."""
    every = math.ceil(0.13 * len(names) / _height_of(len(names)))
    shown = [row for row in range(len(names)) if row == bold or (row % every == 0 and abs(row - bold) >= every)]
    marks = [(codes or {}).get(names[row], "") for row in shown]
    labels = [
        f"{shortened(names[row], 40)} ▲ {mark}" if mark else shortened(names[row], 40)
        for row, mark in zip(shown, marks, strict=True)
    ]
    axes.set_yticks([positions[row] for row in shown], labels, fontsize=SMALL, parse_math=False)
    for row, label, mark in zip(shown, axes.get_yticklabels(), marks, strict=True):
        if row == bold:
            label.set_fontweight("bold")
        if mark:
            label.set_color(_FLAGGED)
    axes.tick_params(axis="y", length=2)


def _entitle(axes: Axes, text: str) -> None:
    axes.set_title(wrapped(text), fontsize=10, loc="left", parse_math=False)
