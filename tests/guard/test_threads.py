"""Several threads on one model: nothing is lost, nothing leaks, nothing hangs."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from bnguard.guard.hold import guards
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    join_threads,
    outcome,
    run_threads,
    start_threads,
    statistics,
    values,
    warns,
)
from tests.nets import OwnForward, ReassigningNorm, ScaledNorm, conv_net, images, warmed

TIMEOUT = 20
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(2, track_running_stats=True, affine=True),
    "subclass": lambda: ScaledNorm(2),
    "own": lambda: OwnForward(2),
    "own-reassigning": lambda: ReassigningNorm(2),
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def make_net(norm: str) -> nn.Module:
    """One layer, with statistics that are not the initial ones."""
    return nn.Sequential(warmed(NORMS[norm]()))


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    """Lets threads alternate at every chance."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Gate:
    """Stops one thread at a place until it is let through."""

    def __init__(self) -> None:
        self.owner: int | None = None
        self._reached = threading.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        """Called at the place; only the thread that ``watch`` was called in waits."""
        if threading.get_ident() == self.owner:
            self._reached.set()
            assert self._open.wait(TIMEOUT)

    def watch(self) -> None:
        """Makes the calling thread the one that waits."""
        self.owner = threading.get_ident()

    def wait_until_reached(self) -> None:
        """Waits until that thread is at the place."""
        assert self._reached.wait(TIMEOUT)

    def open(self) -> None:
        """Lets it through."""
        self._open.set()


# One block, several threads.


@EVERY_NORM
@pytest.mark.parametrize("mode", ["restore", "running"])
@pytest.mark.usefixtures("_eager_switching")
def test_threads_in_one_block_move_nothing(norm: str, mode: str) -> None:
    """Each thread gets the twin's outputs, and the statistics are as before.

    They are so all the time where a forward needs no swap, or the swapped ones have the same values.
    """
    net = make_net(norm)
    twin, before = copy.deepcopy(net).train(mode == "restore"), values(statistics(net))
    expected = [copy.deepcopy(twin)(images(seed=seed)) for seed in range(4)]

    def run(seed: int) -> None:
        for _ in range(25):
            output = net(images(seed=seed))
            if norm == "BatchNorm2d" or mode == "running":
                assert_same_bits(values(statistics(net)), before)
            if norm != "own-reassigning" or mode == "running":
                assert_same_bits(output, expected[seed])

    options: dict[str, Any] = {"on_change": "restore"} if mode == "restore" else {"use_running_stats": True}
    with bnguard.frozen(net, **options):
        run_threads(*[lambda seed=seed: run(seed) for seed in range(4)])
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_NORM
@pytest.mark.usefixtures("_eager_switching")
def test_threads_in_one_block_are_all_stopped(norm: str) -> None:
    """Under raise every thread's forward raises, each one is counted, and the block's end tells what was caught."""
    net = make_net(norm)
    before = values(statistics(net))

    def run() -> None:
        for _ in range(5):
            with pytest.raises(bnguard.StatsChangedError):
                net(images())

    with pytest.raises(bnguard.StatsChangedError, match="20 updates stopped"), bnguard.frozen(net):
        run_threads(*[run] * 4)
    assert_same_bits(statistics(net), before)


@pytest.mark.usefixtures("_eager_switching")
def test_threads_in_one_block_get_one_warning() -> None:
    """Under warn the updates of all threads are counted, and one of them warns."""
    net = make_net("BatchNorm2d")
    with warns(), bnguard.frozen(net, "warn") as guard:
        run_threads(*[lambda: [net(images()) for _ in range(10)]] * 4)
    assert guard.changes[0].updates == 40


@pytest.mark.parametrize("norm", ["BatchNorm2d", "SyncBatchNorm"])
@pytest.mark.usefixtures("_eager_switching")
def test_threads_share_a_budget(norm: str) -> None:
    """Four threads and a budget of two: two forwards are stopped."""
    net = make_net(norm)
    errors: list[bnguard.StatsChangedError] = []

    def run() -> None:
        try:
            net(images())
        except bnguard.StatsChangedError as error:
            errors.append(error)

    with pytest.raises(bnguard.StatsChangedError, match="2 updates stopped"), bnguard.frozen(net, updates=2):
        run_threads(*[run] * 4)
    assert len(errors) == 2
    assert_clean(net)


