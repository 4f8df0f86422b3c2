"""Pictures: they show the numbers that were measured, in network order, and everything on them can be read."""

import copy
import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import nn

import bnguard
from bnguard.report import plots as pictures
from bnguard.report.picture import COLOURS
from bnguard.report.tables import drift_table
from bnguard.report.update_plot import _HATCHES
from tests.nets import conv_net, images


def deep(layers, channels=4):
    """A net with so many BatchNorm layers, and long names."""
    net = nn.Sequential()
    for number in range(layers):
        block = nn.Sequential()
        block.add_module("conv", nn.Linear(channels, channels, bias=False))
        block.add_module("bottleneck_norm", nn.BatchNorm1d(channels))
        net.add_module(f"stage{number}", block)
    return net


def watched(net, steps=6, batch=None):
    """A run with a validation after every second step, in train mode."""
    batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) + 1 if batch is None else batch
    optimizer = torch.optim.SGD(net.parameters(), 0.0)

    def validate():
        with torch.no_grad():
            for _ in range(3):
                net(batch)

    with bnguard.watch(net, every="auto") as record:
        for step in range(steps):
            net(batch).sum().backward()
            optimizer.step()
            if step % 2:
                validate()
    return record


def pictures_of(record):
    """The three."""
    return pictures.watch_pictures(record.drift, record.series, record.update_series)


def drawn(picture):
    """A picture on a figure, as it is saved."""
    figure = Figure(figsize=(10, picture.height), layout="constrained")
    FigureCanvasAgg(figure)
    picture.draw(figure)
    figure.draw_without_rendering()
    return figure


def assert_everything_fits(figure):
    """Nothing that is drawn leaves the figure."""
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width + 0.03
    assert box.y1 < height + 0.03


def test_heat_map_shows_the_series():
    """A row for each layer in network order, a column for each step, the biggest mover in bold and in a circle."""
    record = watched(deep(3))
    series = record.series
    heat_map, *_ = pictures_of(record)
    figure = drawn(heat_map)
    axes, bar = figure.axes
    (mesh,) = axes.collections
    values = torch.tensor(mesh.get_array().data).reshape(3, len(series.steps))
    floor = float(series.divergence.max()) / 1e3
    assert torch.equal(values, series.divergence.T.clamp(min=floor))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"stage{number}.bottleneck_norm" for number in range(3)]
    assert axes.yaxis_inverted()
    step, row = divmod(int(series.divergence.argmax()), 3)
    assert [label.get_fontweight() == "bold" for label in axes.get_yticklabels()] == [
        number == row for number in range(3)
    ]
    (circle,) = axes.get_lines()
    assert (circle.get_xdata(), circle.get_ydata()) == ([series.steps[step]], [row + 0.5])
    assert f"layer {labels[row]} moved most: {float(series.divergence.max()):.3g} nats" in axes.get_title(loc="left")
    assert axes.get_xlabel() == "optimizer step, of all optimizers"
    assert "nats" in bar.get_ylabel()
    assert_everything_fits(figure)


@pytest.mark.parametrize("layers", [1, 60, 200])
def test_names_of_many_layers_can_be_read(layers):
    """They keep the order of the network, none lies on another, and the biggest mover is among them."""
    record = watched(deep(layers), steps=2)
    heat_map, *_ = pictures_of(record)
    figure = drawn(heat_map)
    renderer = figure.canvas.get_renderer()
    labels = figure.axes[0].get_yticklabels()
    names = [drift.names[0] for drift in record.drift]
    shown = [names.index(label.get_text()) for label in labels]
    assert shown == sorted(shown)
    assert len(shown) >= min(layers, 60) * 0.9
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    assert int(record.series.divergence.argmax()) % layers in shown
    assert_everything_fits(figure)


