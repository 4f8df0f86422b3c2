"""Ignite: a guard around the runs of an engine, against runs of the same engine without it."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_untouched, state_of, statistics, values, warns
from tests.loops import (
    backbone_norms,
    counted_reads,
    data,
    drifted,
    error_without,
    examples_of,
    little_waiting,
    make_model,
    quiet_imports,
    run_code,
)

with quiet_imports():  # Ignite uses torch.jit.script, which torch calls deprecated
    from ignite.engine import Engine, Events, State, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import Checkpoint

    from bnguard.integrations import ignite as integration
    from bnguard.integrations.ignite import BNGuardHandler

__all__ = ["little_waiting"]

BATCHES = 3
INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])


def make_loader() -> DataLoader[Any]:
    """Three batches of digits, shuffled."""
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)


def make_trainer(model: nn.Module) -> Engine:
    """Ignite's own trainer, which calls ``model.train()`` at every iteration; ``state.losses`` has every loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    trainer.optimizer = optimizer
    trainer.logger.disabled = True
    trainer.losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: trainer.losses.append(engine.state.output))
    return trainer


def run(trainer: Engine, **options: Any) -> State:
    """Two epochs from a fixed seed."""
    torch.manual_seed(3)
    return trainer.run(make_loader(), max_epochs=2, **options)


