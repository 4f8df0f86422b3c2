"""The base of the integrations, with one for a trainer of a few lines."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.integrations._base import RunGuard, phrases_of
from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.nets import images
from tests.old_torch import needs_guarded_graphs


class Loop:
    """A trainer that calls one callback."""

    def __init__(self, model: nn.Module, callback: Callback, act: Callable[[], None] = lambda: None) -> None:
        self.model, self.callback, self.act = model, callback, act
        self.validations = 0

    def run(self, steps: int = 2) -> None:
        self.callback.on_begin(self.model)
        try:
            for _ in range(steps):
                self.model.train()(images()).sum().backward()
                self.act()
                self.callback.on_validate()
                self.validations += 1
        except BaseException as error:
            self.callback.on_error(error)
            raise
        self.callback.on_end()


class Callback(RunGuard):
    """All that an integration of ``Loop`` needs."""

    def __init__(self, on_change: Any = "raise", **options: Any) -> None:
        super().__init__(phrases_of("Callback", "callback"), None, on_change, options)  # type: ignore[arg-type]

    def on_begin(self, model: nn.Module) -> None:
        self._begin_run(model)

    def on_validate(self) -> None:
        self.check()

    def on_end(self) -> None:
        self._end_run()

    def on_error(self, error: BaseException) -> None:
        self._end_failed_run(error)


@pytest.fixture
def model() -> nn.Sequential:
    """A net with one guarded layer, named ``1``."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))


@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}])
def test_statistics_are_kept_during_a_run(model, options):
    """All of them are those of before, for as many runs as there are."""
    before, callback = values(statistics(model)), Callback(**options)
    for _ in range(2):
        Loop(model, callback).run()
        assert_same_bits(statistics(model), before)
    assert callback.changes == ()
    assert [layer.names for layer in callback.layers] == [("1",)]
    assert "Callback(" in callback.report()
    assert_clean(model)


def test_an_update_ends_the_run(model):
    """The error calls the guard by its name, and the guard has ended."""
    loop = Loop(model, Callback())
    with pytest.raises(bnguard.StatsChangedError, match=r"is in train mode inside Callback\(\):"):
        loop.run()
    assert loop.validations == 0
    assert_clean(model)


@pytest.mark.parametrize("is_child", [False, True])
def test_warning_says_in_which_process_the_changes_are_listed(model, is_child, monkeypatch):
    """A launcher that starts processes copies the callback: the user's own stays empty."""
    if is_child:
        monkeypatch.setattr("multiprocessing.parent_process", object)
    callback = Callback("warn")
    with pytest.warns(bnguard.BNGuardWarning) as words:
        Loop(model, callback).run()
    end = ", in this process" if is_child else ""
    assert str(words[0].message).endswith(f"; callback.changes lists them all{end}.")
    assert len(callback.changes) == 1


def test_a_write_is_found_before_the_validation(model):
    """No validation sees changed statistics."""
    before = values(statistics(model))
    loop = Loop(model, Callback(use_running_stats=True), lambda: model[1].running_mean.data.add_(1))
    with pytest.raises(bnguard.StatsChangedError, match=r"changed inside Callback\(\):"):
        loop.run()
    assert loop.validations == 0
    assert_same_bits(statistics(model), before)


def test_an_exception_is_not_replaced_by_a_finding(model):
    """What the guard finds at the end is a note of it."""

    def fail() -> None:
        model[1].running_mean.data.add_(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as raised:
        Loop(model, Callback(use_running_stats=True), fail).run()
    assert [note for note in raised.value.__notes__ if "changed inside Callback()" in note]
    assert_clean(model)


def test_a_guard_that_fails_to_end_does_not_replace_an_exception(model, monkeypatch):
    """Its own failure is a note as well."""
    callback = Callback("restore")
    callback.on_begin(model)
    monkeypatch.setattr(callback, "_end_run", lambda error: 1 / 0)
    error = ValueError("mine")
    assert callback._end_failed_run(error) == error.__notes__ == ["bnguard: ZeroDivisionError: division by zero"]
    monkeypatch.undo()
    callback.on_end()


def test_the_budget_is_that_of_one_run(model):
    """Each run may update as often."""
    callback = Callback("restore", updates=3)
    for runs in (1, 2):
        Loop(model, callback).run(steps=5)
        assert int(model[1].num_batches_tracked) == 3 * runs


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"update": 1}, TypeError, "unknown option 'update': did you mean 'updates'?"),
        ({"group": None}, TypeError, "unknown option 'group'"),
        ({"on_change": "rase"}, ValueError, "on_change='rase': did you mean 'raise'?"),
    ],
)
def test_bad_options_are_refused(options, kind, text):
    """With the nearest valid one."""
    with pytest.raises(kind) as refused:
        Callback(**options)
    assert str(refused.value).startswith(text)


def test_a_run_that_never_began(model):
    """Has no changes and no layers, and nothing to end."""
    callback = Callback()
    callback.check()
    callback.on_end()
    assert (callback.changes, callback.layers) == ((), ())


