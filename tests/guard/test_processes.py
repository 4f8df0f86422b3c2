"""Other processes: statistics in shared memory that a child moves, guards that a child inherits, models sent to one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnguard
from bnguard.torch_internals.locks import RLock
from tests.asserts import assert_clean, assert_same_bits, state_of, statistics, told, values
from tests.nets import OwnForward, images, warmed

# CPython's, about fork in a process with threads; torch's, about its own tensors in a queue.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
}
LIMIT = 60  # seconds until a child counts as hanging


def make_net() -> nn.Sequential:
    """A predictable layer and one with a forward of its own."""
    torch.manual_seed(0)
    return warmed(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), OwnForward(2)))


def run_child(method: str, function: Callable[..., None], *args: Any) -> None:
    """Runs ``function`` in a child process; what fails there fails here."""
    join_child(*start_child(method, function, *args))


def start_child(method: str, function: Callable[..., None], *args: Any) -> tuple[Any, Any]:
    """Starts a child process; returns it and the queue of its errors."""
    context = mp.get_context(method)
    errors = context.SimpleQueue()
    child = context.Process(target=report, args=(errors, function, *args), daemon=True)
    child.start()
    return child, errors


def join_child(child: Any, errors: Any) -> None:
    """Waits for a child."""
    child.join(LIMIT)
    assert child.exitcode is not None, "the child hangs"
    assert errors.empty() or not (text := errors.get()), text
    assert child.exitcode == 0


def report(errors: Any, function: Callable[..., None], *args: Any) -> None:
    """What the child runs: one thread, and a text for each error."""
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException as error:
        errors.put(repr(error))
        raise


def train(net: nn.Module) -> None:
    """A forward in train mode."""
    net.train()(images())


@pytest.mark.parametrize(
    ("guard", "method"), [("raise", "fork"), ("warn", "fork"), ("restore", "fork"), ("raise", "spawn")]
)
def test_child_that_moves_shared_statistics_is_found(guard: str, method: str) -> None:
    """A forward of a child that has the same memory: the end of the block finds it, and acts as the policy says.

    A forked child inherits the guard, so it runs on a model that was never guarded, around the same tensors.
    """
    net, twin = make_net().share_memory(), make_net()
    other = make_net()
    for part, theirs in zip(net.modules(), other.modules(), strict=True):
        theirs._buffers.update(part._buffers)
    before, objects = values(statistics(net)), statistics(net)
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
        run_child(method, train, other)
    train(twin)
    assert len(said.warnings) == (guard != "raise")
    assert "2 layers changed inside frozen()" in (said.error or said.warnings[0])
    assert "another thread or process" in (said.error or said.warnings[0])
    assert [change.updates for change in block.changes] == [0, 0]
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if guard == "warn" else before)
    assert_clean(net)


def train_under_the_parents_guard(net: nn.Module, guard: str) -> None:
    """What a forked child does with the guard that it was born with."""
    before = values(statistics(net))
    if guard == "raise":
        with pytest.raises(bnguard.StatsChangedError):
            train(net)
    else:
        train(net)
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("guard", ["raise", "restore", "running"])
def test_forked_child_inherits_the_guard(guard: str) -> None:
    """What it runs is judged and held as in the parent, whose shared statistics do not move."""
    net = make_net().share_memory()
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
        run_child("fork", train_under_the_parents_guard, net, guard)
        assert block.changes == ()
    assert said.warnings == []
    assert said.error is None
    assert_same_bits(statistics(net), before)


def leave_the_parents_block(block: Any, net: nn.Module) -> None:
    """A child ends the block that it was born in, and trains on."""
    block.stop()
    assert_clean(net)
    train(net)


def test_forked_child_that_leaves_the_block_leaves_the_parents_alone() -> None:
    """The guard of the parent stands; what the child then does to shared statistics is found."""
    net = make_net().share_memory()
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore") as block:
        run_child("fork", leave_the_parents_block, block, net)
        held = values(statistics(net))
        train(net)
        assert_same_bits(statistics(net), held)
    assert len(said.warnings) == 1
    assert_same_bits(statistics(net), before)


def leave_when_told(block: Any, go: Any) -> None:
    """A child that stays in the block for longer than its parent."""
    assert go.wait(LIMIT)
    with told() as said:
        block.stop()
    assert said.error is None


@pytest.mark.parametrize("guard", ["raise", "restore", "running"])
def test_forked_child_that_leaves_late_undoes_nothing(guard: str) -> None:
    """It does not write the statistics of entry over what the parent has learned since, nor raise because of that."""
    net, go = make_net().share_memory(), mp.get_context("fork").Event()
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        child = start_child("fork", leave_when_told, block, go)
    train(net)
    learned = values(statistics(net))
    go.set()
    join_child(*child)
    assert_same_bits(statistics(net), learned)


def warned_in_child(net: nn.Module) -> None:
    """The child's own forward is warned about in the child, once."""
    with told() as said:
        train(net)
    assert len(said.warnings) == 1


