"""One guard in several tasks of asyncio: each leaves the block that it entered itself."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, run_threads, statistics, values
from tests.nets import images, warmed

# Blocks that overlap find what the others put back.
pytestmark = pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning")


def make() -> tuple[Any, bnguard.frozen]:
    """A net, and a guard on it."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2)))
    return net, bnguard.frozen(net, "restore")


async def wait(times: int = 1) -> None:
    """Lets the other tasks run."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.parametrize("first_leaves", ["first", "last"])
def test_each_task_leaves_its_own_block(first_leaves: str) -> None:
    """What a block puts back are the statistics of its own beginning."""
    net, guard = make()
    mean = net[0].running_mean
    seen: dict[str, list[float]] = {}

    async def first() -> None:
        mean.fill_(1)
        with guard:
            await wait(2 if first_leaves == "first" else 8)
        seen["first"] = mean.tolist()

    async def second() -> None:
        await wait()
        mean.fill_(2)
        with guard:
            await wait(4)
        seen["second"] = mean.tolist()

    async def main() -> None:
        await asyncio.gather(first(), second())

    asyncio.run(main())
    assert seen["first"] == [1, 1]
    assert seen["second"] == [2, 2]
    assert_clean(net)


def test_forward_of_one_task_is_held_by_the_block_of_another() -> None:
    """The statistics belong to all."""
    net, guard = make()
    before = values(statistics(net))

    async def validate() -> None:
        with guard:
            await wait(4)

    async def train() -> None:
        await wait()
        net(images())

    async def main() -> None:
        await asyncio.gather(validate(), train())

    asyncio.run(main())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


def test_stop_in_another_task_ends_the_newest_block() -> None:
    """A task that has entered none: somebody is to stop what was started elsewhere."""
    net, guard = make()

    async def begin() -> None:
        guard.start()

    async def end() -> None:
        guard.stop()

    async def main() -> None:
        await asyncio.create_task(begin())
        await asyncio.create_task(end())

    asyncio.run(main())
    assert_clean(net)
    guard.start()
    run_threads(guard.stop)
    assert_clean(net)


def test_block_of_a_thread_that_copies_the_context_is_its_own() -> None:
    """``asyncio.to_thread`` runs in a copy of the context of its caller."""
    net, guard = make()
    mean = net[0].running_mean

    def validate() -> None:
        mean.fill_(2)
        with guard:
            pass

    async def main() -> None:
        mean.fill_(1)
        with guard:
            await asyncio.to_thread(validate)
            assert mean.tolist() == [2, 2]
        assert mean.tolist() == [1, 1]

    asyncio.run(main())
    assert_clean(net)


def test_block_that_another_context_leaves() -> None:
    """A generator is entered in one context and left in another one."""
    net, guard = make()

    def generate() -> Iterator[int]:
        with guard:
            yield 1

    generator = generate()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert_clean(net)
    with guard:  # nothing is left of it
        net(images())
    assert_clean(net)


def test_async_generator_that_the_loop_closes() -> None:
    """At its end the loop closes what nobody has, in a task of its own."""
    net, guard = make()

    async def generate() -> AsyncIterator[int]:
        with guard:
            yield 1
            yield 2

    async def main() -> None:
        async for _ in generate():
            break

    asyncio.run(main())
    assert_clean(net)


def test_many_blocks_at_once() -> None:
    """More than a context keeps in mind: each is left, the newest first."""
    net, guard = make()
    before = values(statistics(net))
    for _ in range(100):
        guard.start()
    net(images())
    for _ in range(100):
        guard.stop()
    assert_same_bits(statistics(net), before)
    assert_clean(net)
    assert torch.equal(net[0].num_batches_tracked, before["0.num_batches_tracked"])