def assert_same_run(one: Engine, model: nn.Module, other: Engine, twin: nn.Module, *, statistics_too: bool) -> None:
    """Two trainers have seen the same losses, and left the same parameters, gradients and momenta."""
    assert len(one.losses) > 1
    assert_same_bits(torch.tensor(one.losses), torch.tensor(other.losses))
    assert_same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert_same_bits([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    moments = [[s["momentum_buffer"] for s in t.optimizer.state.values()] for t in (one, other)]
    assert_same_bits(*moments)
    if statistics_too:
        assert_same_bits(statistics(model), statistics(twin))


# Exact.


def test_restore_trains_as_the_twin() -> None:
    """Under ``restore`` a run has the losses, gradients, parameters and random numbers of an unguarded one."""
    model, twin = make_model(), make_model()
    trainer, plain = make_trainer(model), make_trainer(twin)
    run(plain)
    random = torch.get_rng_state()
    assert drifted(twin)
    BNGuardHandler(model, "restore").attach(trainer)
    state = assert_untouched(model, lambda: run(trainer))
    assert_same_bits(torch.get_rng_state(), random)
    assert_same_run(trainer, model, plain, twin, statistics_too=False)
    assert (state.epoch, state.iteration) == (2, 2 * BATCHES)
    assert_clean(model)


def test_running_statistics_are_used_where_the_loop_undoes_eval() -> None:
    """Ignite's ``train()`` undoes ``bn.eval()``; under the guard the run is one that calls it again at each step."""
    model, drifting, twin = make_model(), make_model(), make_model()
    for layer in backbone_norms(drifting):
        layer.eval()
    run(make_trainer(drifting))
    assert drifted(drifting)

    plain = make_trainer(twin)
    twin.train = lambda mode=True: by_hand(twin, mode)
    run(plain)
    assert not drifted(twin)
    trainer = make_trainer(model)
    for layer in backbone_norms(model):
        layer.eval()
    BNGuardHandler(model, use_running_stats=True, include="backbone").attach(trainer)
    assert_untouched(model, lambda: run(trainer))
    assert_same_run(trainer, model, plain, twin, statistics_too=True)


PHASES: dict[str, tuple[dict[str, int], range]] = {
    "until epoch": ({"until_epoch": 1}, range(3)),
    "from epoch": ({"from_epoch": 1}, range(3, 6)),
    "until step": ({"until_step": 4}, range(4)),
    "some steps": ({"from_step": 2, "until_step": 5}, range(2, 5)),
    "later": ({"from_epoch": 7}, range(0)),
}


@pytest.mark.parametrize(("options", "steps"), PHASES.values(), ids=PHASES)
def test_guard_for_a_while_is_start_and_stop_by_hand(options: dict[str, int], steps: range) -> None:
    """Of a part, in two runs of two epochs of three iterations, in each from its beginning."""
    model, twin = make_model(), make_model()
    trainer, plain = make_trainer(model), make_trainer(twin)
    guard = bnguard.frozen(twin.backbone, "restore")

    def act(engine: Engine) -> None:
        step = engine.state.iteration - 1
        if step == steps.start and steps:
            guard.start()
        if step == steps.stop:
            guard.stop()

    plain.add_event_handler(Events.ITERATION_STARTED, act)
    BNGuardHandler(model.backbone, "restore", **options).attach(trainer)
    for _ in range(2):
        run(plain)
        guard.stop()
        run(trainer)
        assert_clean(model)
    assert_same_run(trainer, model, plain, twin, statistics_too=True)
    assert drifted(model)


def test_run_that_fails_while_its_guard_is_there_for_a_while() -> None:
    """The guard ends with the run, and the next run begins anew."""
    model = make_model()
    trainer = make_trainer(model)
    handle = trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda _: 1 / 0)
    BNGuardHandler(model, "restore", until_epoch=1).attach(trainer)
    with pytest.raises(ZeroDivisionError):
        run(trainer)
    assert_clean(model)
    assert not drifted(model)
    handle.remove()
    trainer.state.max_epochs = None
    trainer._internal_run_generator = None  # else Ignite goes on with the run that failed
    run(trainer)
    assert drifted(model)
    assert_clean(model)


def test_handler_that_is_detached_takes_its_events_along() -> None:
    """Later runs are not guarded at any epoch."""
    model = make_model()
    trainer = make_trainer(model)
    before = {event: list(handlers) for event, handlers in trainer._event_handlers.items()}
    handler = BNGuardHandler(model, "restore", from_epoch=1)
    handler.attach(trainer)
    handler.detach()
    assert {event: list(handlers) for event, handlers in trainer._event_handlers.items() if handlers} == {
        event: handlers for event, handlers in before.items() if handlers
    }
    run(trainer)
    assert drifted(model)


def by_hand(model: nn.Module, mode: bool) -> nn.Module:
    """What people write: ``train()`` with BatchNorm in eval mode."""
    nn.Module.train(model, mode)
    for layer in backbone_norms(model):
        layer.eval()
    return model


def test_warn_trains_as_the_twin_and_tells() -> None:
    """Under ``warn`` the statistics are the twin's too; one warning a run, at the line that runs the engine."""
    model, twin = make_model(), make_model()
    trainer, plain = make_trainer(model), make_trainer(twin)
    run(plain)
    handler = BNGuardHandler(model, "warn", include="*bn2")
    handler.attach(trainer)
    torch.manual_seed(3)
    with warns(at="trainer.run(make_loader()") as caught:
        trainer.run(make_loader(), max_epochs=2)
    assert "backbone.bn2 (BatchNorm2d) is in train mode inside BNGuardHandler()" in caught.message
    assert [change.updates for change in handler.changes] == [2 * BATCHES]
    assert "backbone.bn2" in handler.report()
    assert [layer.names for layer in handler.layers] == [("backbone.bn2",)]
    assert_same_run(trainer, model, plain, twin, statistics_too=True)


def test_affine_holds_weight_and_bias() -> None:
    """``affine=True`` is passed on: weight and bias move without it, and not with it."""
    model, twin = make_model(), make_model()
    trainer = make_trainer(model)
    run(make_trainer(twin))
    assert not torch.equal(twin.backbone.bn1.weight, make_model().backbone.bn1.weight)
    BNGuardHandler(model, "restore", affine=True, exclude="*bn2").attach(trainer)
    run(trainer)
    assert_same_bits(model.backbone.bn1.state_dict(), make_model().backbone.bn1.state_dict())
    assert not torch.equal(model.backbone.bn2.weight, make_model().backbone.bn2.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_updates_are_counted_by_run() -> None:
    """``updates`` is a budget of each run, and of what ``interrupt()`` leaves of one."""
    model = make_model()
    trainer = make_trainer(model)
    BNGuardHandler(model, updates=2 * BATCHES).attach(trainer)
    run(trainer)
    run(trainer)
    assert model.backbone.bn1.num_batches_tracked == 3 + 4 * BATCHES
    trainer.state.max_epochs = None
    with pytest.raises(bnguard.StatsChangedError, match=r"has updated 6 times inside BNGuardHandler\(updates=6\)"):
        trainer.run(make_loader(), max_epochs=3)
    assert_clean(model)


def test_steps_read_no_tensor() -> None:
    """A run reads from the device at its beginning and end; more steps read no more than the twin's."""

    def reads(guards: bool, epochs: int) -> int:
        model = make_model()
        trainer = Engine(lambda engine, batch: model(batch[0]))
        if guards:
            BNGuardHandler(model, "restore").attach(trainer)
        batches = [data(16)] * BATCHES
        with counted_reads() as counter:
            trainer.run(batches, max_epochs=epochs)
        return counter.count

    assert reads(True, 1) > reads(False, 1)
    assert reads(True, 4) - reads(True, 1) == reads(False, 4) - reads(False, 1)


# What is wrong is said.


def test_raise_stops_the_run() -> None:
    """Under ``raise`` the first train-mode forward ends the run, unchanged, with the line and the way out."""
    model = make_model()
    trainer = make_trainer(model)
    handler = BNGuardHandler(model)
    handler.attach(trainer)

    def guarded() -> None:
        with pytest.raises(bnguard.StatsChangedError) as caught:
            run(trainer)
        text = str(caught.value)
        assert "backbone.bn1 (BatchNorm2d) is in train mode inside BNGuardHandler():" in text
        assert "test_ignite.py" in text
        assert "BNGuardHandler(model, use_running_stats=True)" in text

    assert_untouched(model, guarded)
    assert trainer.losses == []
    assert [change.names for change in handler.changes] == [("backbone.bn1",)]
    assert_clean(model)


def make_wrong_evaluator(model: nn.Module) -> Engine:
    """An evaluator that forgets ``model.eval()``."""

    def validate(engine: Engine, batch: Any) -> Any:
        with torch.no_grad():
            return model(batch[0])

    evaluator = Engine(validate)
    evaluator.logger.disabled = True
    return evaluator


def test_validation_left_in_train_mode_is_found() -> None:
    """A validation without ``eval()`` moves the statistics; a handler on its engine stops it, training goes on."""
    model, twin = make_model(), make_model()
    make_wrong_evaluator(twin).run(make_loader())
    assert drifted(twin)
    evaluator, trainer = make_wrong_evaluator(model), make_trainer(model)
    BNGuardHandler(model).attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(make_loader()))
    with pytest.raises(bnguard.StatsChangedError, match=r"backbone.bn1 .* is in train mode"):
        run(trainer)
    assert trainer.state.epoch == 1
    assert model.backbone.bn1.num_batches_tracked == 3 + BATCHES  # the epoch's own
    assert_clean(model)


def test_validation_in_eval_mode_passes() -> None:
    """Ignite's evaluator calls ``eval()``: nothing to say, and the outputs are the twin's."""
    model = make_model()
    evaluator = create_supervised_evaluator(model)
    x, y = data()
    plain = evaluator.run([(x, y)]).output
    BNGuardHandler(model).attach(evaluator)
    assert_untouched(model, lambda: assert_same_bits(evaluator.run([(x, y)]).output, plain))


def write(model: nn.Module) -> None:
    """What no forward explains."""
    model.backbone.bn1.running_mean.data += 1


@pytest.mark.parametrize("swallows", [False, True])
def test_finding_at_the_end_of_the_run_reaches_the_user(swallows: bool) -> None:
    """What only the comparison at the end finds is raised by ``run()``, whatever handlers do with exceptions."""
    model = make_model()
    engine = Engine(lambda engine, batch: write(model) if engine.state.iteration == BATCHES else None)
    engine.logger.disabled = True
    if swallows:
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: None)
    BNGuardHandler(model).attach(engine)
    with pytest.raises(bnguard.StatsChangedError, match="1 layer changed inside BNGuardHandler") as caught:
        engine.run(make_loader(), max_epochs=1)
    assert [change.names for change in caught.value.changes] == [("backbone.bn1",)]
    assert not drifted(model)
    assert_clean(model)


