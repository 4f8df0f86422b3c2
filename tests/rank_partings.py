"""How ranks of a distributed run part: with errors, in other orders, elsewhere; what each reports of it."""

import asyncio
import copy
import pickle
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnguard
from tests.rank_scenarios import batch, guarded, make, move, same, statistics, taking_into, timed

__all__ = ["PARTINGS"]

PARTINGS = {}


scenario = taking_into(PARTINGS)


def is_second():
    """Whether this is rank 1."""
    return dist.get_rank() == 1


def fail(error=RuntimeError):
    """On rank 1."""
    if is_second():
        raise error("mine")


@scenario
def stop_in_finally():
    """Rank 1 stops its guard in a ``finally`` that an exception runs through."""
    net = make().eval()

    def run():
        guard = bnguard.frozen(net).start()
        try:
            net(batch())
            fail()
        finally:
            guard.stop()

    return timed(run)


@scenario
def stop_in_except():
    """Where the guard has begun while an exception was handled, that one does not lead out of it."""
    net = make().eval()

    def run():
        try:
            raise RuntimeError
        except RuntimeError:
            guard = bnguard.frozen(net).start()
            if is_second():
                move(net)
            guard.stop()

    return timed(run)


def trained_under_ddp(guard, broadcast, steps):
    """What a net has after some steps under DDP, in a block each, and what was said."""
    net = make()
    model = DistributedDataParallel(net, broadcast_buffers=broadcast)

    def run():
        for step in range(steps):
            with guard(net):
                model(batch(10 * dist.get_rank() + step)).sum().backward()

    return statistics(net), timed(run)


@scenario
def budget_under_ddp():
    """Each step updates once; DDP's broadcast before it is no update."""
    results = {}
    for broadcast in (True, False):
        twin, _ = trained_under_ddp(lambda net: bnguard.watch(net, group=False), broadcast, 4)
        for policy in ("raise", "restore", "warn"):
            state, said = trained_under_ddp(
                lambda net, policy=policy: bnguard.frozen(net, policy, updates=1), broadcast, 4
            )
            results[f"{policy} {broadcast}"] = {**said, "twin": same(twin, state)}
    return results


@scenario
def budget_in_join():
    """Rank 0 has fewer batches, and gets what rank 1 has."""
    net = make()
    model = DistributedDataParallel(net)

    def run():
        with bnguard.frozen(net, updates=5), model.join():
            for step in range(2 + dist.get_rank()):
                model(batch(step)).sum().backward()

    return timed(run)


@scenario
def budget_is_kept_under_ddp():
    """Two forwards in a step are one too many."""
    net = make()
    model = DistributedDataParallel(net, broadcast_buffers=True)

    def run():
        with bnguard.frozen(net, updates=1):
            model(batch())
            model(batch())

    return timed(run)


def overwritten(inside, group=None):
    """DDP puts rank 0's statistics in the place of rank 1's."""
    net = make().eval()
    model = DistributedDataParallel(net)
    net[1].running_mean.data += dist.get_rank()
    before = statistics(net)

    def run():
        model(batch())
        inside()

    result = timed(guarded(net, run, group=group))
    return {**result, "restored": same(before, statistics(net))}


@scenario
def overwritten_and_left():
    """The rank that would be asked has failed."""

    def leave():
        if not is_second():
            raise RuntimeError("mine")

    return overwritten(leave)


@scenario
def overwritten_and_failed():
    """The rank that would ask has failed."""
    return overwritten(fail)


@scenario
def overwritten_alone():
    """Nobody is asked."""
    return overwritten(lambda: None, group=False)


@scenario
def abandoned_generator():
    """Rank 1 stops asking for batches; the error that led it there comes out at once."""
    net = make().eval()

    def batches():
        with bnguard.frozen(net):
            for _ in range(3):
                yield batch()

    def run():
        for number, images in enumerate(batches()):
            net(images)
            fail()
            if number == 2:
                dist.barrier()  # rank 0 comes to the end of its block only after rank 1 has come here

    result = timed(run)
    if is_second():
        dist.barrier()
    return result


@scenario
def abandoned_strict_generator():
    """The same with a decorator, and ``break``."""
    net = make().eval()

    @bnguard.strict
    def batches(net):
        for _ in range(3):
            yield net(batch())

    def run():
        for number, _ in enumerate(batches(net)):
            if is_second():
                break
            if number == 2:
                dist.barrier()

    result = timed(run)
    if is_second():
        dist.barrier()
    return result


@scenario
def lines():
    """A decorated function is one place, wherever it is called from."""
    net = make().eval()

    @bnguard.strict
    def validate(net):
        if is_second():
            move(net)
        return net(batch()).sum()

    def run():
        if is_second():
            validate(net)
        else:
            str(validate(net).item())

    return timed(run)