def test_forked_child_under_warn() -> None:
    """Its update of shared statistics stands, as without a guard, and the parent's block reports it as well."""
    net, twin = make_net().share_memory(), make_net()
    with told() as said, bnguard.frozen(net, "warn") as block:
        run_child("fork", warned_in_child, net)
    train(twin)
    assert_same_bits(statistics(net), statistics(twin))
    assert len(said.warnings) == 1
    assert [(change.names, change.updates) for change in block.changes] == [(("1",), 0), (("2",), 0)]


def guard_in_child() -> None:
    """A block of the child's own; the alarm ends it where it hangs."""
    signal.alarm(10)
    net = make_net()
    before = values(statistics(net))
    with bnguard.frozen(net, "restore", affine=True), bnguard.frozen(net, updates=1):
        train(net)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        train(net)
    assert_same_bits(statistics(net), before)


def test_fork_while_another_thread_is_inside_a_lock() -> None:
    """A child that is born while a thread of its parent enters a block can enter one: no lock stays closed for ever."""
    with bnguard.frozen(make_net(), "restore", affine=True):
        pass  # so that all is imported
    kinds = (type(threading.Lock()), type(RLock()))
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "bnguard"]
    locks = [value for module in modules for value in vars(module).values() if isinstance(value, kinds)]
    assert kinds[1] in set(map(type, locks))
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as held:
            for lock in {id(lock): lock for lock in locks}.values():
                held.enter_context(lock)
            taken.set()
            done.wait(1)  # not for ever: fork may wait for the locks

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(LIMIT)
    child = start_child("fork", guard_in_child)
    done.set()
    thread.join(LIMIT)
    join_child(*child)


@pytest.mark.parametrize("guard", GUARDS)
def test_model_that_goes_to_shared_memory_inside(guard: str) -> None:
    """``share_memory()`` inside a block is no change; the block goes on with the same tensors."""
    net, twin = make_net(), make_net().eval() if guard in ("raise", "running") else make_net()
    before, objects = values(statistics(net)), statistics(net)
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
        net.share_memory()
        output = (net.eval() if guard == "raise" else net)(images())
    assert_same_bits(output, twin(images()))
    assert said.error is None
    assert len(said.warnings) == len(block.changes) / 2 == (guard == "warn")
    assert all(tensor is objects[name] and tensor.is_shared() for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if guard == "warn" else before)


def train_alone(net: nn.Module, expected: dict[str, Tensor]) -> None:
    """A model that arrived in a spawned child is unguarded, and a guard there works."""
    assert_clean(net)
    moved = values(statistics(net))
    with bnguard.frozen(net, "restore"):
        train(net)
    assert_same_bits(statistics(net), moved)
    train(net)
    assert_same_bits(statistics(net), expected)


def test_model_sent_to_a_spawned_child_is_unguarded_there() -> None:
    """Pickled inside a block it arrives without a guard. torch moves its tensors to shared memory: found here."""
    net, twin = make_net(), make_net()
    before = values(statistics(net))
    train(twin)
    with told() as said, bnguard.frozen(net, "restore"):
        run_child("spawn", train_alone, net, values(statistics(twin)))
    assert len(said.warnings) == 1
    assert_same_bits(statistics(net), before)
    assert_clean(net)


class Features(Dataset[dict[str, Tensor]]):
    """Runs a model in the worker, in a block or not; gives its output and its statistics."""

    def __init__(self, net: nn.Module, options: dict[str, Any] | None) -> None:
        self.net = net
        self.options = options

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with nullcontext() if self.options is None else bnguard.frozen(self.net, **self.options):
            output = self.net(images(seed=index)).detach()
        return {"output": output, **values(statistics(self.net))}


def load(dataset: Features, method: str) -> list[dict[str, Tensor]]:
    """All items, by way of one worker."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=method, persistent_workers=True, timeout=LIMIT
    )
    return [values(item) for item in loader]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_worker_guards_its_model(method: str) -> None:
    """A block in the worker holds there: every item is normalised as the first one, the parent's model is untouched."""
    net, twin = make_net()[1:], make_net()[1:]  # a convolution has other bits with the worker's one thread
    before = state_of(net)
    items = load(Features(net, {"on_change": "restore"}), method)
    for index, item in enumerate(items):
        assert_same_bits(item, {"output": twin(images(seed=index)).detach(), **values(statistics(net))})
    assert_same_bits(net.state_dict(), before)


def test_data_loader_worker_inside_a_block() -> None:
    """A forked worker has the guard of the block; items are those of a model in eval mode."""
    net, twin = make_net()[1:], make_net()[1:].eval()
    before = state_of(net)
    with bnguard.frozen(net, use_running_stats=True) as block:
        items = load(Features(net, None), "fork")
    for index, item in enumerate(items):
        assert_same_bits(item, {"output": twin(images(seed=index)).detach(), **values(statistics(twin))})
    assert block.changes == ()
    assert_same_bits(net.state_dict(), before)


def test_error_of_a_worker_names_the_layer() -> None:
    """A violation in a worker that has the parent's guard ends the block, once, and says which layer and which line."""
    net = make_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        load(Features(net, None), "fork")
    assert "1 (BatchNorm2d) is in train mode inside frozen():" in str(caught.value)
    assert "in __getitem__" in str(caught.value)
    assert not hasattr(caught.value, "__notes__")
