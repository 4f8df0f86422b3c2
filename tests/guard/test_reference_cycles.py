"""A model that was guarded goes with its last reference, as one that was not: nothing waits for the garbage collector.

On a GPU what waits keeps memory, and the collector runs when Python objects are many, not when tensors are large.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.asserts import run_threads
from tests.old_torch import needs_traced_layers

BATCH = torch.arange(24.0).reshape(4, 6)


class OwnForward(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Doubling(nn.Module):
    """A layer with statistics and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(input.mean(0), 0.1)
        return input - self.running_mean


def make_net() -> nn.Sequential:
    """A layer of each way to be guarded."""
    norms = nn.BatchNorm1d(6), OwnForward(6), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), Doubling()
    return nn.Sequential(nn.Linear(6, 6), *norms)


OPTIONS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "rollback": {"on_change": "rollback"},
    "running": {"use_running_stats": True},
    "running and warn": {"on_change": "warn", "use_running_stats": True},
    "budget": {"updates": 1},
    "budget and restore": {"on_change": "restore", "updates": 1},
    "affine": {"on_change": "restore", "affine": True},
    "included": {"include": ["1", lambda name, module: isinstance(module, OwnForward)]},
}


class Own(ValueError):
    """An error of the user's."""


def plain(net: nn.Module, options: dict[str, Any]) -> None:
    """A step."""
    with bnguard.frozen(net, **options):
        net(BATCH).sum().backward()


def evaluated(net: nn.Module, options: dict[str, Any]) -> None:
    """Nothing that updates."""
    with bnguard.frozen(net, **options), torch.no_grad():
        net.eval()(BATCH)


def looked_at(net: nn.Module, options: dict[str, Any]) -> object:
    """Everything that a guard can be asked."""
    with bnguard.frozen(net, **options) as guard:
        net(BATCH)
        guard.check()
    return guard.changes, guard.layers, guard.report(), repr(guard)


def written(net: nn.Module, options: dict[str, Any]) -> None:
    """Writes that no forward explains."""
    with bnguard.frozen(net, **options):
        net[1].running_mean.data.add_(1)
        net[2].running_var = torch.full((6,), 7.0)


def failed(net: nn.Module, options: dict[str, Any]) -> None:
    """An error of the user's."""
    with bnguard.frozen(net, **options):
        net.eval()(BATCH)
        raise Own("mine")


def failed_in_forward(net: nn.Module, options: dict[str, Any]) -> None:
    """An error of torch's."""
    with bnguard.frozen(net, **options):
        net(BATCH[:, :3])


def swallowed(net: nn.Module, options: dict[str, Any]) -> None:
    """An error of a guard's that nobody sees."""
    with bnguard.frozen(net, **options), suppress(bnguard.StatsChangedError):
        net(BATCH)


def interrupted(net: nn.Module, options: dict[str, Any]) -> None:
    """Ctrl-C."""
    with bnguard.frozen(net, **options):
        net.eval()(BATCH)
        raise KeyboardInterrupt


def nested(net: nn.Module, options: dict[str, Any]) -> None:
    """Two guards."""
    with bnguard.frozen(net, **options), bnguard.frozen(net, "rollback"):
        net(BATCH)


def started(net: nn.Module, options: dict[str, Any]) -> None:
    """From start() to stop()."""
    guard = bnguard.frozen(net, **options).start()
    try:
        net(BATCH)
    finally:
        guard.stop()


def again(net: nn.Module, options: dict[str, Any]) -> None:
    """A guard that is used several times."""
    guard = bnguard.frozen(net, **options)
    for _ in range(3):
        with guard:
            net(BATCH)


def strict(net: nn.Module, options: dict[str, Any]) -> None:
    """A decorated function."""

    @bnguard.strict(**options)
    def run(model: nn.Module) -> None:
        model(BATCH)

    run(net)


def decorated(net: nn.Module, options: dict[str, Any]) -> None:
    """A function that a guard decorates."""

    @bnguard.frozen(net, **options)
    def run() -> None:
        net(BATCH)

    run()


def generated(net: nn.Module, options: dict[str, Any]) -> None:
    """A block in a generator that nobody ends."""

    def run() -> Iterator[None]:
        with bnguard.frozen(net, **options):
            yield
            net(BATCH)

    steps = run()
    next(steps)


