"""The guard: as a context manager, a decorator and by hand; nested, with budgets, with its parameters held."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    assert_untouched,
    outcome,
    state_of,
    statistics,
    values,
    warns,
)
from tests.nets import TwoPasses, batch_norms, conv_net, images, mlp, rows, warmed

POLICIES = ("raise", "warn", "restore")


def count_of(net: nn.Module) -> int:
    """Batches that the first layer with statistics has counted."""
    return int(next(t for name, t in statistics(net).items() if name.endswith("num_batches_tracked")))


def small_net() -> nn.Sequential:
    """One layer, with statistics that are not the initial ones."""
    return warmed(nn.Sequential(nn.BatchNorm2d(2)))


# As a context manager, and by hand.


@pytest.mark.parametrize("case", [(conv_net, images), (mlp, rows)], ids=["conv_net", "mlp"])
def test_restore_trains_as_its_twin(case: Any, device: torch.device) -> None:
    """A train step under restore gives the twin's output and gradients, and moves no statistic."""
    make_net, make_batch = case
    net, x = make_net().to(device), make_batch().to(device)
    twin = copy.deepcopy(net)

    def run() -> None:
        with bnguard.frozen(net, "restore"):
            assert_same_bits(outcome(net, x), outcome(twin, x))

    assert_untouched(net, run)
    assert_clean(net)


def test_restore_draws_the_twins_random_numbers() -> None:
    """A guard neither draws random numbers nor sets a seed."""
    net, twin = conv_net(), conv_net()
    for model, guard in ((net, bnguard.frozen(net, "restore")), (twin, ExitStack())):
        torch.manual_seed(4)
        with guard:
            model(images())
        model.drawn = torch.get_rng_state()
    assert_same_bits(net.drawn, twin.drawn)


def test_enter_returns_the_guard() -> None:
    """``with frozen(...) as guard`` binds the guard, and ``start()`` returns it."""
    guard = bnguard.frozen(small_net())
    with guard as entered:
        assert entered is guard
    assert guard.start() is guard
    guard.stop()


def test_nothing_is_touched_before_the_block() -> None:
    """Making a guard puts nothing on the model."""
    net = conv_net()
    guard = bnguard.frozen(net, affine=True)
    assert_clean(net)
    net(images())
    assert guard.changes == ()


def test_start_guards_until_stop() -> None:
    """Between ``start()`` and ``stop()`` forwards are held; afterwards they are not."""
    net = small_net()
    guard = bnguard.frozen(net, "restore").start()
    net(images())
    assert count_of(net) == 3
    guard.stop()
    net(images())
    assert count_of(net) == 4
    assert_clean(net)


def test_stop_without_a_block_does_nothing() -> None:
    """``stop()`` before ``start()``, and a second time, does nothing."""
    guard = bnguard.frozen(small_net())
    guard.stop()
    guard.start()
    guard.stop()
    guard.stop()
    guard.check()


def test_stop_raises_as_the_end_of_a_block() -> None:
    """What only the comparison sees is raised by ``stop()``, once, after it was put back."""
    net = small_net()
    before = state_of(net)
    guard = bnguard.frozen(net).start()
    net[0].running_mean += 1
    with pytest.raises(bnguard.StatsChangedError):
        guard.stop()
    assert_same_bits(net.state_dict(), before)
    guard.stop()


def test_guard_can_be_used_again() -> None:
    """Each use is a block of its own: another snapshot, other changes, a budget and a warning of its own."""
    net = small_net()
    guard = bnguard.frozen(net, "warn", updates=1)
    for _ in range(2):
        with guard:
            net(images())
        assert guard.changes == ()
        with warns(), guard:
            net(images())
            net(images())
        assert [change.updates for change in guard.changes] == [1]


def test_guard_finds_layers_anew_in_each_block() -> None:
    """What came into the model between two blocks is guarded in the second."""
    net = small_net()
    guard = bnguard.frozen(net, "restore")
    with guard:
        pass
    net.append(nn.BatchNorm2d(2))
    with guard:
        net(images())
    assert net[1].num_batches_tracked == 0


def _tracks_from_now_on(layer: nn.BatchNorm2d) -> None:
    layer.running_mean, layer.running_var = torch.zeros(2), torch.ones(2)
    layer.num_batches_tracked, layer.track_running_stats = torch.tensor(0), True


def _counts_from_now_on(layer: nn.BatchNorm2d) -> None:
    layer.num_batches_tracked = torch.tensor(0)


def _has_values_from_now_on(layer: nn.BatchNorm2d) -> None:
    layer.running_mean, layer.running_var = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("on_change", ["raise", "restore"])
