"""The benchmarks measure what they say they do. Nothing here looks at the clock."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from benchmarks import __main__ as main
from benchmarks import enter_exit, race, readme, results, rivals, step, suite, transcript, watch
from benchmarks.__main__ import _ALL
from benchmarks.models import NETS, BatchNormAct2d, bn_chain, make_step, sample
from tests import forks
from tests.asserts import assert_clean, assert_same_bits, state_of
from tests.readme import PAGES


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet50", 53), ("mobilenet_v2", 52), ("densenet121", 121), ("small_cnn", 17), ("bn_mlp", 2)],
)
def test_nets_have_the_layers_that_their_papers_give_them(name: str, layers: int) -> None:
    """So many BatchNorm layers, and a step that moves all of them."""
    net, x, y = sample(name)
    before = copy.deepcopy(net)
    assert len(rivals.batch_norms(net)) == layers
    make_step(net, net, x, y)()
    pairs = zip(rivals.batch_norms(net), rivals.batch_norms(before), strict=True)
    assert all(not torch.equal(one.running_mean, other.running_mean) for one, other in pairs)


def small_net() -> tuple[nn.Sequential, Callable[[], None]]:
    """A net, and a training step of it."""
    net, x, y = sample("bn_mlp")
    return net, make_step(net, net, x, y)


Around = Callable[[nn.Module], AbstractContextManager[None]]
Stepping = Callable[[nn.Module, rivals.Step], rivals.Step]


def _as_it_is(net: nn.Module, step: rivals.Step) -> rivals.Step:
    return step


HOLDING: dict[str, tuple[Around, Stepping]] = {
    "eval by hand": (rivals.back_in_train_mode, rivals.eval_by_hand),
    "untracked": (rivals.untracked, _as_it_is),
    "converted": (rivals.converted, _as_it_is),
    "momentum 0": (rivals.momentum_zero, _as_it_is),
    "loaded back": (lambda net: nullcontext(), rivals.loaded_back),
    "put back": (lambda net: nullcontext(), rivals.put_back_by_hand),
}


@pytest.mark.parametrize("name", HOLDING)
def test_rival_holds_the_statistics_and_leaves_the_net_as_it_was(name: str) -> None:
    """What people do instead does it, so that it is compared fairly."""
    around, stepping = HOLDING[name]
    net, step = small_net()
    modules, attributes = list(net.modules()), [list(module.__dict__) for module in net.modules()]
    before = [layer.running_mean.clone() for layer in rivals.batch_norms(net)]
    with around(net):
        stepping(net, step)()
    assert list(net.modules()) == modules
    assert [list(module.__dict__) for module in net.modules()] == attributes
    assert all(layer.training and layer.track_running_stats and layer.momentum for layer in rivals.batch_norms(net))
    for layer, mean in zip(rivals.batch_norms(net), before, strict=True):
        assert_same_bits(layer.running_mean, mean)
    step()
    assert not torch.equal(rivals.batch_norms(net)[0].running_mean, before[0])


def test_converted_net_normalises_as_in_eval_mode() -> None:
    """The affine formula gives what BatchNorm gives in eval mode."""
    net, x, _ = sample("small_cnn")
    net(x)
    net.eval()
    expected = net(x)
    with rivals.converted(net):
        torch.testing.assert_close(net(x), expected)


def test_rivals_that_compare_see_a_change() -> None:
    """They notice an update, and would fail if there was none."""
    net, step = small_net()
    rivals.compared_by_state_dict(net, step)()
    with pytest.raises(AssertionError):
        rivals.compared_by_state_dict(net, lambda: None)()
    with rivals.compared_by_hooks(net):
        step()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in rivals.batch_norms(net))
    before = state_of(bn_chain(2))
    chain = bn_chain(2)
    rivals.guarded_by_hand(chain)
    for name, tensor in state_of(chain).items():
        assert_same_bits(tensor, before[name])


def test_race_runs_every_contender_equally_often_and_in_turn() -> None:
    """Forwards and backwards; around is entered for each turn and left after it."""
    calls: list[str] = []

    class Around:
        def __enter__(self) -> None:
            calls.append("in")

        def __exit__(self, *_: object) -> None:
            calls.append("out")

    contenders = [
        race.Contender("a", partial(calls.append, "a"), Around),
        race.Contender("b", partial(calls.append, "b")),
    ]
    result = race.race(contenders, rounds=4, steps=1)
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {"a": 4, "b": 4}
    once = [call for call in calls if call in "ab"]
    assert sorted(set(once)) == ["a", "b"]
    assert once.count("a") == once.count("b")
    assert "".join(call[0] for call in calls if call in ("in", "out")) == "io" * 6
    assert once.index("a") != once.index("b")


def test_steps_are_timed_alone_and_in_turn() -> None:
    """Each contender takes an untimed step and a timed one, then it is the turn of the next."""
    calls: list[str] = []
    result = race.race_of_steps([race.Contender(name, partial(calls.append, name)) for name in "ab"], rounds=3)
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {"a": 3, "b": 3}
    assert "".join(calls) == "bbaaaabbbbaaaabbbbaa"


def test_ratio_is_that_of_each_round() -> None:
    """A round that was slow for all leaves no trace."""
    measured = race.Race({"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 40.0, 6.0]})
    assert measured.ratio("ours", "theirs") == race.Spread(0.5, 0.5, 0.5)


def _row(median: float, low: float, target: float | None) -> results.Row:
    return results.Row("step/x", "A step", "ours", "theirs", race.Spread(median, low, median + 1), target)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (_row(1.0, 0.9, 1.0), "met"),
        (_row(1.1, 0.9, 1.0), "within noise"),
        (_row(1.1, 1.05, 1.0), "missed"),
        (_row(9, 9, None), ""),
    ],
)
def test_row_says_whether_it_met_its_target(row: results.Row, verdict: str) -> None:
    """By its median, or by the lower quartile."""
    assert row.verdict == verdict


def test_results_are_written_as_text_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each table has the command that makes it, and the data gives the rows again."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    rows = [_row(1.0, 0.9, 1.0), _row(2.0, 1.9, None)]
    markdown, data = results.write("cpu", rows, ["step/y: no such library"])
    text = markdown.read_text()
    assert "`python -m benchmarks step/x`" in text
    assert "| ours | theirs | 1.000 | 0.900 to 2.000 | 1 | met |" in text
    assert "- step/y: no such library" in text
    content: dict[str, Any] = json.loads(data.read_text())
    assert [results.from_json(item) for item in content["rows"]] == rows
    assert content["environment"]["torch"] == torch.__version__


def test_every_key_names_the_benchmark_that_makes_its_rows() -> None:
    """What the table prints as a command is a key."""
    assert {f"step/{name}" for name in NETS} <= set(_ALL)
    rows = _ALL["memory/small_cnn"]()
    assert {row.benchmark for row in rows} == {"memory/small_cnn"}


def test_committed_results_come_from_benchmarks_that_exist() -> None:
    """A benchmark that is gone takes its rows along."""
    for path in (Path(results.__file__).parent / "results").glob("*.json"):
        for item in json.loads(path.read_text())["rows"]:
            assert results.from_json(item).benchmark in _ALL


def test_parts_of_a_block_begin_and_end_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be run again and again, by itself, and nothing is left on the net."""
    net = bn_chain(3)
    for part in enter_exit._parts_of_a_block(net) * 2:
        part.step()
        assert_clean(net)
    monkeypatch.setattr(enter_exit, "_EFFORT", {2: (2, 1), 3: (2, 1)})
    monkeypatch.setattr(enter_exit, "_MICROSECONDS", {3: {}})
    rows = enter_exit.parts()
    assert len(rows) == 14
    assert {row.reference for row in rows} == {"2 layers", "3 layers"}