def test_broken_and_missing_layers_are_not_the_same():
    """A broken layer is told in words and has a colour of its own; one that came later is white."""
    net = deep(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    batch = torch.randn(8, 4)
    with bnguard.watch(net, every=1) as record:
        for step in range(4):
            net(batch)
            if step == 2:
                net[1].bottleneck_norm.running_var.fill_(float("nan"))
                net.append(nn.BatchNorm1d(4))
            optimizer.step()
        net.eval()
    heat_map, *rest = pictures_of(record)
    assert heat_map.description == "layer stage1.bottleneck_norm is broken (NaN or infinite) from optimizer step 3 on."
    figure = drawn(heat_map)
    (mesh,) = figure.axes[0].collections
    colours = mesh.to_rgba(mesh.get_array()).reshape(-1, 4, 4)
    broken = to_rgb(pictures._BROKEN)
    assert [tuple(colour[:3]) == pytest.approx(broken) for colour in colours[1]] == [False, False, True, True]
    assert len(colours) == 2 or [tuple(colour) == (1, 1, 1, 1) for colour in colours[2]][:2] == [True, True]
    assert "broken" in figure.axes[1].get_ylabel()
    assert "channel 0 is broken (NaN or infinite)" in rest[-1].description
    for picture in (heat_map, *rest):
        assert_everything_fits(drawn(picture))


def bands(axes):
    """What lies on top of each other: of each band its colour, its height over the steps, and its upper edge."""
    found = []
    for patch in axes.patches:
        values, _, baseline = patch.get_data()
        if baseline is not None:
            found.append((to_hex(patch.get_facecolor()), (values - baseline).tolist(), values.tolist()))
    return found


def test_lines_that_update_the_same_layers_lie_on_top_of_each_other():
    """Two updates a step look like two: each band has the rate of its line, and the last one ends at the sum."""
    record = watched(deep(2))
    _, updates, _ = pictures_of(record)
    figure = drawn(updates)
    (axes,) = figure.axes
    series = record.update_series
    legend = figure.legends[0]
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted(f"{line} (2 layers)" for line in series.lines)
    lines = [series.lines.index(label.removesuffix(" (2 layers)")) for label in labels]
    colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    drawn_bands = bands(axes)
    assert [colour for colour, *_ in drawn_bands] == colours
    for line, (_, height, _) in zip(lines, drawn_bands, strict=True):
        assert height == series.rates[:, line].tolist()
    assert drawn_bands[-1][2] == series.rates.sum(dim=1).tolist()
    assert max(drawn_bands[-1][2]) == 4
    assert axes.get_title(loc="right") == "2 layers"
    median = float(series.rates.sum(dim=1).median())
    rate = "1 update" if median == 1 else f"{median:.3g} updates"
    text = f"2 layers have {rate} per optimizer step (the median), and up to 4, from "
    assert updates.description.startswith(text)
    assert_everything_fits(figure)


def test_layers_that_other_lines_update_have_a_panel_of_their_own():
    """A line that updates some of the layers is on top of the others there only, and the layers are counted."""
    net = deep(3)
    batch = torch.randn(16, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    with bnguard.watch(net) as record:
        for _ in range(3):
            net(batch).sum().backward()
            net[0](batch)
            optimizer.step()
    series = record.update_series
    assert series.layers == (3, 1)
    assert series.by_layer == ((0, 1), (0,), (0,))
    picture = pictures.watch_pictures((), record.series, series)[0]
    figure = drawn(picture)
    assert {axes.get_title(loc="right"): [band[2] for band in bands(axes)] for axes in figure.axes} == {
        "1 layer": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]],
        "2 layers": [[1.0, 1.0, 1.0]],
    }
    assert picture.description.startswith("1 layer has 2 updates per optimizer step, from ")
    assert_everything_fits(figure)


def finding(*layers, severity="warning"):
    """A finding about some layers."""
    return bnguard.Finding("BN001", "title", severity, layers, None, "what", "fix", "verdict")


def test_layers_with_findings_come_first_and_are_marked():
    """In the heat map, above a gap; and of these the one that moved most is shown, not what trains from scratch."""
    record = watched(deep(4))
    record_drift = {drift.names[0]: drift.largest for drift in record.drift}
    least = sorted(record_drift, key=record_drift.get)[:2]
    flagged = finding(*least)
    heat_map, _, channels = pictures.watch_pictures(
        record.drift, record.series, record.update_series, [flagged, finding("stage3.bottleneck_norm", severity="note")]
    )
    figure = drawn(heat_map)
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    names = list(record_drift)
    first = [name for name in names if name in least]
    others = [name for name in names if name not in least]
    assert [label.get_text() for label in labels] == [*[f"{name} ▲ BN001" for name in first], *others]
    assert [to_hex(label.get_color()) == pictures._FLAGGED for label in labels] == [True, True, False, False]
    (mesh,) = axes.collections
    values = torch.tensor(mesh.get_array().data).reshape(4, -1)[:, -1]
    assert values.tolist() == [pytest.approx(record_drift[name]) for name in (*first, *others)]
    biggest = max(least, key=record_drift.get)
    assert heat_map.description.startswith(f"of the layers with findings, layer {biggest} moved most: ")
    assert channels.description.startswith(f"layer {biggest} ")
    assert_everything_fits(figure)


def test_pictures_and_tables_have_the_same_numbers():
    """How far the layer that moved most has moved at the end is one number, wherever it is written."""
    record = watched(deep(3))
    heat_map, _, channels = pictures_of(record)
    row = drift_table("moved", record.drift, 3).rows[0]
    name = row[0].split(" ")[0]
    assert heat_map.description == f"layer {name} moved most: {row[4]} at the end."
    assert f"channel {row[1]} by {row[2].removesuffix(' sd')} standard deviations" in channels.description
    assert channels.description.endswith(f"variance by a factor of {row[3].removeprefix('x ')}.")