@pytest.mark.parametrize(
    ("missing", "begin"),
    [
        (("running_mean", "running_var", "num_batches_tracked"), _tracks_from_now_on),
        (("num_batches_tracked",), _counts_from_now_on),
        (("running_mean", "running_var"), _has_values_from_now_on),
    ],
    ids=["statistics", "counter", "values"],
)
def test_guard_that_is_used_again_sees_statistics_that_came_in_between(
    on_change: Any, missing: tuple[str, ...], begin: Any
) -> None:
    """A layer that tracks since, or a counter that was None: as a new guard does, whichever block it is."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval())
    layer = net[0]
    for name in missing:
        setattr(layer, name, None)
    if len(missing) == 3:
        layer.track_running_stats = False
    layer.eval()
    guard = bnguard.frozen(net, on_change)
    for _ in range(4):
        with guard:
            net(images())
    begin(layer)
    before = state_of(net)
    layer.train()
    for _ in range(3):
        with contextlib.suppress(bnguard.StatsChangedError), guard:
            net(images())
        assert_same_bits(net.state_dict(), before)
        if on_change == "raise":
            assert [change.names for change in guard.changes] == [("0",)]
    assert_clean(net)


def test_guard_can_be_entered_inside_itself() -> None:
    """The inner block of one guard ends without ending the outer one."""
    net = small_net()
    before = state_of(net)
    guard = bnguard.frozen(net, "restore")
    with guard:
        with guard:
            net(images())
        net(images())
        assert_same_bits(net.state_dict(), before)
    net(images())
    assert count_of(net) == 4
    assert_clean(net)


def test_guard_entered_inside_itself_counts_for_each_block() -> None:
    """A budget belongs to a block: the inner one's updates are also the outer one's."""
    net = small_net()
    guard = bnguard.frozen(net, "restore", updates=2)
    with guard:
        net(images())
        with guard:
            net(images())
            net(images())
        net(images())
    assert count_of(net) == 5


def test_blocks_of_one_guard_in_two_threads_end_on_their_own() -> None:
    """Each thread leaves the block that it entered."""
    net = small_net()
    guard = bnguard.frozen(net, "restore")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with guard:
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(20)
    with guard:
        pass
    net(images())
    assert count_of(net) == 3
    leave.set()
    thread.join(20)
    net(images())
    assert count_of(net) == 4
    assert_clean(net)


def test_another_thread_may_stop_what_this_one_started() -> None:
    """A thread that has entered nothing itself leaves the last block."""
    net = small_net()
    guard = bnguard.frozen(net, "restore").start()
    net(images())
    assert count_of(net) == 3
    thread = threading.Thread(target=guard.stop)
    thread.start()
    thread.join(20)
    net(images())
    assert count_of(net) == 4


def test_mode_changes_inside_stay() -> None:
    """Which modules are in train mode is the user's business, inside and afterwards."""
    net = conv_net().eval()
    with bnguard.frozen(net, use_running_stats=True):
        net.train()
        net.head.eval()
    assert net.stem.training
    assert net.stem.bn.training
    assert not net.head[1].training


# As a decorator.


def test_decorated_function_runs_in_a_block() -> None:
    """Each call is a block, nothing outside one is, and the value is the function's."""
    net = small_net()

    @bnguard.frozen(net, "restore")
    def step(batch: Any, *, scale: int) -> Any:
        return net(batch) * scale

    assert_same_bits(step(images(), scale=2), copy.deepcopy(net)(images()) * 2)
    assert count_of(net) == 3
    net(images())
    assert count_of(net) == 4


def test_decorated_function_keeps_its_face() -> None:
    """Name, docstring and signature are the function's."""

    @bnguard.frozen(small_net())
    def step(batch: int, scale: float = 2.0) -> str:
        """Does it."""
        return ""

    assert step.__name__ == "step"
    assert step.__doc__ == "Does it."
    assert str(inspect.signature(step)) == "(batch: 'int', scale: 'float' = 2.0) -> 'str'"


def test_decorated_method_runs_in_a_block() -> None:
    """Methods, class methods and static methods are guarded, whichever decorator is outside."""
    net = small_net()
    guard = bnguard.frozen(net, "restore")

    class Trainer:
        @guard
        def method(self) -> Any:
            net(images())
            return type(self)

        @guard
        @classmethod
        def above(cls) -> Any:
            net(images())
            return cls

        @classmethod
        @guard
        def below(cls) -> Any:
            net(images())
            return cls

        @guard
        @staticmethod
        def static() -> Any:
            net(images())
            return Trainer

    trainer = Trainer()
    assert trainer.method() is trainer.above() is Trainer.below() is trainer.static() is Trainer
    assert count_of(net) == 3