@pytest.mark.parametrize("name", ["bn_mlp", "small_cnn"])
def test_strict_finds_the_net_in_every_place(name: str) -> None:
    """Each contender trains the net, and holds its statistics."""
    net, x, y = sample(name)
    for contender in step._strict_contenders(name, net, make_step(net, net, x, y)):
        before, mean = net[0].weight.clone(), rivals.batch_norms(net)[0].running_mean.clone()
        with contender.around():
            contender.step()
        assert not torch.equal(net[0].weight, before), contender.name
        assert_same_bits(rivals.batch_norms(net)[0].running_mean, mean)


def test_layer_with_a_forward_of_its_own_is_batch_norm_and_relu() -> None:
    """In both modes, statistics too; and bnguard cannot predict it."""
    x = torch.randn(4, 3, 2, 2)
    own, plain = BatchNormAct2d(3), nn.BatchNorm2d(3)
    for mode in (True, False):
        assert_same_bits(own.train(mode)(x), plain.train(mode)(x).relu())
    for name, tensor in state_of(plain).items():
        assert_same_bits(state_of(own)[name], tensor)
    with bnguard.frozen(own) as guard:
        assert guard.layers[0].protection != bnguard.frozen(plain).layers[0].protection


def test_suite_that_is_timed_passes_with_the_switch_and_without(tmp_path: Path) -> None:
    """And its tests update running statistics, which the switch warns about."""
    (tmp_path / "test_nets.py").write_text(suite.SUITE)
    command = ("-m", "pytest", "-q", "-k", "[0]", "-p", "bnguard.pytest_plugin")
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = forks.run(*command, cwd=tmp_path, environment=alone)
    assert "1 passed" in done.stdout
    assert "BNGuardWarning" not in done.stdout
    done = forks.run(*command, "--bn-frozen=warn", cwd=tmp_path, environment=alone)
    assert "1 passed" in done.stdout
    assert "BNGuardWarning" in done.stdout