@scenario
def coroutine():
    """Ranks that wait another number of times meet once a call."""
    net = make().eval()

    @bnguard.strict
    async def predict(net, pauses):
        for _ in range(pauses):
            await asyncio.sleep(0)
        return net(batch())

    @bnguard.strict
    async def stream(net, count):
        for _ in range(count):
            await asyncio.sleep(0)
            yield net(batch())

    async def main():
        await predict(net, 1 + 3 * dist.get_rank())
        return [item async for item in stream(net, 2 + dist.get_rank())]

    return timed(lambda: asyncio.run(main()))


@scenario
def finding_between_resumptions():
    """Of rank 1, which ends its call with it: the others hear of it at the end of theirs."""
    net = make().eval()

    @bnguard.strict
    def batches(net):
        yield net(batch())
        if is_second():
            move(net)
        yield net(batch())

    return timed(lambda: list(batches(net)))


@scenario
def warning_as_error():
    """A warning about what a block does not cover is an error on rank 1."""
    net = make().eval()

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("error", bnguard.BNGuardWarning)
            with bnguard.frozen(net, group=None):
                if is_second():
                    net.add_module("extra", nn.BatchNorm1d(2))

    # The first rank, told of the error, warns: that is an error there as well.
    return timed(run)


@scenario
def two_on_a_line():
    """The second guard of the line does not begin on rank 1."""
    one, other = make().eval(), make().eval()

    def run():
        with bnguard.frozen(one), bnguard.frozen(other, include="nothing*" if is_second() else "1"):
            pass

    return timed(run)


@scenario
def early_exit():
    """sys.exit() without a code is no failure."""
    net = make().eval()

    def run():
        try:
            with bnguard.frozen(net):
                if is_second():
                    sys.exit()
        except SystemExit:
            pass

    return timed(run)


@scenario
def check_on_one_only():
    """Rank 0 looks once more than rank 1, which is at the end of the block already."""
    net = make().eval()

    def run():
        with bnguard.frozen(net) as guard:
            if not is_second():
                guard.check()

    return timed(run)


@scenario
def out_of_step():
    """Each rank waits at another line: both are told where the other one is."""
    net = make().eval()
    group = dist.new_group(timeout=timedelta(seconds=13))

    def run():
        if is_second():
            with bnguard.frozen(net, group=group):
                pass
        else:
            with bnguard.frozen(net, group=group):
                pass

    return timed(run)


@scenario
def store_after_errors():
    """What was told is deleted when it has been heard, whoever comes last."""
    net = make().eval()

    def run():
        for number in range(20):
            try:
                with bnguard.frozen(net):
                    if is_second() and number % 2:
                        time.sleep(0.005)
                    if is_second() or number % 3 == 0:
                        raise KeyError(number)
            except KeyError:
                pass

    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    dist.barrier()
    more = store.num_keys() - before
    dist.barrier()
    return {"more_keys": more}


@scenario
def groups_that_are_gone():
    """Of a guard whose group is destroyed, and of pickles."""
    pair = dist.new_group([0, 1])
    net = make().eval()
    guard = bnguard.frozen(net, group=pair)
    other = pickle.loads(pickle.dumps(guard))
    again = copy.deepcopy(guard)
    dist.destroy_process_group(pair)

    def run():
        for one in (guard, other, again):
            with one:
                pass

    return timed(run)


@scenario
def skipped_inner_blocks():
    """Rank 1 leaves an outer block before the inner ones; afterwards the ranks are in step."""
    net = make().eval()

    def step(number):
        with bnguard.frozen(net) as guard:
            if number == 1 and is_second():
                raise ValueError("bad batch")
            with bnguard.frozen(net):
                if number == 3 and is_second():
                    move(net)
            guard.check()

    def run():
        for number in range(4):
            with suppress(ValueError):
                step(number)

    return timed(run)


@scenario
def first_speaker_has_left():
    """The first rank has failed: the next one warns."""
    net = make().eval()

    def run():
        with bnguard.frozen(net, "restore"):
            if not is_second():
                raise RuntimeError("mine")
            move(net)

    return timed(run)


@scenario
def warning_as_error_between_resumptions():
    """An error of the guard's own is told once, and the next call is in step."""
    net = make().eval()

    @bnguard.strict
    def batches(net):
        if is_second() and len(net) == 4:
            net.add_module("extra", nn.BatchNorm1d(2))
        yield 1
        yield 2

    def run():
        try:
            with warnings.catch_warnings():
                if is_second():
                    warnings.simplefilter("error", bnguard.BNGuardWarning)
                list(batches(net))
        except bnguard.BNGuardWarning:
            pass
        for _ in range(2):
            list(batches(net))

    return timed(run)


@scenario
def strict_of_several_models():
    """Called from two lines, with a block inside of each resumption."""
    nets = [make().eval() for _ in range(2)]

    @bnguard.strict
    def batches(nets):
        for _ in range(3):
            with bnguard.frozen(nets[0][1]):
                pass
            yield 1

    def run():
        if is_second():
            list(batches(nets))
        else:
            tuple(batches(nets))

    return timed(run)