def test_many_lines_are_counted():
    """Seven can be told apart; of the rest there is the number. Long paths keep their end."""
    net = deep(1)
    runs = {}
    exec(
        "\n".join([f"def run_{'x' * 100}{number}(): net(batch)" for number in range(9)]),
        {"net": net, "batch": torch.randn(8, 4)},
        runs,
    )
    with bnguard.watch(net) as record:
        for number, run in enumerate(runs.values()):
            for _ in range(9 - number):
                run()
    picture = pictures.watch_pictures((), record.series, record.update_series)[0]
    figure = drawn(picture)
    legend = figure.legends[0]
    assert len(legend.get_texts()) == 7
    for number, text in enumerate(legend.get_texts()):
        assert text.get_text().startswith("…")
        assert text.get_text().endswith(f"{number} (1 layer)")
    assert legend.get_title().get_text() == "and 2 lines with fewer updates"
    assert_everything_fits(figure)


def test_channels_of_the_biggest_mover():
    """Means and standard deviations before and after: each channel is counted once, and has its tick."""
    record = watched(deep(2, channels=4))
    biggest = max(record.drift, key=lambda drift: drift.largest)
    picture = pictures_of(record)[-1]
    assert picture.description.startswith(
        f"layer {biggest.names[0]} (BatchNorm1d, 4 channels): channel {biggest.worst} "
    )
    figure = drawn(picture)
    expected = (biggest.means, tuple(variance.sqrt() for variance in biggest.variances))
    for axes, values, label in zip(figure.axes, expected, ("running mean", "running standard deviation"), strict=True):
        before, after = axes.patches
        assert [before.get_data()[0].sum(), after.get_data()[0].sum()] == [4, 4]
        assert [before.get_label(), after.get_label()] == ["before", "after"]
        ticks = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() == "|"]
        assert ticks == [some.tolist() for some in values]
        assert axes.get_xlabel() == f"{label} (activation units)"
    assert_everything_fits(figure)


def test_differences_by_layer():
    """A bar for each layer that moved, in network order, as long as its divergence; a broken one is marked."""
    net = conv_net()
    later = copy.deepcopy(net)
    later(images())
    found = bnguard.diff(net, later)
    bars, channels = pictures.diff_pictures(found.moved)
    axes = drawn(bars).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [drift.largest for drift in found.moved]
    assert [label.get_text() for label in axes.get_yticklabels()] == [drift.names[0] for drift in found.moved]
    assert "nats" in axes.get_xlabel()
    assert_everything_fits(drawn(bars))
    assert_everything_fits(drawn(channels))
    next(module for module in later.modules() if isinstance(module, nn.BatchNorm2d)).running_mean[0] = float("nan")
    found = bnguard.diff(net, later)
    bars = pictures.diff_pictures(found.moved)[0]
    assert bars.description.endswith(" is broken (NaN or infinite).")
    marks = [bar.get_hatch() for bar in drawn(bars).axes[0].patches]
    assert sum(mark == "///" for mark in marks) == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", ""])
def test_files_have_the_format_of_their_name(tmp_path, suffix):
    """Pictures go below each other into one file."""
    path = tmp_path / (f"drift.{suffix}" if suffix else "drift")
    pictures.save(pictures_of(watched(deep(2))), path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "": b"\x89PNG"}[suffix]
    assert path.read_bytes().startswith(start)


def test_nothing_to_draw_says_so(tmp_path):
    """A run that updates nothing has no pictures, and its file is not empty."""
    net = deep(1).eval()
    record = watched(net)
    assert pictures_of(record) == []
    pictures.save([], tmp_path / "nothing.svg")
    assert "nothing moved" in (tmp_path / "nothing.svg").read_text()


def test_same_picture_gives_the_same_svg():
    """Pages of equal runs are equal."""
    record = watched(deep(2))
    first, second = ([pictures.as_svg(picture) for picture in pictures_of(record)] for _ in range(2))
    assert first == second


# Of Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_can_be_told_apart(kind):
    """Also by people who see two primary colours; beyond that lines have hatches."""
    matrix = torch.tensor(BLINDNESS[kind])
    rgb = torch.tensor([to_rgb(colour) for colour in COLOURS])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ matrix.T).clamp(0, 1)
    places = list(zip(as_lab(seen), range(len(seen)), strict=True))
    for (one, first), (other, second) in itertools.combinations(places, 2):
        is_same_style = _HATCHES[first] == _HATCHES[second]
        assert torch.dist(one, other) > (20 if is_same_style else 10), (first, second)


def as_lab(linear):
    """CIE L*a*b* of linear sRGB, under D65."""
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / torch.tensor([0.95047, 1.0, 1.08883])
    cube = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = cube.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
