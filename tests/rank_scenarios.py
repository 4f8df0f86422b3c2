"""What each rank of a distributed run does in a scenario, and what it reports of it."""

import copy
import os
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnguard

__all__ = ["SCENARIOS", "taking_into"]

SCENARIOS = {}


def taking_into(scenarios):
    """A decorator that takes in a scenario under its name."""

    def scenario(function):
        scenarios[function.__name__] = function
        return function

    return scenario


scenario = taking_into(SCENARIOS)


def device():
    """Where this rank computes."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def make(channels=4):
    """The same net on all ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(36 * channels, 2))
    return net.to(device())


def batch(seed=None):
    """Images, others on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank() if seed is None else seed)
    return torch.randn(4, 3, 8, 8, generator=generator).to(device())


def bits(net):
    """State and gradients, for comparison."""
    tensors = [
        *net.state_dict().values(),
        *[parameter.grad for parameter in net.parameters() if parameter.grad is not None],
    ]
    return [tensor.detach().clone() for tensor in tensors]


def same(one, other):
    """Whether these are the same bits."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def statistics(net):
    """The buffers."""
    return [buffer.detach().clone() for buffer in net.buffers()]


def outcome(function):
    """What a function raises and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            function()
        except Exception as found:
            error = found
    said = [str(warning.message) for warning in caught if issubclass(warning.category, bnguard.BNGuardWarning)]
    return {
        "error": None if error is None else type(error).__name__,
        "text": "" if error is None else str(error),
        "notes": getattr(error, "__notes__", []),
        "warnings": said,
    }


@contextmanager
def patience(seconds):
    """A shorter timeout of the process group."""
    store = dist.distributed_c10d._get_default_store()
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))
    yield
    store.set_timeout(before)


def guarded(net, inside, on_change="raise", **options):
    """One block."""

    def run():
        with bnguard.frozen(net, on_change, **options):
            inside()

    return run


def move(net):
    """A change that no forward explains."""
    net[1].running_mean.data += 1


@scenario
def clean():
    """Nothing happens on any rank."""
    net = make().eval()
    return outcome(guarded(net, lambda: net(batch())))


@scenario
def change_on_one():
    """Rank 1 writes to its statistics."""
    net = make().eval()
    before = statistics(net)
    result = outcome(guarded(net, lambda: move(net) if dist.get_rank() == 1 else None))
    return {**result, "restored": same(before, statistics(net))}


@scenario
def same_change_on_all():
    """All of them do."""
    net = make().eval()
    return outcome(guarded(net, lambda: move(net)))


@scenario
def other_change_on_another():
    """Two ranks, two layers."""
    net = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(4)])

    def write():
        net[dist.get_rank()].running_var.data += 1

    return outcome(guarded(net, write))


@scenario
def forward_stopped_on_one():
    """Rank 1 is in train mode: it raises at once, and waits for nobody; the others raise at the end."""
    net = make().train(dist.get_rank() == 1)
    return outcome(guarded(net, lambda: net(batch())))


@scenario
def own_error_on_one():
    """Rank 1 fails for a reason of its own."""
    net = make().eval()

    def fail():
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory, say\nand more")

    result = outcome(guarded(net, fail))
    dist.barrier()  # all of them come here
    return result


@scenario
def own_error_after_a_change():
    """Rank 1 changes, and fails for another reason."""
    net = make().eval()

    def fail():
        if dist.get_rank() == 1:
            move(net)
            raise KeyError("label")

    return outcome(guarded(net, fail))


@scenario
def absent_rank():
    """Rank 1 never enters the block."""
    net = make().eval()

    def run():
        with bnguard.frozen(net):  # ranks meet by line: at another one they are as many times as the others
            net(batch())

    with patience(2):
        result = outcome(run) if dist.get_rank() != 1 else {}
    dist.barrier()
    return result


@scenario
def absent_rank_and_a_change():
    """Rank 0 has something to say of its own."""
    net = make().eval()

    def run():
        with bnguard.frozen(net):
            move(net)

    with patience(1):
        result = outcome(run) if dist.get_rank() == 0 else {}
    dist.barrier()
    return result


@scenario
def absent_rank_without_group():
    """With group=False nobody waits."""
    net = make().eval()
    result = outcome(guarded(net, lambda: net(batch()), group=False)) if dist.get_rank() == 0 else {}
    dist.barrier()
    return result


@scenario
def change_on_one_without_group():
    """With group=False one raises alone."""
    net = make().eval()
    return outcome(guarded(net, lambda: move(net) if dist.get_rank() == 1 else None, group=False))


@scenario
def warn_in_train_mode():
    """All update: one of them warns, once."""
    net = make()
    twin = copy.deepcopy(net)

    def run():
        for _ in range(2):
            net(batch())

    result = outcome(guarded(net, run, "warn"))
    twin(batch())
    twin(batch())
    return {**result, "twin": same(statistics(twin), statistics(net))}


@scenario
def warn_of_another():
    """Only the last rank changes: the first one warns."""
    net = make().eval()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    return outcome(guarded(net, lambda: move(net) if is_last else None, "warn"))


@scenario
def restore_of_another():
    """The same under restore."""
    net = make().eval()
    before = statistics(net)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    result = outcome(guarded(net, lambda: move(net) if is_last else None, "restore"))
    return {**result, "restored": same(before, statistics(net))}


@scenario
def check_on_one():
    """check() agrees as well; what comes after it is not lost."""
    net = make().eval()

    def run():
        with bnguard.frozen(net) as guard:
            guard.check()
            if dist.get_rank() == 1:
                move(net)
            guard.check()

    return outcome(run)


@scenario
def many_blocks():
    """One after the other, nested, and as a decorator; the store keeps nothing of those that are over."""
    net = make()

    @bnguard.strict(on_change="restore")
    def step(net):
        with bnguard.frozen(net[1], "restore"):
            net(batch())

    def run():
        for _ in range(30):
            step(net)

    store = dist.distributed_c10d._get_default_store()
    step(net)  # the first time, ranks agree on a number
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    result = outcome(run)
    dist.barrier()
    more = store.num_keys() - before
    dist.barrier()
    return {**result, "more_keys": more}


@scenario
def generator():
    """Each resumption is a block; its end is none of the others' business."""
    net = make().eval()

    @bnguard.frozen(net)
    def batches():
        yield net(batch())
        yield net(batch())

    return outcome(lambda: list(batches()))