def test_decorated_function_may_call_itself() -> None:
    """Recursion nests blocks of one guard."""
    net = small_net()

    @bnguard.frozen(net, "restore")
    def step(depth: int) -> None:
        net(images())
        if depth:
            step(depth - 1)
        net(images())

    step(3)
    assert count_of(net) == 3
    assert_clean(net)


def test_decorated_function_raises_through() -> None:
    """An exception of the function comes out as it is, and the block is over."""
    net = small_net()

    @bnguard.frozen(net, "restore")
    def step() -> None:
        net(images())
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        step()
    assert count_of(net) == 3
    assert_clean(net)


def test_decorator_refuses_what_is_no_function() -> None:
    """A class and a value that cannot be called are refused."""
    guard = bnguard.frozen(small_net())
    with pytest.raises(TypeError, match=r"frozen\(\.\.\.\) decorates functions, got <class"):
        guard(nn.Module)
    with pytest.raises(TypeError, match=r"frozen\(\.\.\.\) decorates functions, got 3"):
        guard(3)  # type: ignore[type-var]


class Log(list):  # type: ignore[type-arg]
    """What happened, in order; ``run`` adds what the layer has counted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def run(self, where: str) -> None:
        """One forward in train mode."""
        before = count_of(self.net)
        self.net(images())
        self.append((where, count_of(self.net) - before))


def make_generator(log: Log, guard: bnguard.frozen) -> Any:
    """A generator that runs the net at every step, and one that goes on after an exception."""

    @guard
    def generate(first: str) -> Iterator[str]:
        log.run(first)
        try:
            sent = yield "one"
            log.append(sent)
            log.run("second")
            yield "two"
        except ValueError:
            log.run("caught")
            yield "three"
        finally:
            log.run("finally")
        return "end"

    return generate


def test_generator_is_guarded_at_each_resumption() -> None:
    """The generator's own code is inside; what the caller does in between is not."""
    net = small_net()
    log = Log(net)
    generator = make_generator(log, bnguard.frozen(net, "restore"))("first")
    log.run("before")
    assert next(generator) == "one"
    assert_clean(net)
    log.run("between")
    assert generator.send("sent") == "two"
    log.run("between")
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "end"
    held, free = 0, 1
    steps = [("before", free), ("first", held), ("between", free), "sent", ("second", held), ("between", free)]
    assert log == [*steps, ("finally", held)]
    assert_clean(net)


def test_generator_is_guarded_when_something_is_thrown_in() -> None:
    """Code that handles an exception thrown in is inside, and may go on."""
    net = small_net()
    log = Log(net)
    generator = make_generator(log, bnguard.frozen(net, "restore"))("first")
    next(generator)
    assert generator.throw(ValueError("thrown")) == "three"
    log.run("between")
    assert next(generator, "over") == "over"
    assert log == [("first", 0), ("caught", 0), ("between", 1), ("finally", 0)]


def test_generator_lets_a_foreign_exception_through() -> None:
    """An exception that the generator does not handle comes out of ``throw()``, its ``finally`` guarded."""
    net = small_net()
    log = Log(net)
    generator = make_generator(log, bnguard.frozen(net, "restore"))("first")
    next(generator)
    error = KeyError("thrown")
    with pytest.raises(KeyError) as caught:
        generator.throw(error)
    assert caught.value is error
    assert log == [("first", 0), ("finally", 0)]
    assert_clean(net)


def test_generator_is_guarded_when_it_is_closed() -> None:
    """``close()`` runs the generator's ``finally`` inside a block; closing before the first step runs nothing."""
    net = small_net()
    log = Log(net)
    generate = make_generator(log, bnguard.frozen(net, "restore"))
    generator = generate("first")
    next(generator)
    generator.close()
    assert log == [("first", 0), ("finally", 0)]
    generate("never").close()
    assert len(log) == 2
    assert_clean(net)


def test_generator_that_is_dropped_is_guarded() -> None:
    """A generator that nobody finishes runs its ``finally`` in a block, too."""
    net = small_net()
    log = Log(net)
    for _ in make_generator(log, bnguard.frozen(net, "restore"))("first"):
        break
    gc.collect()
    assert log == [("first", 0), ("finally", 0)]
    assert_clean(net)


def test_generator_is_delegated_to() -> None:
    """``yield from`` sees a generator: it passes on what is sent, and the value at the end."""
    net = small_net()
    log = Log(net)
    generate = make_generator(log, bnguard.frozen(net, "restore"))

    def outer() -> Iterator[Any]:
        log.append((yield from generate("first")))

    generator = outer()
    assert [next(generator), generator.send("sent"), next(generator, "over")] == ["one", "two", "over"]
    assert log == [("first", 0), "sent", ("second", 0), ("finally", 0), "end"]


