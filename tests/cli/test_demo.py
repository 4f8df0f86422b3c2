"""The demo: what it measures, prints and draws, and what it says where an extra is missing."""

import dataclasses
import functools
import linecache
import re
import sys

import pytest
import torch
from matplotlib import image

from bnguard import cli
from bnguard.cli.demo import finetune
from bnguard.cli.demo import plot as _demo_plot

QUICK = {"source_epochs": 3, "epochs": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Leaves the other cores to the other test processes: more threads than cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(one_thread):
    """A short run of the demo, for real."""
    return finetune.run(**QUICK)


@pytest.fixture
def quick(monkeypatch):
    """The command measures for real, with fewer epochs."""
    monkeypatch.setattr(finetune, "run", functools.partial(finetune.run, **QUICK))
    monkeypatch.setenv("COLUMNS", "80")


def test_runs_start_from_the_same_network(result):
    """Before fine-tuning every run has the same source network."""
    assert [run.name for run in result.runs] == ["unguarded", "restore", "use_running_stats"]
    assert len({run.source_before for run in result.runs}) == 1
    assert result.runs[0].source_before > 0.5


def test_unguarded_run_moves_the_frozen_backbone(result):
    """Without a guard the source network is another one afterwards."""
    run = result.runs[0]
    assert not run.is_same_output
    assert run.source_after != run.source_before
    assert run.largest_shift > 0.1
    assert all(shifts[-1] > 0 for shifts in run.drift.values())


@pytest.mark.parametrize("position", [1, 2], ids=["restore", "use_running_stats"])
def test_guarded_run_leaves_the_source_network_alone(result, position):
    """Under a guard the source network gives the same bits afterwards, and no layer has moved at any step."""
    run = result.runs[position]
    assert run.is_same_output
    assert run.source_after == run.source_before
    assert run.largest_shift == 0
    assert {shift for shifts in run.drift.values() for shift in shifts} == {0.0}


def test_drift_has_each_layer_and_step(result):
    """Each of the three layers is measured after every step."""
    steps = QUICK["epochs"] * -(-result.train_images // finetune._BATCH)
    for run in result.runs:
        assert {layer: len(shifts) for layer, shifts in run.drift.items()} == dict.fromkeys(
            ("block1.bn", "block2.bn", "block3.bn"), steps
        )


def test_error_names_the_line_of_the_forward(result):
    """The error is the guard's own and points at the line in the training step that calls the backbone."""
    lineno = re.search(r"demo/finetune\.py:(\d+) in train_step\n", str(result.error))
    assert lineno is not None
    assert "head(backbone(batch.images))" in linecache.getline(finetune.__file__, int(lineno[1]))
    assert [change.names for change in result.error.changes] == [("block1.bn",)]


@pytest.mark.slow
def test_same_seed_gives_the_same_numbers(result):
    """Everything but the time follows from the seed."""
    again = finetune.run(**QUICK)
    for one, other in zip(result.runs, again.runs, strict=True):
        assert dataclasses.replace(one, step_time=0.0) == dataclasses.replace(other, step_time=0.0)


@pytest.mark.slow
def test_another_seed_gives_other_numbers(result):
    """The seed reaches the split and the networks."""
    other = finetune.run(seed=1, **QUICK)
    assert other.runs[0].drift != result.runs[0].drift


@pytest.mark.slow
def test_random_numbers_of_the_caller_are_untouched():
    """Running the demo does not move the caller's random state."""
    before = torch.get_rng_state()
    finetune.run(**QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_command_prints_the_measured_table_and_the_error(quick, monkeypatch, capsys):
    """Each row of the table has the numbers of its run; the error is printed in full."""
    results = []
    run = finetune.run
    monkeypatch.setattr(finetune, "run", lambda **options: results.append(run(**options)) or results[0])
    assert cli.main(["demo", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    result = results[0]
    for row in result.runs:
        cells = next(line.split() for line in printed.splitlines() if line.split()[:1] == [row.name])
        assert cells[1:] == [
            f"{row.source_before:.1%}",
            f"{row.source_after:.1%}",
            f"{row.largest_shift:.2f}",
            "yes" if row.is_same_output else "no",
            f"{row.new_head:.1%}",
            f"{row.step_time:.2f}",
        ]
    assert f"StatsChangedError: {result.error}\n" in printed
    assert result.runs[0].drift == run(seed=1).runs[0].drift


def test_plot_is_a_picture_with_lines(quick, tmp_path, capsys):
    """``--plot`` writes a PNG of some size with something drawn in every panel."""
    path = tmp_path / "drift.png"
    assert cli.main(["demo", "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = image.imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert height > 300
    assert width > 900
    colourful = pixels.max(axis=2) - pixels.min(axis=2) > 0.3
    for panel in range(3):
        third = colourful[:, panel * width // 3 : (panel + 1) * width // 3]
        assert third.sum() > 100


def test_plot_draws_what_was_measured(result, tmp_path, monkeypatch):
    """Each panel has one line a layer, with the drift of that run."""
    figures = []
    figure = _demo_plot.Figure
    monkeypatch.setattr(_demo_plot, "Figure", lambda **options: figures.append(figure(**options)) or figures[0])
    _demo_plot.draw(result, tmp_path / "drift")
    assert (tmp_path / "drift").read_bytes().startswith(b"\x89PNG")
    for axes, run in zip(figures[0].axes, result.runs, strict=True):
        assert axes.get_title() == run.name
        assert {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()} == run.drift


@pytest.mark.parametrize(
    ("absent", "arguments", "sentence"),
    [
        (["sklearn"], ["demo"], "bnguard demo: needs scikit-learn: pip install 'bnguard[demo]'\n"),
        (["rich", "sklearn"], ["demo"], "bnguard demo: needs scikit-learn and rich: pip install 'bnguard[demo]'\n"),
        (["matplotlib"], ["demo", "--plot", "x.png"], "bnguard demo: needs matplotlib: pip install 'bnguard[plot]'\n"),
        (
            ["sklearn", "matplotlib"],
            ["demo", "--plot", "x.png"],
            "bnguard demo: needs scikit-learn and matplotlib: pip install 'bnguard[demo,plot]'\n",
        ),
    ],
)
def test_missing_extra_is_one_sentence(monkeypatch, capsys, absent, arguments, sentence):
    """A missing package is one sentence with the install line, and exit code 2."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", sentence)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing/drift.png", "expected a file in an existing folder"),
        (".", "which is a folder"),
        ("drift.xyz", "expected a name that ends in .png, .svg, .pdf, "),
    ],
)
def test_plot_that_cannot_be_written_is_refused_first(monkeypatch, tmp_path, capsys, name, problem):
    """A path that nothing can be written to ends the command before it trains."""
    monkeypatch.setattr(finetune, "run", lambda **options: pytest.fail("trained"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--plot", str(tmp_path / name)])
    assert exit_.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "one"])
def test_seed_that_is_none_is_refused(capsys, seed):
    """What cannot be a seed is refused, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--seed", seed])
    assert exit_.value.code == 2
    text = f"bnguard demo: argument --seed: must be an integer from 0 to 4294967295, got '{seed}'\n"
    assert capsys.readouterr() == ("", f"{text}See bnguard demo --help.\n")