def test_updates_within_the_budget_may_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two allowed updates at the same time both stand, whichever forward ends first."""
    net = make_net("BatchNorm2d")
    first, second, batch_norm = Gate(), Gate(), F.batch_norm

    def slow(*args: Any) -> Tensor:
        second.pass_through()
        output = batch_norm(*args)
        first.pass_through()
        return output

    def run(gate: Gate) -> None:
        gate.watch()
        net(images())

    monkeypatch.setattr(F, "batch_norm", slow)
    with bnguard.frozen(net, "restore", updates=2):
        threads = start_threads(lambda: run(first))
        first.wait_until_reached()  # it has written
        threads += start_threads(lambda: run(second))
        second.wait_until_reached()  # it will write
        first.open()
        join_threads(threads[:1])
        second.open()
        join_threads(threads)
        expected = values(statistics(net))
    assert_same_bits(statistics(net), expected)
    assert net[0].num_batches_tracked == 5


# Blocks of several threads.


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("norm", ["BatchNorm2d", "SyncBatchNorm", "own"])
def test_blocks_of_threads_end_in_any_order(norm: str, order: tuple[int, ...]) -> None:
    """Blocks that three threads open on one model may end in any order: it is held until the last one has ended."""
    net = make_net(norm)
    before, objects = values(statistics(net)), statistics(net)
    inside = threading.Barrier(4)
    leave = [threading.Event() for _ in range(3)]
    left = [threading.Event() for _ in range(3)]

    def hold(index: int) -> None:
        with bnguard.frozen(net, "restore", affine=True):
            inside.wait(TIMEOUT)
            assert leave[index].wait(TIMEOUT)
        left[index].set()

    threads = start_threads(*[lambda index=index: hold(index) for index in range(3)])
    inside.wait(TIMEOUT)
    for index in order:
        net(images())
        assert_same_bits(statistics(net), before)
        assert not net[0].weight.requires_grad
        leave[index].set()
        assert left[index].wait(TIMEOUT)
    join_threads(threads)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert_clean(net)
    net(images())
    with pytest.raises(AssertionError):
        assert_same_bits(statistics(net), before)


@EVERY_NORM
@pytest.mark.usefixtures("_eager_switching")
def test_blocks_of_threads_come_and_go(norm: str) -> None:
    """Threads that open and close blocks around their own forwards all the time move nothing."""
    net = make_net(norm)
    before = values(statistics(net))

    def run() -> None:
        for _ in range(20):
            with bnguard.frozen(net, "restore"):
                net(images())

    run_threads(*[run] * 4)
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.usefixtures("_eager_switching")
def test_one_decorated_function_in_several_threads() -> None:
    """One guard as a decorator serves several threads."""
    net = conv_net()
    before = values(statistics(net))

    @bnguard.frozen(net, "restore")
    def step() -> None:
        net(images())

    run_threads(*[lambda: [step() for _ in range(10)]] * 4)
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.usefixtures("_eager_switching")
def test_backward_in_several_threads() -> None:
    """Threads that train copies of the inputs under one guard get the twin's input gradients."""
    net = make_net("BatchNorm2d")
    expected = outcome(copy.deepcopy(net), images())["input.grad"]

    def run() -> None:
        x = images().requires_grad_()
        net(x).square().sum().backward()
        assert_same_bits(x.grad, expected)

    with bnguard.frozen(net, "restore"):
        run_threads(*[run] * 4)


# A thread that is still inside a forward when the block ends.


def slow_check(base: Any, gate: Gate) -> Any:
    """A subclass of a stock layer that waits where torch looks at the dimensions."""

    class Slow(base):  # type: ignore[misc]
        def _check_input_dim(self, input: Tensor) -> None:
            gate.pass_through()
            super()._check_input_dim(input)

    return Slow


def slow_forward(base: Any, gate: Gate) -> Any:
    """A subclass with a forward of its own that waits before it updates."""

    class Slow(base):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            gate.pass_through()
            output = super().forward(input)
            gate.pass_through()
            return output

    return Slow


def slow_instance(base: Any, gate: Gate) -> Any:
    """A layer with a slow forward that somebody put on the instance."""

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        layer = base(*args, **kwargs)

        def forward(input: Tensor) -> Tensor:
            gate.pass_through()
            output = base.forward(layer, input)
            gate.pass_through()
            return output

        layer.forward = forward
        return layer

    return make