def test_generator_that_is_stopped_by_the_guard_is_over() -> None:
    """A generator whose step fails at the comparison is closed, and its ``finally`` has run."""
    net = small_net()
    log: list[str] = []

    @bnguard.frozen(net)
    def generate() -> Iterator[int]:
        try:
            net[0].running_mean += 1
            yield 1
            yield 2
        finally:
            log.append("closed")

    generator = generate()
    with pytest.raises(bnguard.StatsChangedError):
        next(generator)
    assert log == ["closed"]
    assert list(generator) == []


def test_coroutine_is_guarded_at_each_resumption() -> None:
    """A coroutine's own code is inside; other tasks that run while it waits are not."""
    net = small_net()
    log = Log(net)

    @bnguard.frozen(net, "restore")
    async def guarded() -> str:
        log.run("guarded")
        await asyncio.sleep(0)
        log.run("guarded")
        return "done"

    async def free() -> None:
        log.run("free")
        await asyncio.sleep(0)
        log.run("free")

    async def main() -> list[Any]:
        return await asyncio.gather(guarded(), free())

    assert asyncio.run(main()) == ["done", None]
    assert log == [("guarded", 0), ("free", 1), ("guarded", 0), ("free", 1)]
    assert inspect.iscoroutinefunction(guarded)
    assert_clean(net)


def test_coroutine_is_guarded_when_it_is_cancelled() -> None:
    """What a coroutine does about its cancellation is inside."""
    net = small_net()
    log = Log(net)

    @bnguard.frozen(net, "restore")
    async def guarded() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            log.run("finally")

    async def main() -> None:
        task = asyncio.create_task(guarded())
        await asyncio.sleep(0)
        log.run("free")
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert log == [("free", 1), ("finally", 0)]
    assert_clean(net)


def make_async_generator(log: Log, guard: bnguard.frozen) -> Any:
    """As ``make_generator``, asynchronous."""

    @guard
    async def generate(first: str) -> AsyncIterator[str]:
        log.run(first)
        try:
            sent = yield "one"
            log.append(sent)
            await asyncio.sleep(0)
            log.run("second")
            yield "two"
        except ValueError:
            log.run("caught")
            yield "three"
        finally:
            await asyncio.sleep(0)
            log.run("finally")

    return generate


def test_async_generator_is_guarded_at_each_resumption() -> None:
    """As a generator: its own code is inside, the caller's is not, what is sent arrives."""
    net = small_net()
    log = Log(net)
    generate = make_async_generator(log, bnguard.frozen(net, "restore"))

    async def main() -> None:
        generator = generate("first")
        assert await anext(generator) == "one"
        log.run("between")
        assert await generator.asend("sent") == "two"
        log.run("between")
        assert [item async for item in generator] == []

    asyncio.run(main())
    steps = [("first", 0), ("between", 1), "sent", ("second", 0), ("between", 1)]
    assert log == [*steps, ("finally", 0)]
    assert inspect.isasyncgenfunction(generate)
    assert_clean(net)


def test_async_generator_is_guarded_when_something_is_thrown_in() -> None:
    """Code that handles what ``athrow()`` brings is inside."""
    net = small_net()
    log = Log(net)
    generate = make_async_generator(log, bnguard.frozen(net, "restore"))

    async def main() -> None:
        generator = generate("first")
        await anext(generator)
        assert await generator.athrow(ValueError("thrown")) == "three"
        log.run("between")
        with pytest.raises(KeyError, match="mine"):
            await generator.athrow(KeyError("mine"))

    asyncio.run(main())
    assert log == [("first", 0), ("caught", 0), ("between", 1), ("finally", 0)]


def test_async_generator_is_guarded_when_it_is_closed() -> None:
    """``aclose()`` runs the ``finally`` inside a block."""
    net = small_net()
    log = Log(net)
    generate = make_async_generator(log, bnguard.frozen(net, "restore"))

    async def main() -> None:
        generator = generate("first")
        await anext(generator)
        await generator.aclose()

    asyncio.run(main())
    assert log == [("first", 0), ("finally", 0)]
    assert_clean(net)


def test_async_generator_that_is_dropped_is_guarded() -> None:
    """An asynchronous generator that nobody finishes runs its ``finally`` in a block, too."""
    net = small_net()
    log = Log(net)
    generate = make_async_generator(log, bnguard.frozen(net, "restore"))

    async def main() -> None:
        async for _ in generate("first"):
            break
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert log == [("first", 0), ("finally", 0)]
    assert_clean(net)


# Nested guards.