# A guard on a model that does not run.


class CountingCallback(Callback):
    """Counts the batches, as integrations do."""

    def on_validate(self) -> None:
        self._batches += 1


class Elsewhere(Loop):
    """A trainer that trains a copy of the model it was given, as skorch and ``model_init`` do."""

    def run(self, steps: int = 2) -> None:
        given, made = self.model, copy.deepcopy(self.model)
        self.callback.on_begin(given)
        self.model = made
        begin, self.callback.on_begin = self.callback.on_begin, lambda model: None
        try:
            super().run(steps)
        finally:
            self.callback.on_begin = begin


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("options", [{}, {"on_change": "restore"}, {"use_running_stats": True}], ids=str)
def test_guard_of_layers_that_never_ran_says_so_at_its_end(model, options):
    """Batches ran, and moved the statistics of another model."""
    callback = CountingCallback(**options)
    with pytest.warns(bnguard.BNGuardWarning) as words:
        Elsewhere(model, callback).run()
    [word] = words
    assert str(word.message) == (
        "no forward of a guarded layer ran inside Callback(), while batches did: 1 (BatchNorm2d).\n"
        "Guard the model that runs. Some libraries make or copy it (model_init=, clone(), deepcopy())."
    )
    assert word.filename == __file__
    assert_clean(model)


@needs_guarded_graphs
@pytest.mark.usefixtures("no_graphs")
def test_export_of_the_model_is_no_forward_of_it(model):
    """What is trained is another model all the same."""
    callback = CountingCallback()
    callback.on_begin(model.eval())
    torch.export.export(model, (images(),), strict=False)
    callback.on_validate()
    with pytest.warns(bnguard.BNGuardWarning, match="no forward of a guarded layer ran"):
        callback.on_end()
    assert_clean(model)


def run_in_eval_mode(callback: Any, model: nn.Module) -> None:
    """The layer runs, and would not move anyway."""
    model.eval()
    callback.on_begin(model)
    model(images())
    callback.on_validate()
    callback.on_end()


def run_without_batches(callback: Any, model: nn.Module) -> None:
    """A run that was resumed at its end."""
    callback.on_begin(model)
    callback.on_end()


def run_one_of_two(callback: Any, model: nn.Module) -> None:
    """A layer that this phase of the training leaves out."""
    model.append(nn.BatchNorm2d(3))
    callback.on_begin(model)
    model[:2](images())
    callback.on_validate()
    callback.on_end()


def run_once_and_then_something_else(callback: Any, model: nn.Module) -> None:
    """A teacher that is used in one step only."""
    callback.on_begin(model)
    model(images())
    for _ in range(3):
        callback.on_validate()
    callback.on_end()


def run_compiled(callback: Any, model: nn.Module) -> None:
    """A warm graph runs no hooks."""
    run = torch.compile(model.eval(), backend="eager")
    run(images())
    callback.on_begin(model)
    run(images())
    callback.on_validate()
    callback.on_end()


def run_and_fail(callback: Any, model: nn.Module) -> None:
    """The user has an error already."""
    callback.on_begin(model)
    callback.on_validate()
    callback.on_error(ValueError())


def run_inside_another(callback: Any, model: nn.Module) -> None:
    """Two guards on one layer, of which one ends first."""
    other = CountingCallback("restore")
    callback.on_begin(model)
    other.on_begin(model)
    model(images())
    for guard in (callback, other):
        guard.on_validate()
        guard.on_end()


def run_without_hooks(callback: Any, model: nn.Module) -> None:
    """Another library clears all hooks of the layer before its first forward."""
    callback.on_begin(model)
    model(images())
    callback.on_end()
    callback.on_begin(model.eval())
    for hooks in (model[1]._forward_pre_hooks, model[1]._forward_hooks):
        hooks.clear()
    callback.on_end()


@pytest.mark.parametrize(
    "run",
    [
        run_in_eval_mode,
        run_without_hooks,
        run_without_batches,
        run_one_of_two,
        run_once_and_then_something_else,
        run_compiled,
        run_and_fail,
        run_inside_another,
    ],
)
def test_guard_says_nothing_of_layers_that_ran_or_had_no_reason_to(model, run):
    """Warnings are errors here."""
    run(CountingCallback("restore"), model)
    assert_clean(model)


def test_layer_runs_without_a_hook_more_after_its_first_forward(model):
    """And copies that were made before it are free of it."""
    callback = CountingCallback("restore")
    callback.on_begin(model)
    assert_clean(copy.deepcopy(model))
    pickle.loads(pickle.dumps(model))
    assert not copy.deepcopy(model)[1]._forward_pre_hooks
    model(images())
    assert not model[1]._forward_pre_hooks
    callback.on_end()


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripted_layers_are_not_said_to_be_idle() -> None:
    """A ScriptModule runs no hooks: whether it has run is not known."""
    net = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2)).eval())
    callback = CountingCallback()
    callback.on_begin(net)
    net(images())
    callback.on_validate()
    callback.on_end()  # a warning would be an error