def test_rows_say_when_they_were_measured_and_how_busy_the_machine_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The higher of the loads before and after, above the table and in the data."""
    noted = iter([results.Conditions("2026-01-01", 2.5), results.Conditions("2026-01-02", 1.04)])
    monkeypatch.setattr(main, "conditions", lambda: next(noted))
    rows = main.under_conditions(lambda: [_row(1.0, 0.9, 1.0)])
    assert [row.conditions for row in rows] == [results.Conditions("2026-01-01", 2.5)]
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    markdown, data = results.write("cpu", rows, [])
    assert "`python -m benchmarks step/x`, measured on 2026-01-01 at a load of 2.5\n" in markdown.read_text()
    assert [results.from_json(item) for item in json.loads(data.read_text())["rows"]] == rows
    assert results.conditions().load == pytest.approx(os.getloadavg()[0], abs=5)


@pytest.mark.parametrize(
    ("title", "columns", "is_ratio"),
    [
        ("A step", ("divided by", "ratio"), True),
        ("A start, milliseconds more", ("more than", "by"), False),
        ("Enter and exit, microseconds a layer", ("among", "takes"), False),
    ],
)
def test_columns_say_what_the_figures_are(title: str, columns: tuple[str, str], *, is_ratio: bool) -> None:
    """A ratio, a difference, or a time."""
    row = replace(_row(1.0, 0.9, None), title=title)
    assert row.columns == columns
    assert row.is_ratio is is_ratio


def test_readme_has_the_table_of_the_committed_results() -> None:
    """To the letter; ``python -m benchmarks.readme`` writes it."""
    content = json.loads((Path(results.__file__).parent / "results" / "cpu.json").read_text())
    costs = readme.table(list(map(results.from_json, content["rows"])))
    assert costs.count("\n") >= 6
    assert readme.shown_in(PAGES["README.md"], costs) == PAGES["README.md"]
    assert "| another |" in readme.shown_in(PAGES["README.md"], "| another |\n")
    with pytest.raises(ValueError, match="no table"):
        readme.shown_in("a page", costs)


def test_table_of_the_readme_leaves_out_what_was_not_measured() -> None:
    """A row without figures, and a cell."""
    measured = race.Spread(1.234, 1.0, 2.0)
    costs = readme.table([results.Row("watch/bn_mlp", "A step", watch.WATCHED, step.PLAIN, measured)])
    assert costs.splitlines()[2:] == ["| `watch(model)` around the loop |  |  | 1.23 |"]


@pytest.mark.parametrize("path", ["README.md", "docs/run.md"])
def test_committed_transcript_is_shown(path: str) -> None:
    """To the letter, with its picture."""
    assert f"```text\n{transcript.TRANSCRIPT.read_text()}```" in PAGES[path]
    assert "benchmarks/results/digits.png)" in PAGES[path]
    assert transcript.shown_in(PAGES[path], transcript.TRANSCRIPT.read_text()) == PAGES[path]
    assert "```text\nanother\n```\n" in transcript.shown_in(PAGES[path], "another\n")