RAISED, HELD, STOOD = "raised", "held", "stood"
OUTCOMES = {
    # (inner, outer): what becomes of an update, and the warnings of the inner and the outer guard.
    ("raise", "raise"): (RAISED, 0),
    ("raise", "warn"): (RAISED, 0),
    ("raise", "restore"): (RAISED, 0),
    ("warn", "raise"): (RAISED, 0),
    ("warn", "warn"): (STOOD, 2),
    ("warn", "restore"): (HELD, 0),
    ("restore", "raise"): (HELD, 0),
    ("restore", "warn"): (HELD, 0),
    ("restore", "restore"): (HELD, 0),
}


@pytest.mark.parametrize(("inner", "outer"), OUTCOMES)
@pytest.mark.parametrize("family", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_innermost_guard_decides(inner: Any, outer: Any, family: Any) -> None:
    """What the innermost guard lets stand is up to the next one out; what that one prevents never happened within."""
    options = {"track_running_stats": True} if family is nn.InstanceNorm2d else {}
    net = warmed(nn.Sequential(family(2, **options)))
    twin, before = copy.deepcopy(net), values(statistics(net))
    expected, number = OUTCOMES[inner, outer]
    with warns(count=number):
        outer_guard, inner_guard = bnguard.frozen(net, outer), bnguard.frozen(net, inner)
        try:
            with outer_guard, inner_guard:
                output = net(images())
                assert expected != RAISED
                assert_same_bits(output, twin(images()))
        except bnguard.StatsChangedError:
            assert expected == RAISED
    assert_same_bits(statistics(net), statistics(twin) if expected == STOOD else before)
    deciding = {"raise": inner_guard if inner == "raise" else outer_guard}
    for guard in (inner_guard, outer_guard):
        seen = expected == STOOD or (expected == RAISED and guard is deciding["raise"])
        assert len(guard.changes) == seen
    assert_clean(net)


@pytest.mark.parametrize("inner", POLICIES)
def test_inner_guard_with_use_running_stats_decides(inner: Any) -> None:
    """Inside any guard a block with use_running_stats normalises with the statistics, and nobody sees an update."""
    net = small_net()
    twin = copy.deepcopy(net).eval()
    with bnguard.frozen(net, inner) as guard, bnguard.frozen(net, use_running_stats=True):
        assert_same_bits(net(images()), twin(images()))
    assert guard.changes == ()


@pytest.mark.parametrize("inner", POLICIES)
def test_outer_guard_with_use_running_stats_gets_what_stands(inner: Any) -> None:
    """Around a block with use_running_stats: raise raises, restore normalises with the batch, warn is overruled."""
    net = small_net()
    before = state_of(net)
    expected = copy.deepcopy(net).train(inner == "restore")(images())
    guard = bnguard.frozen(net, use_running_stats=True)
    if inner == "raise":
        with pytest.raises(bnguard.StatsChangedError), guard, bnguard.frozen(net, inner):
            net(images())
    else:
        with guard, bnguard.frozen(net, inner):
            assert_same_bits(net(images()), expected)
    assert guard.changes == ()
    assert_same_bits(net.state_dict(), before)


def test_outer_raise_spends_nothing_of_the_inner_budget() -> None:
    """An update that an outer guard stops is not counted within."""
    net = small_net()
    with bnguard.frozen(net, "restore", updates=1):
        with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net, "raise"):
            net(images())
        net(images())
    assert count_of(net) == 4
    net = small_net()
    inner = bnguard.frozen(net, "restore", updates=1)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net, "raise"), inner:
        net(images())
    assert inner.changes == ()
    assert count_of(net) == 3


def test_inner_budget_is_put_to_the_outer_guard() -> None:
    """An update within the inner budget is a change for the guard around it."""
    net = small_net()
    with warns(), bnguard.frozen(net, "warn") as outer, bnguard.frozen(net, "restore", updates=1) as inner:
        for _ in range(3):
            net(images())
    assert count_of(net) == 4
    assert [change.updates for change in outer.changes] == [1]
    assert inner.changes == ()


def test_outer_budget_pays_for_what_stands_within() -> None:
    """An update that stands is paid by every budget around it, and the outer one may end first."""
    net = small_net()
    with bnguard.frozen(net, "restore", updates=1), bnguard.frozen(net, "raise", updates=2):
        for _ in range(4):
            net(images())
    assert count_of(net) == 4


def test_inner_exit_lets_a_write_stand_and_outer_exit_undoes_it() -> None:
    """A write by hand is a change for both: the inner one warns, the outer one restores and warns."""
    net = small_net()
    before = state_of(net)
    with warns(count=2), bnguard.frozen(net, "restore"):
        with bnguard.frozen(net, "warn"):
            net[0].running_mean += 1
        assert not torch.equal(net[0].running_mean, before["0.running_mean"])
    assert_same_bits(net.state_dict(), before)


