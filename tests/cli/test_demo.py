"""The demo: what it measures, prints and draws, and what it says where an extra is missing."""

import dataclasses
import functools
import json
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


def row(lines, name):
    """The cells of a row of a table, after the guard."""
    (found,) = [line for line in lines if line.strip().startswith(f"{name} ")]
    return re.split(r"  +", found.strip().removeprefix(name).strip())


def test_command_makes_its_point_first_and_ends_with_the_next_step(quick, monkeypatch, capsys):
    """The sentence about the old head, its table, the new head's, the error in full; the last lines can be typed."""
    results = []
    run = finetune.run
    monkeypatch.setattr(finetune, "run", lambda **options: results.append(run(**options)) or results[0])
    assert cli.main(["demo", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    result = results[0]
    assert result.runs[0].drift == run(seed=1).runs[0].drift
    unguarded, _, guarded = result.runs
    point, old, new = (printed.index(text) for text in ("Without a guard it", "The old head:", "The new head:"))
    assert point < old < new < printed.index(f"StatsChangedError: {str(result.error).splitlines()[0]}")
    goes = "falls" if unguarded.source_after < unguarded.source_before else "goes"
    assert printed[point:].splitlines()[0] == (
        f"Without a guard it {goes} from {unguarded.source_before:.1%} to {unguarded.source_after:.1%}. "
        f"With a guard it stays at {guarded.source_before:.1%}."
    )
    names = ["no guard", 'frozen(backbone, "restore")', "frozen(backbone, use_running_stats=True)"]
    for name, one in zip(names, result.runs, strict=True):
        wrong = [round((1 - accuracy) * result.test_images) for accuracy in (one.source_before, one.source_after)]
        assert row(printed[old:new].splitlines(), name) == [
            f"{one.source_before:.1%}", f"{one.source_after:.1%}", f"{wrong[0]} to {wrong[1]}"
        ]  # fmt: skip
        statistics = "the frozen" if one is guarded else "the batch's"
        assert row(printed[new:].splitlines(), name) == [f"{one.new_head:.1%}", statistics, f"x {one.step_time:.2f}"]
    assert f"up to {unguarded.largest_shift:.2f} standard" in " ".join(printed.split())
    assert '"restore" is for forwards from which nothing learns' in printed
    assert max(len(line.rstrip()) for line in printed[:new].splitlines()) <= 80
    commands = [line.split("   ")[0].strip() for line in printed.splitlines() if line.startswith("  bnguard run ")]
    assert len(commands) == 2
    for command in commands:
        with pytest.raises(SystemExit):  # the parser takes it: there is no such script here
            cli.main([*command.replace("'", "").split()[1:-1], "--help", "train.py"])
        assert "usage: bnguard run" in capsys.readouterr().out


def test_files_are_written_and_told_last(quick, tmp_path, monkeypatch, capsys):
    """What cannot be written is said with the name of the command, and the rest is written."""
    monkeypatch.setattr(_demo_plot, "draw", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    paths = [str(tmp_path / name) for name in ("out.json", "out.png")]
    assert cli.main(["demo", "--json", paths[0], "--plot", paths[1]]) == 2
    printed = capsys.readouterr()
    assert printed.out.endswith(f"\nWritten: {paths[0]}\n")
    assert printed.err == "bnguard demo: disk full\n"
    assert [run["name"] for run in json.loads((tmp_path / "out.json").read_text())["runs"]] == [
        "unguarded", "restore", "use_running_stats"
    ]  # fmt: skip


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