def timed(function):
    """The outcome, and how long it took."""
    start = time.monotonic()
    return {**outcome(function), "seconds": time.monotonic() - start}


@scenario
def other_folders():
    """Each rank works in a folder of its own: the line is another one in messages, not for the ranks."""
    net = make().eval()
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 1:
            os.chdir(folder)
        result = timed(guarded(net, lambda: net(batch())))
        os.chdir(before)
    return result


@scenario
def threads():
    """Two threads at one line, and two at different lines that come in another order on each rank."""
    failures = []

    def work(net, order):
        try:
            for _ in range(20):
                with bnguard.frozen(net):
                    net(batch())
            for first in (order, not order):
                if first:
                    with bnguard.frozen(net):
                        net(batch())
                else:
                    with bnguard.frozen(net):
                        net(batch())
        except Exception as error:
            failures.append(error)

    def run():
        workers = [
            threading.Thread(target=work, args=(make().eval(), bool(number) ^ dist.get_rank())) for number in (0, 1)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]

    return timed(run)


@scenario
def forked_worker():
    """A worker of a DataLoader is no rank."""

    class Data(torch.utils.data.Dataset):
        net = make().eval()

        def __len__(self):
            return 4

        def __getitem__(self, index):
            with bnguard.frozen(self.net), torch.no_grad():
                return self.net(torch.ones(1, 3, 8, 8))[0]

    def run():
        list(torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
        with bnguard.frozen(Data.net):
            Data.net(batch())

    return timed(run)


@scenario
def copied_guard():
    """A copy shares the group."""
    net = make().eval()
    guard = copy.deepcopy(bnguard.frozen(net, group=dist.group.WORLD))

    def run():
        with guard:
            net(batch())

    return timed(run)


@scenario
def timeout_of_a_group():
    """A group of its own, with a short timeout."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    net = make().eval()

    def run():
        with bnguard.frozen(net, group=group):
            net(batch())

    result = timed(run) if dist.get_rank() == 0 else {}
    dist.barrier()
    return result


@scenario
def two_ddp_groups():
    """Ranks 0 and 1 train one model, 2 and 3 another; the guard is of all."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    net = make().eval()
    model = DistributedDataParallel(net, process_group=groups[dist.get_rank() // 2])
    net[1].running_mean.data += dist.get_rank()
    return outcome(guarded(net, lambda: model(batch())))


@scenario
def subgroup():
    """Ranks 0 and 1 agree among themselves; the others are not asked."""
    pair = dist.new_group([0, 1])
    net = make().eval()
    result = {}
    if dist.get_rank() < 2:
        result = outcome(guarded(net, lambda: move(net) if dist.get_rank() == 1 else None, group=pair))
    alone = outcome(guarded(net, lambda: None, group=pair)) if dist.get_rank() > 1 else {}
    dist.barrier()
    return {**result, "alone": alone}


@scenario
def wrong_group():
    """Refused, with what it must be."""
    return outcome(lambda: bnguard.frozen(make(), group=[0, 1]))


def train_ddp(guard, broadcast=True, accumulate=False, steps=3, sync=False):
    """Some steps under DistributedDataParallel."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make()) if sync else make()
    model = DistributedDataParallel(net, broadcast_buffers=broadcast)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    outputs = []
    with guard(net):
        for step in range(steps):
            optimizer.zero_grad()
            if accumulate:
                with model.no_sync():
                    outputs.append(model(batch(10 + step + dist.get_rank())))
                    outputs[-1].square().mean().backward()
            outputs.append(model(batch(step + dist.get_rank())))
            outputs[-1].square().mean().backward()
            optimizer.step()
    return net, [output.detach() for output in outputs]


def reset_after_forward(net):
    """What a restored run comes to, by hand: the buffers of entry after each forward."""
    held = [buffer.clone() for buffer in net.buffers()]

    def put_back(*_):
        for buffer, value in zip(net.buffers(), held, strict=True):
            buffer.data.copy_(value)

    handle = net.register_forward_hook(put_back)

    @contextmanager
    def until():
        yield
        handle.remove()

    return until()


def ddp(broadcast, accumulate=False):
    """Restore and warn against twins, under DDP."""
    results = {}
    for policy, twin_guard in (("restore", reset_after_forward), ("warn", lambda net: nullcontext())):
        made = {}

        def run(policy=policy, made=made):
            made["ours"] = train_ddp(lambda inner: bnguard.frozen(inner, policy), broadcast, accumulate)

        said = outcome(run)
        twin, outputs = train_ddp(twin_guard, broadcast, accumulate)
        net, ours = made["ours"]
        results[policy] = {**said, "twin": same(bits(net), bits(twin)) and same(ours, outputs)}
    return results


@scenario
def ddp_broadcast():
    """broadcast_buffers=True."""
    return ddp(broadcast=True)


@scenario
def ddp_own_buffers():
    """broadcast_buffers=False."""
    return ddp(broadcast=False)


@scenario
def ddp_accumulation():
    """Gradient accumulation with no_sync()."""
    return ddp(broadcast=True, accumulate=True)


@scenario
def sync_batch_norm():
    """SyncBatchNorm, on GPUs: restore and warn against twins."""
    results = {}
    for policy, twin_guard in (("restore", reset_after_forward), ("warn", lambda net: nullcontext())):
        made = {}

        def run(policy=policy, made=made):
            made["ours"] = train_ddp(lambda inner: bnguard.frozen(inner, policy), sync=True)

        said = outcome(run)
        twin, outputs = train_ddp(twin_guard, sync=True)
        net, ours = made["ours"]
        results[policy] = {**said, "twin": same(bits(net), bits(twin)) and same(ours, outputs)}
    return results


@scenario
def ddp_overwrites():
    """Rank 1 has other statistics: DDP's broadcast takes their place at the first forward."""
    results = {}
    for policy in ("raise", "restore", "warn"):
        net = make().eval()
        model = DistributedDataParallel(net)
        net[1].running_mean.data += dist.get_rank()
        before = statistics(net)
        made = {}

        def run(net=net, model=model, policy=policy, made=made):
            with bnguard.frozen(net, policy) as made["guard"]:
                model(batch())

        said = outcome(run)
        results[policy] = {
            **said,
            "restored": same(before, statistics(net)),
            "zeros": bool(net[1].running_mean.eq(0).all()),
            "changes": len(made["guard"].changes),
        }
    return results


@scenario
def ddp_write():
    """Rank 1 writes to its statistics after DDP's broadcast: that is no broadcast."""
    net = make().eval()
    model = DistributedDataParallel(net)
    before = statistics(net)

    def run():
        with bnguard.frozen(net):
            model(batch())
            if dist.get_rank() == 1:
                move(net)

    return {**outcome(run), "restored": same(before, statistics(net))}


@scenario
def ddp_join():
    """Ranks with other numbers of batches, in join(): nothing hangs, nothing moves."""
    net = make()
    model = DistributedDataParallel(net)
    before = statistics(net)

    def run():
        with bnguard.frozen(net, "restore"), model.join():
            for step in range(2 + dist.get_rank()):
                model(batch(step)).sum().backward()

    return {**outcome(run), "restored": same(before, statistics(net))}


def trained(model, net, optimizer, watch_of):
    """Three steps, and on rank 1 a validation in train mode."""
    with bnguard.watch(watch_of) as record:
        for step in range(3):
            optimizer.zero_grad()
            model(batch(7 * step + dist.get_rank())).square().mean().backward()
            optimizer.step()
        if dist.get_rank() == 1:
            for module in net.modules():  # not through DDP, which would wait for rank 0
                module.train()
            with torch.no_grad():
                net(batch())
    return {
        "speaks": record.speaks,
        "rank": record.rank,
        "missing": record.missing_ranks,
        "updates": [(update.where, update.count, update.ranks) for update in record.updates],
        "findings": [(finding.code, finding.layers, finding.ranks, finding.what) for finding in record.findings],
        "report": record.report(),
    }


@scenario
def watch_broadcast():
    """DDP with broadcast_buffers=True."""
    net = make()
    model = DistributedDataParallel(net)
    return trained(model, net, torch.optim.SGD(net.parameters(), 0.1), None)


@scenario
def watch_own_buffers():
    """DDP with broadcast_buffers=False; the watch is of the model inside."""
    net = make()
    model = DistributedDataParallel(net, broadcast_buffers=False)
    return trained(model, net, torch.optim.SGD(net.parameters(), 0.1), net)


@scenario
def watch_failure():
    """Rank 1 fails: the first rank does not wait for it for ever."""
    net = make()
    record = bnguard.watch(net)
    try:
        with record:
            net(batch())
            if dist.get_rank() == 1:
                raise RuntimeError("mine")
    except RuntimeError:
        pass
    return {"updates": len(record.updates), "missing": record.missing_ranks}


@scenario
def watch_alone():
    """Only rank 0 watches."""
    net = make()
    result = {}
    if dist.get_rank() == 0:
        with bnguard.watch(net, group=False) as record:
            net(batch())
        result = {"report": record.report(), "ranks": record.updates[0].ranks}
    dist.barrier()
    return result


@scenario
def fsdp2():
    """fully_shard, with mixed precision: held, and bit for bit the twin."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def train(guard, precision):
        net = make()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if precision else MixedPrecisionPolicy()
        # As is usual, normalisation in full precision: torch's own cannot do bfloat16 with statistics in float32.
        fully_shard(net[1], mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32 if precision else None))
        fully_shard(net[3], mp_policy=policy)
        fully_shard(net, mp_policy=policy)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with guard(net):
            for step in range(2):
                optimizer.zero_grad()
                output = net(batch(step))
                output.float().square().mean().backward()
                optimizer.step()
        return net, output.detach()

    results = {}
    for precision in (False, True):
        made = {}

        def run(made=made, precision=precision):
            made["ours"] = train(lambda inner: bnguard.frozen(inner, "restore"), precision)

        said = outcome(run)
        twin, output = train(reset_after_forward, precision)
        net, ours = made["ours"]
        parameters = [parameter.full_tensor() for parameter in net.parameters()]
        twins = [parameter.full_tensor() for parameter in twin.parameters()]
        is_same = same(parameters, twins) and same(statistics(net), statistics(twin)) and torch.equal(ours, output)
        results[str(precision)] = {**said, "twin": is_same}
    stopped = make().train()
    fully_shard(stopped)
    results["raise"] = outcome(guarded(stopped, lambda: stopped(batch())))
    return results


@scenario
def fsdp1():
    """FullyShardedDataParallel, which casts buffers at its first forward where it is asked to."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    results = {}
    for name, precision in (("plain", None), ("buffers", MixedPrecision(torch.float64, buffer_dtype=torch.float64))):
        net = make()
        model = FullyShardedDataParallel(net, mixed_precision=precision, device_id=torch.device("cpu"))
        before = statistics(net)
        made = {}

        def run(model=model, made=made):
            with bnguard.frozen(model, "restore") as made["guard"]:
                for step in range(2):
                    model(batch(step)).sum().backward()

        said = outcome(run)
        after = [buffer.to(old.dtype) for buffer, old in zip(net.buffers(), before, strict=True)]
        results[name] = {**said, "restored": same(before, after), "layers": len(made["guard"].layers)}
    return results


@scenario
def destroyed_group():
    """The block outlives the process group; the last scenario of a job."""
    net = make().eval()

    def run():
        with bnguard.frozen(net):
            dist.barrier()
            dist.destroy_process_group()

    return timed(run)