def test_inner_exit_undoes_a_write_before_the_outer_one_sees_it() -> None:
    """What the inner guard has put back is no change for the outer one."""
    net = small_net()
    with bnguard.frozen(net) as outer, warns(), bnguard.frozen(net, "restore"):
        net[0].running_mean += 1
    assert outer.changes == ()


def test_guards_of_one_model_end_in_any_order() -> None:
    """Blocks opened by hand may end in the order of entry; the one left goes on guarding."""
    net = small_net()
    first, second = bnguard.frozen(net, "restore").start(), bnguard.frozen(net, use_running_stats=True).start()
    twin = copy.deepcopy(net)
    first.stop()
    assert_same_bits(net(images()), twin.eval()(images()))
    second.stop()
    assert count_of(net) == 3
    assert_clean(net)


def test_guard_of_a_part_leaves_the_rest_to_the_guard_of_the_whole() -> None:
    """Guards on overlapping models meet at the layers that they share."""
    net = conv_net()
    with warns() as caught, bnguard.frozen(net, "warn") as outer, bnguard.frozen(net.stem, "restore"):
        net(images())
    assert caught.message.startswith("body.bn (BatchNorm2d)")
    assert [change.names for change in outer.changes] == [("body.bn",)]
    assert net.stem.bn.num_batches_tracked == 3


# Budgets.


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_under_raise_stops_the_next_update(budget: int) -> None:
    """N updates are the twin's; update N + 1 raises and changes nothing."""
    net = small_net()
    twin = copy.deepcopy(net)
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net, updates=budget):
        for _ in range(budget):
            assert_same_bits(net(images()), twin(images()))
        net(images())
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert caught.value.changes[0].updates == 1


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_under_restore_holds_the_rest(budget: int) -> None:
    """N updates are the twin's; what follows is held, silently."""
    net = small_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore", updates=budget) as guard:
        for _ in range(budget):
            assert_same_bits(net(images()), twin(images()))
        expected = state_of(twin)
        for _ in range(3):
            assert_same_bits(net(images()), twin(images()))
    assert_same_bits(net.state_dict(), expected)
    assert guard.changes == ()


def test_budget_under_warn_warns_about_the_next_update() -> None:
    """N updates are silent; update N + 1 stands with a warning."""
    net = small_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "warn", updates=1) as guard:
        net(images())
        assert guard.changes == ()
        with warns(at="net(images())"):
            net(images())
        net(images())
    for _ in range(3):
        twin(images())
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert [change.updates for change in guard.changes] == [2]


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_budget_not_used_up_is_no_finding(on_change: Any) -> None:
    """Updates within the budget stay after the block, and nobody says a word."""
    net = small_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, on_change, updates=2) as guard:
        net(images())
        guard.check()
    twin(images())
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert guard.changes == ()


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_budget_does_not_cover_writes(on_change: Any) -> None:
    """A write by hand is undone to the state after the last allowed update."""
    net = small_net()
    twin = copy.deepcopy(net)
    twin(images())
    guard = bnguard.frozen(net, on_change, updates=2)
    finding = pytest.raises(bnguard.StatsChangedError) if on_change == "raise" else warns()
    with finding, guard:
        net(images())
        net[0].running_mean += 1
    assert_same_bits(net.state_dict(), twin.state_dict())


