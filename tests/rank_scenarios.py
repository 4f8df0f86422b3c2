"""What each rank of a distributed run does in a scenario, and what it reports of it."""

import copy
import os
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnguard
from bnguard.recording import ranks

__all__ = ["SCENARIOS"]

SCENARIOS = {}


def scenario(function):
    """Registers a scenario under its name."""
    SCENARIOS[function.__name__] = function
    return function


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


def guarded(net, inside, on_change="raise", **options):
    """One block."""

    def run():
        with bnguard.frozen(net, on_change, **options):
            inside()

    return run


def move(net):
    """A change that no forward explains."""
    net[1].running_mean.data += 1


def timed(function):
    """The outcome, and how long it took."""
    start = time.monotonic()
    return {**outcome(function), "seconds": time.monotonic() - start}


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
def forward_stopped_on_one():
    """Rank 1 is in train mode."""
    net = make().train(dist.get_rank() == 1)
    return outcome(guarded(net, lambda: net(batch())))


@scenario
def own_error_on_one():
    """Rank 1 fails for a reason of its own."""
    net = make().eval()

    def fail():
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory, say\nand more")

    return outcome(guarded(net, fail))


@scenario
def warn_in_train_mode():
    """All update."""
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
def two_ddp_groups():
    """Ranks 0 and 1 train one model, 2 and 3 another; the guard is of all."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    net = make().eval()
    model = DistributedDataParallel(net, process_group=groups[dist.get_rank() // 2])
    net[1].running_mean.data += dist.get_rank()
    return outcome(guarded(net, lambda: model(batch())))


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
def validation_on_rank_0():
    """Rank 0 validates the module inside DDP under a guard, in eval mode and then in train mode; rank 1 does not."""
    net = make()
    model = DistributedDataParallel(net)
    results = {}
    for mode in ("eval", "train"):

        def run(mode=mode):
            with bnguard.frozen(model.module):
                model.module.train(mode == "train")
                model.module(batch())

        if dist.get_rank() == 0:
            results[mode] = timed(run)
        else:
            time.sleep(0.5)  # something else
    dist.barrier()
    return results


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
        twin, _ = trained_under_ddp(lambda net: nullcontext(), broadcast, 4)
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


@scenario
def guards_and_the_store():
    """Guards leave the store of the process group alone."""
    net = make()
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    result = outcome(guarded(net, lambda: net(batch()), "restore"))
    dist.barrier()
    more = store.num_keys() - before
    dist.barrier()
    return {**result, "more_keys": more}


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
    """Rank 1 fails inside the watch."""
    net = make()
    record = bnguard.watch(net)
    with suppress(RuntimeError), record:
        net(batch())
        if dist.get_rank() == 1:
            raise RuntimeError("mine")
    return {"updates": len(record.updates), "missing": record.missing_ranks}


@scenario
def watch_on_rank_0():
    """Only rank 0 watches, and has less patience than usual."""
    net = make()
    result = {}
    if dist.get_rank() == 0:
        patience, ranks._PATIENCE = ranks._PATIENCE, 1.0
        record = bnguard.watch(net).start()
        net(batch())
        result = timed(record.stop)
        ranks._PATIENCE = patience
        result |= {"patience": patience, "missing": record.missing_ranks, "report": record.report()}
    dist.barrier()
    return result


@scenario
def watch_on_rank_1():
    """Only rank 1 watches: it waits for nobody."""
    net = make()
    result = {}
    if dist.get_rank() == 1:
        record = bnguard.watch(net).start()
        net(batch())
        result = timed(record.stop)
    dist.barrier()
    return result


@scenario
def watch_again():
    """Several watches one after the other, and one in a forked process: none gets the records of another."""
    net = make()
    counts = []
    for number in range(1, 4):
        with bnguard.watch(net) as record:
            if dist.get_rank() == number % 2 and hasattr(os, "fork"):
                child = os.fork()
                if not child:
                    record.stop()
                    os._exit(0)
                os.waitpid(child, 0)
            for _ in range(number):
                net(batch())
        counts.append([(update.count, update.ranks) for update in record.updates])
    return counts


@scenario
def fsdp2():
    """fully_shard, with mixed precision: held, and bit for bit the twin."""
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

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
def recalibrated():
    """Rank 0 has two batches, rank 1 one, any other none; all of them have a spare layer that does not run."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = [[batch(5) * 2, batch(6)[:3] + 4], [batch(7)[:1] - 3], *[[] for _ in range(2, size)]]
    net = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "own": nn.InstanceNorm2d(3, track_running_stats=True)})
    net.register_module("spare", nn.BatchNorm2d(3))
    net = net.to(device()).eval()
    twin, alone = copy.deepcopy(net), copy.deepcopy(net)
    before = copy.deepcopy(net)

    def forward(model, images):
        model["own"](model["norm"](images))

    ddp = DistributedDataParallel(net)
    found = {}

    def together(**options):
        found["result"] = bnguard.recalibrate(ddp, shares[rank], forward=forward, reduce=True, **options)

    result = outcome(together)
    gathered = [None] * size
    dist.all_gather_object(gathered, [tensor.cpu() for tensor in statistics(net)])
    with suppress(ValueError):
        bnguard.recalibrate(alone, shares[rank], forward=forward, exclude="spare")
    outcome(lambda: bnguard.recalibrate(twin, [images for share in shares for images in share], forward=forward))
    expected, learned = statistics(twin), statistics(net)
    refused = outcome(lambda: together(include=["norm", "own", "spare"][: rank + 1]))
    empty = outcome(lambda: bnguard.recalibrate(ddp, [], forward=forward, reduce=True))
    return {
        **result,
        "result": [found["result"].layers, found["result"].unused, found["result"].batches],
        "same_on_all_ranks": all(same(gathered[0], other) for other in gathered),
        "pooled": all(torch.allclose(*pair, rtol=1e-6, atol=1e-6) for pair in zip(learned, expected, strict=True)),
        "own_share": not same(statistics(alone), statistics(twin)),
        "has_moved": not same(statistics(before), learned),
        "refused": [refused["error"], refused["text"]],
        "empty": [empty["error"], empty["text"]],
        "kept": same(learned, statistics(net)),
    }


@scenario
def destroyed_group():
    """The block outlives the process group; the last scenario of a job."""
    net = make().eval()

    def run():
        with bnguard.frozen(net):
            dist.barrier()
            dist.destroy_process_group()

    return timed(run)