def test_swallowed_error_is_raised_at_the_end() -> None:
    """A handler of ``EXCEPTION_RAISED`` that keeps the guard's error for itself does not hide it."""
    model = make_model()
    trainer = make_trainer(model)
    seen = []
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: seen.append(error))
    handler = BNGuardHandler(model)
    handler.attach(trainer)
    with pytest.raises(bnguard.StatsChangedError, match="was caught") as caught:
        run(trainer)
    assert seen
    assert caught.value not in seen
    assert not drifted(model)


@pytest.mark.parametrize(
    ("check_at", "found_at"),
    [
        (None, 2 * BATCHES),
        (Events.EPOCH_COMPLETED, BATCHES),
        (Events.ITERATION_COMPLETED(every=2), 2),
        (Events.COMPLETED | Events.ITERATION_COMPLETED(once=2), 2),
    ],
    ids=["end", "epoch", "every", "list"],
)
def test_check_at_finds_a_write_earlier(check_at: Any, found_at: int) -> None:
    """``check_at`` compares at an event; without it a write is found at the end of the run."""
    model = make_model()
    engine = Engine(lambda engine, batch: write(model) if engine.state.iteration == 1 else None)
    engine.logger.disabled = True
    handler = BNGuardHandler(model)
    handler.attach(engine, check_at)
    with pytest.raises(bnguard.StatsChangedError, match="1 layer changed"):
        engine.run(make_loader(), max_epochs=2)
    assert engine.state.iteration == found_at
    assert not drifted(model)
    handler.detach()
    assert not any(engine._event_handlers.values())
    engine.state.max_epochs = None
    engine.run(make_loader(), max_epochs=2)  # unguarded again
    assert drifted(model)