def test_budget_belongs_to_each_layer() -> None:
    """Two layers may update once each; one that has, holds no other back."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    with bnguard.frozen(net, "restore", updates=1):
        net[0](images())
        net(images())
        net(images())
    assert [int(layer.num_batches_tracked) for layer in net] == [1, 1]


def test_budget_of_one_finds_a_step_with_two_forwards() -> None:
    """``updates=1`` around a step is the check that a step with several forwards fails."""
    with (
        pytest.raises(bnguard.StatsChangedError, match="has updated once"),
        bnguard.frozen(net := TwoPasses(), updates=1),
    ):
        net(images())


def test_budget_is_not_spent_by_eval_mode() -> None:
    """Forwards in eval mode are free."""
    net = small_net()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net, updates=1):
        net.eval()(images())
        net.train()(images())
        net.eval()(images())
        assert count_of(net) == 4
        net.train()(images())
    assert count_of(net) == 4


# use_running_stats.


def test_use_running_stats_changes_the_mode_of_guarded_layers_only(device: torch.device) -> None:
    """Guarded layers are as in eval mode; dropout still drops."""
    net, x = conv_net().to(device), images().to(device)
    twin, before = copy.deepcopy(net), state_of(net)
    for layer in batch_norms(twin):
        layer.eval()
    with bnguard.frozen(net, use_running_stats=True):
        net.train()
        assert_same_bits(outcome(net, x), outcome(twin, x))
    assert_same_bits(net.state_dict(), before)
    torch.manual_seed(11)
    assert not torch.equal(outcome(twin, x)["output"], twin.eval()(x))


def test_use_running_stats_takes_a_batch_of_one() -> None:
    """As in eval mode, one value per channel is enough."""
    net = mlp()
    twin = copy.deepcopy(net).eval()
    with bnguard.frozen(net, use_running_stats=True):
        assert_same_bits(net(rows(1)), twin(rows(1)))


def test_use_running_stats_leaves_eval_mode_alone() -> None:
    """A net in eval mode computes as unguarded."""
    net = conv_net().eval()
    expected = net(images())
    with bnguard.frozen(net, use_running_stats=True):
        assert_same_bits(net(images()), expected)


# affine.


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
    """One train step."""
    optimizer.zero_grad(set_to_none=set_to_none)
    outcome(net, images())
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_affine_holds_parameters_against_the_optimizer(optimizer: str, set_to_none: bool) -> None:
    """Weight decay and momentum of earlier steps do not move a held parameter; the others train."""
    net = conv_net()
    optim = OPTIMIZERS[optimizer](net.parameters())
    step(net, optim)
    affine = {f"{name}.{key}" for name in ("stem.bn", "body.bn") for key in ("weight", "bias")}
    before = state_of(net)
    with bnguard.frozen(net, "restore", affine=True):
        for _ in range(2):
            step(net, optim, set_to_none)
        assert all((net.get_parameter(name).grad is None) for name in affine)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in affine), name
    assert_clean(net)


def test_without_affine_parameters_train() -> None:
    """``affine=False`` leaves weights and biases to the optimizer: the net trains as its twin."""
    net = conv_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"):
        step(net, OPTIMIZERS["sgd"](net.parameters()))
    step(twin, OPTIMIZERS["sgd"](twin.parameters()))
    assert_same_bits(dict(net.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_affine_returns_flags_and_gradients(set_to_none: bool) -> None:
    """Flags and gradients of entry, the same objects, are back; also after a ``zero_grad()`` inside."""
    net = conv_net()
    outcome(net, images())
    net.body.bn.bias.requires_grad_(False)
    gradients = {name: parameter.grad for name, parameter in net.stem.bn.named_parameters()}
    kept = values(gradients)
    with bnguard.frozen(net, "restore", affine=True):
        assert not any(parameter.requires_grad for layer in batch_norms(net) for parameter in layer.parameters())
        assert net.stem.conv.weight.requires_grad
        net.zero_grad(set_to_none=set_to_none)
        outcome(net, images())
    assert all(parameter.grad is gradients[name] for name, parameter in net.stem.bn.named_parameters())
    assert_same_bits(gradients, kept)
    assert [parameter.requires_grad for layer in batch_norms(net) for parameter in layer.parameters()] == [
        True,
        True,
        True,
        False,
    ]


def test_affine_returns_flags_that_were_changed_inside() -> None:
    """``requires_grad_(True)`` inside does not outlast the block for a parameter that was frozen before."""
    net = small_net().requires_grad_(False)
    with bnguard.frozen(net, affine=True):
        net.requires_grad_(True)
    assert not net[0].weight.requires_grad


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_affine_blocks_may_overlap_and_end_in_any_order(order: tuple[int, int]) -> None:
    """Parameters stay held until the last block ends, and then have the flags and gradients of before the first."""
    net = conv_net()
    outcome(net, images())
    weight = net.stem.bn.weight
    gradient = weight.grad
    guards = [bnguard.frozen(net, "restore", affine=True).start() for _ in range(2)]
    guards[order[0]].stop()
    assert not weight.requires_grad
    assert weight.grad is None
    guards[order[1]].stop()
    assert weight.requires_grad
    assert weight.grad is gradient
    assert_clean(net)


def test_affine_returns_flags_after_an_exception() -> None:
    """A block that fails gives flags and gradients back."""
    net = conv_net()
    outcome(net, images())
    gradient = net.stem.bn.weight.grad
    with pytest.raises(ZeroDivisionError), bnguard.frozen(net, affine=True):
        assert net.stem.bn.weight.grad is None
        raise ZeroDivisionError
    assert net.stem.bn.weight.grad is gradient
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_affine_finds_a_write_to_a_parameter() -> None:
    """A parameter that is written to is put back and reported, as statistics are."""
    net = small_net()
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError, match=r"0 \(BatchNorm2d\): weight"), bnguard.frozen(net, affine=True):
        net[0].weight.data += 1
    assert_same_bits(net.state_dict(), before)


def test_affine_lets_a_write_stand_under_warn() -> None:
    """Under warn the written parameter stays, and is listed."""
    net = small_net()
    before = state_of(net)
    with warns(), bnguard.frozen(net, "warn", affine=True) as guard:
        net[0].weight.data += 1
    assert_same_bits(net[0].weight, before["0.weight"] + 1)
    assert guard.changes[0].buffers == ("weight",)


def test_affine_holds_only_parameters_of_guarded_layers() -> None:
    """``include`` decides about parameters too."""
    net = conv_net()
    with bnguard.frozen(net, affine=True, include="stem"):
        assert not net.stem.bn.weight.requires_grad
        assert net.body.bn.weight.requires_grad


# What a guard tells.


def test_changes_are_current_inside_the_block() -> None:
    """Under warn ``changes`` shows what forwards did so far, in the order of the model."""
    net = conv_net()
    with warns(), bnguard.frozen(net, "warn") as guard:
        net.body(net.stem.conv(images()))
        assert [(change.names, change.updates) for change in guard.changes] == [(("body.bn",), 1)]
        net(images())
        assert [(change.names, change.updates) for change in guard.changes] == [(("stem.bn",), 1), (("body.bn",), 2)]
    assert all(change.mean_shift > 0 for change in guard.changes)
    assert [change.prevented for change in guard.changes] == [False, False]


def test_change_says_what_where_and_how_often() -> None:
    """A change carries names, type, buffers, updates and the user's line of the first one."""
    net = small_net()
    with warns(), bnguard.frozen(net, "warn") as guard:
        net(images())  # the first one
        net(images())
    (change,) = guard.changes
    lines = inspect.getsource(test_change_says_what_where_and_how_often).splitlines()
    offset = next(index for index, line in enumerate(lines) if line.endswith("# the first one"))
    first = inspect.currentframe().f_code.co_firstlineno + offset
    assert change.names == ("0",)
    assert change.type == "BatchNorm2d"
    assert change.buffers == ("running_mean", "running_var", "num_batches_tracked")
    assert change.updates == 2
    assert change.where == f"tests/guard/test_frozen.py:{first} in test_change_says_what_where_and_how_often"