def abandoned(net: nn.Module, options: dict[str, Any]) -> None:
    """A block whose end never begins."""
    bnguard.frozen(net, **options).__enter__()


def in_thread(net: nn.Module, options: dict[str, Any]) -> None:
    """A block in another thread."""

    def run() -> None:
        with suppress(bnguard.StatsChangedError):
            plain(net, options)

    run_threads(run)


def watched(net: nn.Module, options: dict[str, Any]) -> None:
    """A guard inside of two watches."""
    with bnguard.watch(net, every=1), bnguard.watch() as record, bnguard.frozen(net, **options):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(BATCH).sum().backward()
        optimizer.step()
    record.report()


def recomputed(net: nn.Module, options: dict[str, Any]) -> None:
    """A checkpointed model."""
    with bnguard.frozen(net, **options), bnguard.recompute_frozen(net):
        checkpoint(net, BATCH.clone().requires_grad_(), use_reentrant=False).sum().backward()


def refused(net: nn.Module, options: dict[str, Any]) -> None:
    """A guard that cannot be made."""
    bnguard.frozen(net, **{**options, "include": "nothing"})


USES = [
    plain,
    evaluated,
    looked_at,
    written,
    failed,
    failed_in_forward,
    swallowed,
    interrupted,
    nested,
    started,
    again,
    strict,
    decorated,
    generated,
    abandoned,
    in_thread,
    watched,
    recomputed,
    refused,
]


@contextmanager
def no_collector() -> Iterator[None]:
    """Nothing goes but by its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def survivors(use: Callable[[nn.Module, dict[str, Any]], object], options: dict[str, Any]) -> list[str]:
    """What is left of a model after its use, by the names of its modules and tensors."""
    net = make_net()
    named = [*net.named_modules(), *net.named_parameters(), *net.named_buffers()]
    references = [(name or "(root)", weakref.ref(item)) for name, item in named]
    del named
    with suppress(Own, RuntimeError, ValueError, KeyboardInterrupt):
        use(net, options)
    del net
    return [name for name, reference in references if reference() is not None]


@pytest.mark.parametrize("name", OPTIONS)
def test_model_goes_with_its_last_reference(name: str) -> None:
    """So do its layers, parameters and statistics, whatever was done in the block and however it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in USES:
            survivors(use, OPTIONS[name])  # what is imported makes garbage
        with no_collector():
            left = {use.__name__: survivors(use, OPTIONS[name]) for use in USES}
    assert left == {use.__name__: [] for use in USES}


@pytest.mark.parametrize("is_open", [False, True])
def test_guard_that_is_kept_keeps_the_model_and_no_longer(is_open: bool) -> None:
    """Whoever keeps the guard keeps its model; with the guard it goes."""
    with no_collector():
        net = make_net()
        gone = weakref.ref(net)
        guard = bnguard.frozen(net, "restore", affine=True)
        guard.__enter__()
        net(BATCH)
        if not is_open:
            guard.__exit__(None, None, None)
        del net
        assert gone() is not None
        del guard
        assert gone() is None


def test_error_that_is_kept_keeps_no_more_than_its_frames() -> None:
    """Without its traceback, as logged, it knows no model."""
    with no_collector():
        net = make_net()
        gone = weakref.ref(net)
        with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
            net(BATCH)
        error = caught.value
        del caught
        error.__traceback__ = error.__context__ = None
        del net
        assert error.changes
        assert gone() is None


@needs_traced_layers
@pytest.mark.parametrize("name", ["raise", "restore", "running", "rollback"])
def test_compiled_model_goes(name: str) -> None:
    """With its last reference; where a guard holds, with the variables with which dynamo has traced its forwards.

    These are in cycles of dynamo's own.
    """

    def run(net: nn.Module, options: dict[str, Any]) -> None:
        compiled = torch.compile(net, backend="eager")
        with suppress(bnguard.StatsChangedError), bnguard.frozen(net, **options):
            compiled(BATCH)
        torch._dynamo.reset()

    with warnings.catch_warnings(), no_collector():
        warnings.simplefilter("ignore")
        survivors(run, OPTIONS[name])
        net = make_net()
        gone = [weakref.ref(module) for module in net.modules()]
        run(net, OPTIONS[name])
        del net
        if name in ("restore", "running"):
            gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)