# However a run ends.


@pytest.mark.parametrize("handlers", ["none", "swallows", "raises"])
@INTERRUPTS
def test_exception_goes_where_it_went_without_the_guard(kind: type[BaseException], handlers: str) -> None:
    """An exception in the middle ends the run, or is kept by handlers, as in the twin; nothing stays behind."""

    def outcome(model: nn.Module, guard: BNGuardHandler | None) -> tuple[Any, ...]:
        trainer = make_trainer(model)
        seen: list[str] = []

        def fail(engine: Engine) -> None:
            if engine.state.iteration == 2:
                raise kind("theirs")

        def keep(engine: Engine, error: BaseException) -> None:
            seen.append(str(error))
            if handlers == "raises":
                raise error

        trainer.add_event_handler(Events.ITERATION_STARTED, fail)
        if guard is not None:
            guard.attach(trainer)
        if handlers != "none":
            trainer.add_event_handler(Events.EXCEPTION_RAISED, keep)
        raised = None
        try:
            run(trainer)
        except kind as error:
            raised = (str(error), getattr(error, "__notes__", []))
        return raised, seen, trainer.losses, trainer.state.epoch, trainer.state.iteration

    twin, model = make_model(), make_model()
    expected = outcome(twin, None)
    assert drifted(twin)
    assert (expected[0] is None) == (handlers == "swallows")
    assert assert_untouched(model, lambda: outcome(model, BNGuardHandler(model, "restore"))) == expected
    assert_same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert_clean(model)


@INTERRUPTS
def test_finding_is_a_note_on_an_exception(kind: type[BaseException]) -> None:
    """An exception on its way is not masked by what the guard finds then: that is added to it."""
    model = make_model()

    def fail(engine: Engine, batch: Any) -> None:
        write(model)
        raise kind("theirs")

    engine = Engine(fail)
    engine.logger.disabled = True
    BNGuardHandler(model).attach(engine)
    with pytest.raises(kind, match="theirs") as caught:
        engine.run(make_loader())
    assert "backbone.bn1" in caught.value.__notes__[0]
    assert not drifted(model)


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED], ids=str)
@pytest.mark.parametrize("order", ["before", "after"])
def test_order_of_handlers_does_not_matter(event: Any, order: str) -> None:
    """A handler of any event, attached before or after the guard, is inside; if it fails, nothing stays behind."""
    model = make_model()
    trainer = make_trainer(model)

    def train_forward_and_fail() -> None:
        model.train()(data(16)[0])
        raise ZeroDivisionError("theirs")

    if order == "before":
        trainer.add_event_handler(event, train_forward_and_fail)
    BNGuardHandler(model, "restore").attach(trainer)
    if order == "after":
        trainer.add_event_handler(event, train_forward_and_fail)

    def guarded() -> None:
        with pytest.raises(ZeroDivisionError, match="theirs"):
            run(trainer)

    assert_untouched(model, guarded)
    assert_clean(model)