def test_changes_of_raise_are_prevented() -> None:
    """What was stopped is listed as prevented, also on the exception."""
    net = small_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net) as guard:
        net(images())
    assert guard.changes == caught.value.changes
    assert guard.changes[0].prevented
    assert guard.changes[0].mean_shift is None


def test_layers_are_known_before_the_first_block() -> None:
    """``layers`` lists what a block would guard, and how."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.ReLU())
    layers = bnguard.frozen(net).layers
    assert [(layer.names, layer.type) for layer in layers] == [(("0",), "BatchNorm2d"), (("1",), "SyncBatchNorm")]
    assert layers[0].buffers == ("running_mean", "running_var", "num_batches_tracked")
    assert_clean(net)


def test_report_is_text() -> None:
    """``report()`` says what is guarded and what changed."""
    net = small_net()
    guard = bnguard.frozen(net, "warn")
    assert guard.report().endswith("No change.")
    with warns(), guard:
        net(images())
    assert "1 layer changed:\n  0 (BatchNorm2d): running_mean, running_var and num_batches_tracked" in guard.report()


def test_check_is_silent_while_nothing_changed() -> None:
    """``check()`` of an untouched net, and without a block, says nothing."""
    net = small_net()
    guard = bnguard.frozen(net)
    guard.check()
    with guard:
        guard.check()
        net.eval()(images())
        guard.check()
    net[0].running_mean += 1
    guard.check()


def test_check_raises_what_was_swallowed() -> None:
    """A violation that was caught is raised by ``check()``, too."""
    net = small_net()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net) as guard:
        with pytest.raises(bnguard.StatsChangedError):
            net(images())
        with pytest.raises(bnguard.StatsChangedError, match="was caught"):
            guard.check()


def test_repr_is_short() -> None:
    """The repr names the class of the model, the policy and the state, and prints no model."""
    guard = bnguard.frozen(conv_net(), "restore")
    assert repr(guard) == "<bnguard.frozen of a Sequential, on_change='restore', closed>"
    with guard:
        assert repr(guard) == "<bnguard.frozen of a Sequential, on_change='restore', open>"


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda guard: pickle.loads(pickle.dumps(guard))])
@pytest.mark.parametrize("is_open", [False, True])
def test_copy_of_a_guard_is_a_closed_guard_of_the_same_kind(clone: Any, is_open: bool) -> None:
    """A copied or unpickled guard has the same options, is not open, and guards its own model."""
    net = small_net()
    guard = bnguard.frozen(net, "restore", updates=1)
    with guard if is_open else ExitStack():
        other = clone(guard)
    assert repr(other).endswith("closed>")
    other_net = other._model
    with other:
        other_net(images())
        other_net(images())
    assert count_of(other_net) == 4
    assert count_of(net) == (4 if other_net is net else 3)
    assert_clean(other_net)
