"""On a GPU: a training step of ResNet-50, and how often the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

import bnguard
from benchmarks.models import resnet50
from benchmarks.race import Contender, race, spread
from benchmarks.results import Benchmark, Row, compared
from benchmarks.step import entered_each_step

__all__ = ["BENCHMARKS"]

PLAIN, LOOP, EACH = "unguarded", "frozen(net, 'restore') around the loop", "frozen(net, 'restore') around each step"
DEFERRED = "frozen(net, 'restore', check='deferred') around each step"
_KINDS: Final = ("fp32", "channels_last", "bf16")


def _made(kind: str, batch: int = 64) -> tuple[nn.Module, Callable[[], None]]:
    """ResNet-50 on the device, and a training step of it."""
    torch.manual_seed(0)
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    net = resnet50(1000).cuda().to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=layout)
    y = torch.randint(1000, (batch,), device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if kind == "bf16" else nullcontext():
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return net, step


def _deferred_each_step(net: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """The step in a block of one guard, which reads at each step what the step before has found."""
    guard = bnguard.frozen(net, "restore", check="deferred")

    def guarded() -> None:
        with guard:
            step()

    return guarded


def train(kind: str) -> list[Row]:
    """A training step, guarded and unguarded."""
    net, step = _made(kind)

    contenders = [
        Contender(PLAIN, step),
        Contender(LOOP, step, partial(bnguard.frozen, net, "restore")),
        Contender(EACH, entered_each_step(net, step)),
        Contender(DEFERRED, _deferred_each_step(net, step)),
    ]
    result = race(contenders, rounds=20, steps=3)
    title = f"Training step on the GPU, ResNet-50, batch 64x3x224x224, {kind}"
    return compared(f"cuda/{kind}", title, result, PLAIN, {LOOP: 1.0})


def replayed() -> list[Row]:
    """A CUDA graph of a forward in eval mode, captured before the block and replayed in it."""
    net, _ = _made("fp32")
    net.eval()
    x = torch.randn(64, 3, 224, 224, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            net(x)
    contenders = [
        Contender(PLAIN, graph.replay),
        Contender(LOOP, graph.replay, partial(bnguard.frozen, net, "restore")),
    ]
    result = race(contenders, rounds=20, steps=10)
    title = "Replay of a CUDA graph, ResNet-50, batch 64x3x224x224"
    return compared("cuda/graph", title, result, PLAIN, {LOOP: 1.0})


@contextmanager
def _counted_syncs(count: list[int]) -> Iterator[None]:
    """Appends how often the host waited for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        count.append(sum("synchroniz" in str(warning.message) for warning in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs() -> list[Row]:
    """Host synchronisations inside a block, and at its end."""
    rows = []
    row = partial(Row, "cuda/syncs", "Host synchronisations, ResNet-50", reference="1")
    net, step = _made("fp32", batch=4)
    x = torch.randn(4, 3, 224, 224, device="cuda")

    def forward() -> None:
        with torch.no_grad():
            net(x)

    cases = (("restore", step, True), ("raise", forward, False), ("warn", step, True), ("rollback", step, True))
    for policy, work, mode in cases:
        net.train(mode)
        work()
        inside: list[int] = []
        at_exit: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bnguard.BNGuardWarning)
            guard = bnguard.frozen(net, policy).start()  # type: ignore[arg-type]
            try:
                with _counted_syncs(inside):
                    work()
            finally:
                with _counted_syncs(at_exit):
                    guard.stop()
        rows.append(row(subject=f"{policy}: a step inside the block", ratio=spread(inside), target=0))
        rows.append(row(subject=f"{policy}: the end of the block", ratio=spread(at_exit), target=1))
        at_exit.clear()
        deferred = bnguard.frozen(net, policy, check="deferred")  # type: ignore[arg-type]
        deferred.__enter__()
        with _counted_syncs(at_exit):
            deferred.__exit__(None, None, None)
        deferred.check()
        rows.append(row(subject=f"{policy}, deferred: the end of the block", ratio=spread(at_exit), target=0))
    return rows


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"cuda/{kind}": partial(train, kind) for kind in _KINDS},
    "cuda/graph": replayed,
    "cuda/syncs": syncs,
}