@pytest.mark.parametrize("how", ["terminate", "skip", "epoch"])
def test_terminated_run_ends_the_block(how: str) -> None:
    """``terminate()``, also without ``COMPLETED``, and ``terminate_epoch()`` end as in the twin, and leave nothing."""

    def states(model: nn.Module, guards: bool) -> tuple[Any, ...]:
        trainer = make_trainer(model)
        fired: list[str] = []
        for event in (Events.TERMINATE, Events.COMPLETED, Events.EPOCH_COMPLETED):
            trainer.add_event_handler(event, lambda engine, name=event.name: fired.append(name))

        @trainer.on(Events.ITERATION_COMPLETED(once=2))
        def stop() -> None:
            assert not guards or "forward" in model.backbone.bn1.__dict__
            if how == "epoch":
                trainer.terminate_epoch()
            else:
                trainer.terminate(skip_completed=how == "skip")

        if guards:
            BNGuardHandler(model, "restore").attach(trainer)
        run(trainer)
        return fired, trainer.losses, trainer.state.iteration

    model, twin = make_model(), make_model()
    expected = states(twin, False)
    assert assert_untouched(model, lambda: states(model, True)) == expected
    assert drifted(twin)
    assert_clean(model)


def test_run_can_be_interrupted_and_resumed() -> None:
    """``interrupt()`` ends the block, the ``run()`` that resumes opens another; together they are the twin's run."""
    previous = Engine.interrupt_resume_enabled

    def finished(model: nn.Module, guards: bool) -> Engine:
        trainer = make_trainer(model)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.interrupt)
        if guards:
            BNGuardHandler(model, "restore").attach(trainer)
        run(trainer)
        assert len(trainer.losses) == 2
        assert_clean(model)
        trainer.run(max_epochs=2)
        assert len(trainer.losses) == 2 * BATCHES
        return trainer

    Engine.interrupt_resume_enabled = True
    try:
        model, twin = make_model(), make_model()
        plain = finished(twin, False)
        trainer = assert_untouched(model, lambda: finished(model, True))
    finally:
        Engine.interrupt_resume_enabled = previous
    assert drifted(twin)
    assert_same_run(trainer, model, plain, twin, statistics_too=False)


def test_run_resumes_from_a_checkpoint(tmp_path: Any) -> None:
    """A checkpoint of a guarded run holds the true statistics; resumed from it, a run ends as one that went through."""
    whole, part = make_model(), make_model()
    trainer = make_trainer(whole)
    BNGuardHandler(whole, "restore").attach(trainer)
    randoms = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: randoms.append(torch.get_rng_state()))
    run(trainer)

    first = make_trainer(part)
    BNGuardHandler(part, "restore").attach(first)
    to_save = {"model": part, "optimizer": first.optimizer, "trainer": first}
    saver = Checkpoint(to_save, str(tmp_path), filename_pattern="one.pt")
    first.add_event_handler(Events.EPOCH_COMPLETED, saver)
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), first.terminate)
    run(first)
    checkpoint = torch.load(tmp_path / "one.pt", weights_only=True)
    assert_same_bits({k: v for k, v in checkpoint["model"].items() if "bn" in k and "running" in k},
                     {k: v for k, v in statistics(make_model()).items() if "running" in k})  # fmt: skip

    resumed = make_model()
    with torch.no_grad():
        for tensor in resumed.parameters():
            tensor.zero_()
    second = make_trainer(resumed)
    BNGuardHandler(resumed, "restore").attach(second)
    Checkpoint.load_objects({"model": resumed, "optimizer": second.optimizer, "trainer": second}, checkpoint)
    torch.set_rng_state(randoms[0])
    second.run(make_loader(), max_epochs=2)
    assert_same_bits(torch.tensor(first.losses + second.losses), torch.tensor(trainer.losses))
    assert_same_bits(state_of(resumed), state_of(whole))
    assert_clean(resumed)


def test_checkpoint_loaded_inside_the_run_is_a_change() -> None:
    """Statistics that a handler loads inside the run are put back, and that is said."""
    model, other = make_model(), make_model()
    write(other)
    evaluator = create_supervised_evaluator(model)
    evaluator.add_event_handler(Events.STARTED, lambda: model.load_state_dict(other.state_dict()))
    BNGuardHandler(model).attach(evaluator)
    with pytest.raises(bnguard.StatsChangedError, match=r"load_state_dict\(\)"):
        evaluator.run(make_loader())
    assert not drifted(model)


# Attaching and detaching.


def test_one_handler_serves_several_engines_and_runs() -> None:
    """Trainer and evaluator share a handler, an evaluation inside a run is a block inside a block, and runs repeat."""
    model = make_model()
    trainer, evaluator = make_trainer(model), create_supervised_evaluator(model)
    handler = BNGuardHandler(model, use_running_stats=True)
    handler.attach(trainer)
    handler.attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(make_loader()))
    for _ in range(2):
        assert_untouched(model, lambda: run(trainer))
        assert_clean(model)


