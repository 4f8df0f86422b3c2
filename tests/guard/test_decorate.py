"""What runs later than its call: generators that a finding closes, objects whose call is deferred."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from torch import nn

import bnguard
from tests.asserts import assert_same_bits, state_of
from tests.nets import images, warmed


def test_generator_that_is_closed_for_a_finding_is_guarded_while_it_closes() -> None:
    """Its ``finally`` runs in a block, too."""
    net = warmed(nn.Sequential(nn.BatchNorm2d(2)))
    before = state_of(net)

    @bnguard.frozen(net)
    def generate() -> Iterator[int]:
        try:
            net[0].running_mean += 1
            yield 1
        finally:
            net(images())

    with pytest.raises(bnguard.StatsChangedError):
        next(generate())
    assert_same_bits(net.state_dict(), before)


def test_async_generator_with_a_finding_is_closed() -> None:
    """It is closed before the error leaves."""
    net = warmed(nn.Sequential(nn.BatchNorm2d(2)))
    log: list[str] = []

    @bnguard.frozen(net)
    async def generate() -> AsyncIterator[int]:
        try:
            net[0].running_mean += 1
            yield 1
        finally:
            log.append("closed")

    async def main() -> None:
        with pytest.raises(bnguard.StatsChangedError):
            await generate().__anext__()
        assert log == ["closed"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "decorate",
    [lambda net: bnguard.frozen(net, "restore"), lambda net: bnguard.strict(on_change="restore")],
    ids=["frozen", "strict"],
)
@pytest.mark.parametrize("kind", ["async", "generator"])
def test_callable_object_with_a_deferred_call_is_guarded(kind: str, decorate) -> None:
    """An object whose ``__call__`` is asynchronous or a generator is guarded as the function would be."""

    class Async:
        async def __call__(self, model: nn.Module) -> None:
            model(images())

    class Generator:
        def __call__(self, model: nn.Module) -> Iterator[int]:
            model(images())
            yield 1

    net = warmed(nn.Sequential(nn.BatchNorm2d(2)))
    before = state_of(net)
    if kind == "async":
        asyncio.run(decorate(net)(Async())(net))
    else:
        list(decorate(net)(Generator())(net))
    assert_same_bits(net.state_dict(), before)