SLOW = {
    "BatchNorm2d-check": (slow_check, nn.BatchNorm2d),
    "SyncBatchNorm-check": (slow_check, nn.SyncBatchNorm),
    "InstanceNorm2d-check": (slow_check, nn.InstanceNorm2d),
    "BatchNorm2d-forward": (slow_forward, nn.BatchNorm2d),
    "SyncBatchNorm-forward": (slow_forward, nn.SyncBatchNorm),
    "InstanceNorm2d-forward": (slow_forward, nn.InstanceNorm2d),
    "own-forward": (slow_forward, OwnForward),
    "reassigning-forward": (slow_forward, ReassigningNorm),
    "BatchNorm2d-instance": (slow_instance, nn.BatchNorm2d),
    "own-instance": (slow_instance, OwnForward),
}
ENDINGS = {
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "restore-budget": {"on_change": "restore", "updates": 1},
    "raise": {"on_change": "raise"},
    "raise-budget": {"on_change": "raise", "updates": 1},
}


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("ending", ENDINGS)
def test_forward_that_outlasts_its_block_leaks_nothing(slow: str, ending: str) -> None:
    """A forward that began inside moves nothing when it goes on after the block; the block's end is silent."""
    gate, (make, base) = Gate(), SLOW[slow]
    options = {"track_running_stats": True} if base is nn.InstanceNorm2d else {}
    net = nn.Sequential(warmed(make(base, gate)(2, **options)))

    def run() -> None:
        gate.watch()
        try:
            net(images())
        except bnguard.StatsChangedError:
            assert ending.startswith("raise")

    guard = bnguard.frozen(net, **ENDINGS[ending])
    objects = statistics(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guard:
            if "budget" in ending:
                net(images())
            before = values(statistics(net))
            threads = start_threads(run)
            gate.wait_until_reached()
    assert_same_bits(values(objects), before)
    gate.open()
    join_threads(threads)
    assert_same_bits(statistics(net), before)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_clean(net)


@pytest.mark.parametrize("ending", ENDINGS)
def test_forward_that_outlasts_its_block_and_fails_keeps_nothing_alive(ending: str) -> None:
    """The layer works on, is guarded again, and is freed with its model."""
    gate = Gate()

    class Failing(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            gate.pass_through()
            if threading.get_ident() == gate.owner:
                raise ValueError("of the user")
            return super().forward(input)

    net = nn.Sequential(warmed(Failing(2)))

    def run() -> None:
        gate.watch()
        with contextlib.suppress(ValueError):
            net(images())

    with bnguard.frozen(net, **ENDINGS[ending]):
        threads = start_threads(run)
        gate.wait_until_reached()
    gate.open()
    join_threads(threads)
    assert id(net[0]) not in guards
    before = values(statistics(net))
    with bnguard.frozen(net, "restore"):
        net(images())
    assert_same_bits(statistics(net), before)
    assert_clean(net)
    layer = weakref.ref(net[0])
    net[0] = nn.Identity()
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("slow", SLOW)
def test_forward_that_outlasts_its_block_has_the_twins_output(slow: str) -> None:
    """Its output is what an unguarded layer gives."""
    gate, (make, base) = Gate(), SLOW[slow]
    options = {"track_running_stats": True} if base is nn.InstanceNorm2d else {}
    net = nn.Sequential(warmed(make(base, gate)(2, **options)))
    expected = warmed(base(2, **options))(images())
    found: list[Tensor] = []

    def run() -> None:
        gate.watch()
        found.append(net(images()))

    with bnguard.frozen(net, "restore"):
        threads = start_threads(run)
        gate.wait_until_reached()
    gate.open()
    join_threads(threads)
    assert_same_bits(found, [expected])


def test_forward_that_outlasts_its_block_meets_an_unguarded_one() -> None:
    """While a held forward goes on, another one after the block updates as unguarded."""
    gate = Gate()
    net = nn.Sequential(warmed(slow_check(nn.BatchNorm2d, gate)(2)))
    twin = nn.Sequential(warmed(nn.BatchNorm2d(2)))

    def run() -> None:
        gate.watch()
        net(images())

    with bnguard.frozen(net, "restore"):
        threads = start_threads(run)
        gate.wait_until_reached()
    net(images(seed=3))
    twin(images(seed=3))
    gate.open()
    join_threads(threads)
    assert_same_bits(values(statistics(net)), values(statistics(twin)))


def test_forward_that_began_before_the_block_is_seen() -> None:
    """An update of a forward that began before the block is undone at the end, and told."""
    gate = Gate()
    net = nn.Sequential(warmed(slow_check(nn.BatchNorm2d, gate)(2)))
    before = values(statistics(net))

    def run() -> None:
        gate.watch()
        net(images())

    threads = start_threads(run)
    gate.wait_until_reached()
    with warns() as caught, bnguard.frozen(net, "restore"):
        gate.open()
        join_threads(threads)
    assert "another thread" in caught.message
    assert_same_bits(statistics(net), before)