def test_two_handlers_are_nested() -> None:
    """The handler attached first is the inner one and decides; ``detach()`` in any order gives the engine back."""
    model = make_model()
    trainer = make_trainer(model)
    inner, outer = BNGuardHandler(model, "restore"), BNGuardHandler(model)
    inner.attach(trainer)
    outer.attach(trainer)
    assert_untouched(model, lambda: run(trainer))
    inner.detach()
    with pytest.raises(bnguard.StatsChangedError):
        run(trainer)
    outer.detach()
    assert "run" not in vars(trainer)
    trainer.state.max_epochs = None
    run(trainer)
    assert drifted(model)


def test_detach_leaves_the_engine_as_it_was() -> None:
    """Afterwards the engine's ``run`` is its class's, no handler of ours is left, and runs are unguarded."""
    model = make_model()
    trainer = make_trainer(model)
    before = {event: list(handlers) for event, handlers in trainer._event_handlers.items() if handlers}
    handler = BNGuardHandler(model)
    handler.attach(trainer, Events.EPOCH_COMPLETED)
    assert inspect.signature(trainer.run) == inspect.signature(Engine(lambda *_: None).run)
    handler.detach()
    handler.detach()
    assert "run" not in vars(trainer)
    assert {event: list(handlers) for event, handlers in trainer._event_handlers.items() if handlers} == before
    run(trainer)
    assert drifted(model)
    handler.attach(trainer)


def test_detach_inside_the_run_guards_it_to_its_end() -> None:
    """The run under way keeps its guard; the next one has none."""
    model = make_model()
    trainer = make_trainer(model)
    handler = BNGuardHandler(model, "restore")
    handler.attach(trainer)
    trainer.add_event_handler(Events.STARTED, handler.detach)
    assert_untouched(model, lambda: run(trainer))
    run(trainer)
    assert drifted(model)


def test_wrapper_of_somebody_else_stays() -> None:
    """Who wraps ``run`` after us keeps his wrapper when we go; ours inside it does nothing any more."""
    model = make_model()
    trainer = make_trainer(model)
    handler = BNGuardHandler(model)
    handler.attach(trainer)
    guarded, calls = trainer.run, []
    trainer.run = lambda *args, **kwargs: calls.append(1) or guarded(*args, **kwargs)
    handler.detach()
    run(trainer)
    assert calls == [1]
    assert drifted(model)


def test_engine_that_nobody_keeps_can_run() -> None:
    """``make_trainer(...).run(...)`` works, and engine and model are collected afterwards."""

    def make(model: nn.Module) -> Engine:
        trainer = make_trainer(model)
        BNGuardHandler(model, "restore").attach(trainer)
        return trainer

    model = make_model()
    assert_untouched(model, lambda net=model: make(net).run(make_loader()))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("options", [{}, {"until_epoch": 1}], ids=["whole", "phase"])
def test_finished_run_keeps_nothing(options: Any) -> None:
    """What an engine has between runs is what it had before the first, also after a run that failed."""
    models = make_model(), make_model()
    trainer, failing = map(make_trainer, models)
    for model, engine in zip(models, (trainer, failing), strict=True):
        BNGuardHandler(model, "restore", **options).attach(engine)
    failing.add_event_handler(Events.ITERATION_STARTED, fail)
    before = [dict(vars(engine.run)) for engine in (trainer, failing)]
    trainer.run(make_loader(), max_epochs=2)
    with pytest.raises(OSError, match="mine"):
        failing.run(make_loader())
    assert [dict(vars(engine.run)) for engine in (trainer, failing)] == before


def fail(engine: Engine) -> None:
    """A handler with an error."""
    raise OSError("mine")


def test_copy_of_an_engine_guards_the_copy_of_the_model() -> None:
    """A deep copy of an engine, its handler and its model is one of its own."""
    model = make_model()
    engine = Engine(Forward(model))
    handler = BNGuardHandler(model, "restore")
    handler.attach(engine)
    copied = copy.deepcopy(engine)
    other = copied._process_function.model
    assert other is not model
    assert_untouched(other, lambda: copied.run(make_loader()))
    handler.detach()
    engine.run(make_loader())
    assert drifted(model)


def test_copy_of_an_engine_that_shares_the_model_guards_that() -> None:
    """A step that is a function is not copied with the engine, and neither is the model in it."""
    model = make_model()
    engine = Engine(lambda engine, batch: model(batch[0]))
    handler = BNGuardHandler(model, "restore")
    handler.attach(engine, check_at=Events.EPOCH_COMPLETED)
    copied = copy.deepcopy(engine)
    assert_untouched(model, lambda: copied.run(make_loader()))
    assert handler.layers
    assert_clean(model)
    assert_untouched(model, lambda: engine.run(make_loader()))


class Forward:
    """A step that can be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, engine: Engine, batch: Any) -> None:
        self.model(batch[0])


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"on_change": "raises"}, ValueError, "on_change='raises'.*'raise'"),
        ({"use_running_stats": 1}, TypeError, "use_running_stats must be True or False, got 1"),
        ({"affine": None}, TypeError, "affine must be True or False, got None"),
        ({"updates": -1}, ValueError, "updates=-1"),
        ({"use_running_stats": True, "updates": 1}, ValueError, "contradicts updates=1"),
        ({"include": "layer9"}, ValueError, "layer9"),
        ({"exclude": "*"}, ValueError, "exclude"),
        ({"target": None}, TypeError, "takes the model or a part of it, since .* got None"),
        ({"target": "backbone"}, TypeError, "an engine does not know its model, got 'backbone'"),
    ],
    ids=str,
)
def test_bad_option_is_refused(options: Any, error: type[Exception], text: str) -> None:
    """At construction, with the offending value, and the model untouched."""
    model = make_model()
    with pytest.raises(error, match=text):
        BNGuardHandler(**{"target": model, **options})
    assert_clean(model)


def test_bad_engine_and_event_are_refused() -> None:
    """``attach`` names what it got; the engine is as it was, and keeps raising exceptions."""
    handler, engine = BNGuardHandler(make_model()), Engine(lambda *_: 1 / 0)
    engine.logger.disabled = True
    with pytest.raises(TypeError, match=r"takes an ignite.engine.Engine, got Sequential"):
        handler.attach(make_model())
    for event in (Events.EXCEPTION_RAISED, Events.COMPLETED | Events.EXCEPTION_RAISED):
        with pytest.raises(ValueError, match="no longer raises exceptions"):
            handler.attach(engine, event)
    with pytest.raises(ValueError, match="nonsense"):
        handler.attach(engine, "nonsense")
    assert "run" not in vars(engine)
    handler.attach(engine)
    with pytest.raises(ValueError, match="attached to the engine already"):
        handler.attach(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run([1])


def test_model_without_statistics_is_warned_about() -> None:
    """At the line that makes the handler; runs go on."""
    model = nn.Linear(2, 2)
    with warns(at="BNGuardHandler(model)"):
        handler = BNGuardHandler(model)
    engine = Engine(lambda *_: 1)
    handler.attach(engine)
    assert engine.run([1]).output == 1


def test_missing_ignite_gives_the_install_line() -> None:
    """One sentence that says what to install."""
    line = "ImportError: bnguard.integrations.ignite needs pytorch-ignite: pip install 'bnguard[ignite]'"
    assert error_without("ignite", "bnguard.integrations.ignite") == line


def test_examples_run() -> None:
    """The examples of the module's docstring do what it says."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {"model": model, "optimizer": optimizer, "nn": nn, "loader": make_loader()}
    before = values(statistics(model))
    examples = examples_of(integration)
    assert len(examples) == 2
    for example in examples:
        run_code(example, names)
    assert_same_bits(statistics(model), before)
    assert names["trainer"].state.epoch == 2
    names["handler"].detach()
    names["trainer"].run(make_loader(), max_epochs=2)
    assert drifted(model)


@pytest.mark.usefixtures("no_graphs")
def test_guard_of_a_copy_says_that_it_never_ran() -> None:
    """The engine runs the original. An engine that ends in its first iteration has run nothing that could tell."""
    model = make_model()
    other, trainer = copy.deepcopy(model), make_trainer(model)
    BNGuardHandler(other, "restore").attach(trainer)
    with pytest.warns(bnguard.BNGuardWarning, match=r"no forward of a guarded layer ran inside BNGuardHandler\(\)"):
        run(trainer)
    assert drifted(model)
    assert_clean(other)
    stopped = make_trainer(make_model())
    stopped.add_event_handler(Events.ITERATION_STARTED, lambda engine: engine.terminate())
    BNGuardHandler(other, "restore").attach(stopped)
    run(stopped)
