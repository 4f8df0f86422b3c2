"""The short way of a guard that is used again, beside the long one: nobody can tell which one a random program went.

The long way is forced by letting no block begin the short one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnguard
from bnguard.guard.again import Again
from bnguard.layers import usual_copy
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.nets import OwnForward
from tests.old_torch import RELEASE

if RELEASE < (2, 12):
    pytest.skip("before torch 2.12 every block goes the long way", allow_module_level=True)

POLICIES: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "running-raise": {"on_change": "restore", "use_running_stats": True},
    "rollback": {"on_change": "rollback"},
    "some": {"on_change": "restore", "include": "0"},
    "updates": {"updates": 1},
    "updates-warn": {"updates": 2, "on_change": "warn"},
    "updates-restore": {"updates": 1, "on_change": "restore"},
    "updates-3": {"updates": 3},
    "affine": {"on_change": "restore", "affine": True},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attempt to begin the short way succeeded."""
    results: list[bool] = []
    begin = Again.begin

    def noted(again: Again) -> bool:
        results.append(begin(again))
        return results[-1]

    monkeypatch.setattr(Again, "begin", noted)
    return results


class Mine(nn.BatchNorm1d):
    """A subclass that changes nothing."""


def make_net(random_: random.Random) -> nn.Module:
    """Some BatchNorm layers, sometimes one of them twice, sometimes within another module, of one width."""
    torch.manual_seed(random_.randrange(1000))
    layers: list[nn.Module] = [nn.BatchNorm1d(6, momentum=random_.choice([0.1, None, 1.0]))]
    layers += [random_.choice([nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()]) for _ in range(random_.randrange(4))]
    if random_.random() < 0.2:
        layers.append(layers[0])
    net: nn.Module = nn.Sequential(*layers)
    return nn.Sequential(net, nn.BatchNorm1d(6)) if random_.random() < 0.3 else net


def _first_norm(net: nn.Module) -> nn.BatchNorm1d:
    return next(module for module in net.modules() if isinstance(module, nn.BatchNorm1d))


def _batch(random_: random.Random) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(random_.randrange(1000)))


def _forward(net: nn.Module, random_: random.Random) -> Any:
    output = net(_batch(random_).requires_grad_())
    output.sum().backward()
    return output


def _in_mode(mode: bool) -> Callable[[nn.Module, random.Random], Any]:
    return lambda net, random_: _forward(net.train(mode), random_)


def _replace_buffer(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).running_mean = torch.full((6,), random_.random())


def _write(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).running_var.data.mul_(1 + random_.random())


def _replace_data(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).running_var.data = torch.full((6,), random_.random())


def _count(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).num_batches_tracked.add_(1)


def _load(net: nn.Module, random_: random.Random) -> None:
    net.load_state_dict({name: value + 1 for name, value in state_of(net).items()})


def _twice(net: nn.Module, random_: random.Random) -> None:
    _forward(net.train(), random_)
    _forward(net, random_)


def _write_in_between(net: nn.Module, random_: random.Random) -> None:
    _forward(net.train(), random_)
    _write(net, random_)
    _forward(net, random_)


def _count_in_between(net: nn.Module, random_: random.Random) -> None:
    _forward(net.train(), random_)
    _count(net, random_)
    _forward(net, random_)


def _some_layers(net: nn.Module, random_: random.Random) -> None:
    for norm in reversed([module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]):
        if random_.random() < 0.7:
            norm.train()(_batch(random_))


def _write_during_forward(net: nn.Module, random_: random.Random) -> None:
    """A module between the layers writes to the next one, or to the one that has just run."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    writer, target = random_.choice(norms), random_.choice(norms)
    handle = writer.register_forward_hook(lambda module, args, output: target.running_mean.data.add_(1))
    try:
        _forward(net.train(), random_)
    finally:
        handle.remove()


def _under_inference(net: nn.Module, random_: random.Random) -> Any:
    with torch.inference_mode():
        return net(_batch(random_)).clone()


def _refused(net: nn.Module, random_: random.Random) -> str:
    try:
        net.train()(torch.zeros(1, 6))
    except ValueError as error:
        return str(error)
    return ""


def _copied(net: nn.Module, random_: random.Random) -> Any:
    twin = copy.deepcopy(net)
    assert_clean(twin)
    return [twin(_batch(random_)), state_of(twin)]


def _clone(net: nn.Module, random_: random.Random) -> Any:
    """A clone of one layer as meta-learning libraries make it, which outlives the block in some programs."""
    layer = _first_norm(net)
    made = layer.__new__(type(layer))
    made.__dict__ = layer.__dict__.copy()
    made.__dict__["_buffers"] = {name: buffer.clone() for name, buffer in layer._buffers.items()}
    net.__dict__["kept_clone"] = [made]  # a list: not among its modules
    return None


def _running_clone(net: nn.Module, random_: random.Random) -> Any:
    _clone(net, random_)
    return net.__dict__["kept_clone"][0](_batch(random_))


def _fail(net: nn.Module, random_: random.Random) -> None:
    raise KeyError("of the user")


def _to_double(net: nn.Module, random_: random.Random) -> None:
    net.double().float()


def _add_layer(net: nn.Module, random_: random.Random) -> None:
    net.add_module(str(len(net._modules)), nn.BatchNorm1d(6))


def _remove_layer(net: nn.Module, random_: random.Random) -> None:
    if len(net._modules) > 1:
        del net._modules[list(net._modules)[-1]]


def _add_hook(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).register_forward_hook(lambda module, args, output: output * 2)


def _patch_forward(net: nn.Module, random_: random.Random) -> None:
    layer = _first_norm(net)
    own = type(layer).forward
    layer.forward = lambda input: own(layer, input) + 1  # type: ignore[method-assign]


def _other_class(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).__class__ = Mine  # type: ignore[assignment]


def _new_buffer(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).register_buffer("extra", torch.zeros(1))


class Counting(nn.Module):
    """Counts its forwards in a buffer that is no running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        self.seen.add_(1)
        return input


def _add_counting(net: nn.Module, random_: random.Random) -> None:
    net.add_module(str(len(net._modules)), Counting())


def _add_own_forward(net: nn.Module, random_: random.Random) -> None:
    net.add_module(str(len(net._modules)), OwnForward(6))


def _guard_of_another(net: nn.Module, random_: random.Random) -> None:
    net.__dict__["open_guards"] = [*net.__dict__.get("open_guards", []), bnguard.frozen(net, "restore").start()]


def _stop_others(net: nn.Module, random_: random.Random) -> None:
    for guard in reversed(net.__dict__.pop("open_guards", [])):
        guard.stop()


def _new_dictionary(net: nn.Module, random_: random.Random) -> None:
    layer = _first_norm(net)
    layer.__dict__ = dict(layer.__dict__)


def _without_tracking(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).track_running_stats = not _first_norm(net).track_running_stats


def _caught(net: nn.Module, random_: random.Random) -> str:
    try:
        _forward(net.train(), random_)
    except bnguard.StatsChangedError as error:
        return str(error).splitlines()[0]
    return ""


def _halve(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).half()


def _no_statistics(net: nn.Module, random_: random.Random) -> None:
    _first_norm(net).running_mean = None


def _rename_statistics(net: nn.Module, random_: random.Random) -> None:
    layer = _first_norm(net)
    if "running_mean" in layer._buffers:
        layer.register_buffer("mean", layer._buffers.pop("running_mean"))


def _not_persistent(net: nn.Module, random_: random.Random) -> None:
    layer = _first_norm(net)
    layer.register_buffer("running_mean", layer._buffers.get("running_mean"), persistent=False)


def _float8(*names: str) -> Callable[[nn.Module, random.Random], str]:
    """All layers run, one of them with statistics that torch's batch_norm refuses, and does not join to others."""

    def convert(net: nn.Module, random_: random.Random) -> str:
        layer = _first_norm(net)
        for name in names:
            buffer = layer._buffers.get(name)
            if buffer is not None:
                buffer.data = buffer.data.to(torch.float8_e4m3fn)
        errors = []
        for norm in [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]:
            try:
                norm.train()(_batch(random_))
            except (RuntimeError, NotImplementedError) as error:
                errors.append(str(error).splitlines()[0])
        return "\n".join(errors)

    convert.__name__ = f"float8_{len(names)}"
    return convert


# Of torch about what is left of a layer, of the user, and of bnguard.
ERRORS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, bnguard.BNGuardError)

EVENTS: list[Callable[[nn.Module, random.Random], Any]] = [
    _in_mode(True), _in_mode(False), _replace_buffer, _write, _replace_data, _count, _load, _under_inference, _refused,
    _copied, _clone, _running_clone, _fail, _to_double, _add_layer, _add_counting, _add_own_forward, _remove_layer,
    _add_hook, _patch_forward, _other_class, _new_buffer, _new_dictionary,
    _guard_of_another, _stop_others, _without_tracking, _caught, _halve, _no_statistics,
    _twice, _write_in_between, _count_in_between, _some_layers, _write_during_forward,
    _rename_statistics, _not_persistent, _float8("running_mean"), _float8("running_mean", "running_var"),
]  # fmt: skip


def run(events: Iterable[Any], options: dict[str, Any], seed: int = 0) -> list[Any]:
    """What a program says and leaves at every point: blocks of one guard with events inside them and in between."""
    random_ = random.Random(seed)
    net = make_net(random_)
    guard = bnguard.frozen(net, **options)
    trace: list[Any] = []
    for event in events:
        for is_inside in [random_.random() < 0.5] if seed else [True, False]:
            for _ in range(3):
                with told(), guard:
                    _forward_of_quiet_block(net, random_)
            trace.append(_block(net, guard, event, random_, inside=is_inside))
    with told():
        _stop_others(net, random_)
    return trace


def _forward_of_quiet_block(net: nn.Module, random_: random.Random) -> None:
    with contextlib.suppress(*ERRORS):
        net.eval()(_batch(random_))


def _block(net: nn.Module, guard: bnguard.frozen, event: Any, random_: random.Random, *, inside: bool) -> list[Any]:
    outputs: list[Any] = []
    with told() as said:
        try:
            if not inside:
                outputs.append(event(net, random_))
            with guard:
                if inside:
                    outputs.append(event(net, random_))
                outputs.append(_forward(net.eval(), random_))
                outputs.append(_forward(net.train(), random_))
        except ERRORS as error:
            outputs.append(f"{error} {getattr(error, '__notes__', '')}")
    with told(), contextlib.suppress(*ERRORS):
        outputs.append(net(_batch(random_)))
    lines = [line for text in (said.error or "", *said.warnings) for line in text.splitlines()]
    changes = [(change.names, change.buffers, change.updates, change.mean_shift) for change in guard.changes]
    layers = [(layer.names, layer.protection) for layer in guard.layers]
    gradients = [parameter.grad for parameter in net.parameters()]
    if not net.__dict__.get("open_guards"):
        assert_clean(net)
    for clone in net.__dict__.get("kept_clone") or ():
        assert_clean(clone)
    return [outputs, lines, changes, layers, gradients, state_of(net), torch.get_rng_state()]


def assert_same(one: Any, other: Any) -> None:
    """Two traces are equal, tensors by their bits."""
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, (Tensor, dict)):
        assert_same_bits(one, other)
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__.strip("_<>"))
def test_both_ways_are_alike(policy: str, event: Any, monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    """Outputs, gradients, statistics, random numbers, what is said and left behind, of one event inside and outside."""
    if policy == "warn" and event is _patch_forward:
        pytest.skip("the long way has a hook, which sees the forward of the user, too")
    assert_alike([event], policy, 0, monkeypatch)
    assert any(taken) is (policy not in ("rollback", "affine"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_both_ways_are_alike_in_random_programs(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for many events on nets of many forms."""
    events = [event for event in EVENTS if policy != "warn" or event is not _patch_forward]
    for seed in range(1, 200):
        assert_alike(random.Random(seed).choices(events, k=6), policy, seed, monkeypatch)


def assert_alike(events: list[Any], policy: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes the same on the short way and on the long one."""
    short = run(events, POLICIES[policy], seed)
    with monkeypatch.context() as patch:
        patch.setattr(Again, "begin", lambda again: False)
        long = run(events, POLICIES[policy], seed)
    assert_same(short, long)


@pytest.mark.parametrize("policy", ["raise", "warn", "restore", "running"])
def test_blocks_go_the_short_way(policy: str, taken: list[bool]) -> None:
    """The second block on a model, and all that follow, of one guard and of several."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    guard = bnguard.frozen(net, **POLICIES[policy])
    for _ in range(3):
        with guard:
            net(torch.ones(4, 6))
        with bnguard.frozen(net, **POLICIES[policy]):
            net(torch.ones(4, 6))
    assert taken == [True] * 5


def test_strict_goes_the_short_way(taken: list[bool]) -> None:
    """Whatever finds the model."""
    net = nn.Sequential(nn.BatchNorm1d(6))

    @bnguard.strict(on_change="restore")
    def step(net: nn.Module) -> None:
        net(torch.ones(4, 6))

    @bnguard.strict(on_change="restore")
    def closed() -> None:
        net(torch.ones(4, 6))

    for _ in range(3):
        step(net)
        closed()
    assert taken == [True] * 5


class Listed(TorchDispatchMode):
    """Lists what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_inside", [False, True])
def test_what_sees_operations_sees_none_of_a_block(is_inside: bool, taken: list[bool]) -> None:
    """Under a mode a block goes the long way: in, or out where the mode came in between."""
    net = nn.Sequential(nn.BatchNorm1d(6)).eval()
    guard = bnguard.frozen(net, "restore")
    with guard, guard:
        pass
    mode = Listed()
    with guard if is_inside else contextlib.nullcontext(), mode:
        if is_inside:
            guard.stop()
        else:
            guard.start()
    guard.stop()
    assert taken[-1] is is_inside
    assert mode.operations == []
    assert_clean(net)


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_hook_that_was_moved_is_taken_off(policy: str, taken: list[bool]) -> None:
    """Fusing moves the hooks of a layer to another module: they go with the block, the short way too."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()).eval()
    guard = bnguard.frozen(net, **POLICIES[policy])
    for _ in range(3):
        with guard:
            net(torch.ones(4, 6))
    with guard:
        net[1]._forward_pre_hooks.update(net[0]._forward_pre_hooks)
        net[0]._forward_pre_hooks.clear()
    assert taken == [True] * 3
    assert_clean(net)


def test_a_guard_in_two_threads_opens_two_blocks(taken: list[bool]) -> None:
    """Only one of them may go the short way; both hold, and both end."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    before = state_of(net)
    guard = bnguard.frozen(net, "restore")
    for _ in range(3):
        with guard:
            net(torch.ones(4, 6))
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with guard:
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    with guard:
        net(torch.ones(4, 6))
    net(torch.ones(4, 6))
    go_on.set()
    thread.join(30)
    assert_same_bits(state_of(net), before)
    assert_clean(net)
    net(torch.ones(4, 6))
    assert int(_first_norm(net).num_batches_tracked) == 1


def test_a_forward_that_outlasts_its_block_does_not_count_in_the_next(taken: list[bool]) -> None:
    """A forward that began in a block keeps it from being opened again."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "restore")
    for _ in range(3):
        with guard:
            net(torch.ones(4, 6))
    guard.start()
    forward = net[0].forward
    ruling = forward.__self__.ruling  # as a forward of another thread has it in a local variable
    guard.stop()
    with guard:
        assert net[0].forward.__self__.ruling is not ruling
        old = net[0].forward.__self__.ruling
        del ruling
    with guard:
        assert net[0].forward.__self__.ruling is not old  # which is still known here
    del old
    with guard:
        last = id(net[0].forward.__self__.ruling)
    with guard:
        assert id(net[0].forward.__self__.ruling) == last


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_a_guarded_model_is_freed_with_its_last_reference(blocks: int) -> None:
    """Whatever the guard has kept, nothing refers to itself."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "restore")
    for _ in range(blocks):
        with guard:
            net(torch.ones(4, 6))
    parts = [weakref.ref(part) for part in net.modules()]
    gc.disable()
    try:
        del net, guard
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


@pytest.fixture
def copies() -> Iterator[Callable[[], int]]:
    """Says how many copies there are of the statistics of a layer with 4096 channels: as tensors or as memory."""

    def count() -> int:
        tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.numel() == 8192]
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, usual_copy.__file__)])
        return len(tensors) + sum([trace.size for trace in found.traces]) // (4 * 8192)

    tracemalloc.start()
    yield count
    tracemalloc.stop()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_guard_keeps_no_copies_between_its_blocks(blocks: int, copies: Callable[[], int]) -> None:
    """A guard that is kept for later costs no memory for statistics, whichever way its last block went."""
    net = nn.Sequential(nn.BatchNorm1d(4096))
    guard = bnguard.frozen(net, "restore")
    for _ in range(blocks):
        with guard:
            assert copies() == 1
    assert copies() == 0


def _convert_in_place(layer: nn.BatchNorm1d) -> None:
    assert layer.running_mean is not None
    layer.running_mean.data = layer.running_mean.data.double()


def _require_grad(layer: nn.BatchNorm1d) -> None:
    assert layer.running_mean is not None
    layer.running_mean.requires_grad_()


@pytest.mark.parametrize("change", [_convert_in_place, _require_grad], ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("policy", ["raise", "restore", "running"])
def test_statistics_changed_in_place_between_blocks_are_still_compared(
    policy: str, change: Callable[[nn.BatchNorm1d], None], taken: list[bool]
) -> None:
    """Where the short way cannot copy them, the long way does, and finds what is written to them."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, **POLICIES[policy])
    for _ in range(3):
        with guard:
            pass
    change(_first_norm(net))
    before = state_of(net)
    for _ in range(2):
        with told() as said, guard:
            _write(net, random.Random(0))
        assert "running_var" in (said.error or said.warnings[0])
        assert_same_bits(state_of(net), before)
        assert_clean(net)
    assert any(taken)


def test_a_layer_whose_dictionary_was_replaced_between_blocks_is_still_held(taken: list[bool]) -> None:
    """The short way writes to the dictionary that the layer has now, or is not taken."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, use_running_stats=True)
    for _ in range(3):
        with guard:
            pass
    _new_dictionary(net, random.Random(0))
    before, batch = state_of(net), _batch(random.Random(0))
    expected = net.eval()(batch)
    with guard:
        output = net.train()(batch)
    assert_same_bits(output, expected)
    assert_same_bits(state_of(net), before)
    assert_clean(net)
    assert any(taken)


def test_a_forward_replaced_on_the_class_between_blocks_is_noticed() -> None:
    """The next block treats the layer as a new guard would: as one with a forward of its own."""

    class Changing(nn.BatchNorm1d):
        """Gets another forward later."""

    net = nn.Sequential(Changing(6))
    guard = bnguard.frozen(net, "restore")
    for _ in range(3):
        with guard:
            net(torch.ones(4, 6))

    def forward(self: Any, input: Tensor) -> Tensor:
        self.running_mean.add_(1)
        return input * 2

    Changing.forward = forward  # type: ignore[method-assign,assignment]
    before = state_of(net)
    with guard:
        output = net(torch.ones(4, 6))
    assert_same_bits(output, torch.full((4, 6), 2.0))
    assert_same_bits(state_of(net), before)


def test_statistics_replaced_by_equal_ones_inside_are_compared_in_the_next_block() -> None:
    """Under "warn" the new tensors stay; the next block copies and compares these."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "warn")
    for _ in range(2):
        with guard:
            net.double().float()
    with told() as said, guard:
        _write(net, random.Random(0))
    assert said.error is None
    assert "0 (BatchNorm1d): running_var" in said.warnings[0]
    assert_clean(net)


def test_block_that_ends_while_another_one_begins_does_not_return_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that one block had on a layer is not taken for the user's, which the other block would put back."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    with bnguard.frozen(net, "restore"):
        pass
    first = bnguard.frozen(net, "restore").start()
    begin = Again.begin

    def begin_later(again: Again) -> bool:
        first.stop()  # as another thread may do
        return begin(again)

    monkeypatch.setattr(Again, "begin", begin_later)
    second, third = bnguard.frozen(net, "restore").start(), bnguard.frozen(net, "restore").start()
    second.stop()
    third.stop()
    assert_clean(net)


def test_changes_under_warn_are_those_of_the_end_of_the_block() -> None:
    """Whenever they are asked for, and whatever is written in between."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    guards = [bnguard.frozen(net, "warn") for _ in range(2)]
    for _ in range(3):
        for guard in guards:
            with told(), guard:
                pass
    with told() as said, guards[0], guards[1]:
        net(torch.randn(4, 6))
    assert len(said.warnings) == 2
    at_once = guards[0].changes
    _first_norm(net).running_mean.fill_(9)
    with told():
        net[1](torch.randn(4, 6))
    assert guards[1].changes == at_once
    assert [change.updates for change in at_once] == [1, 1]
    assert [change.buffers for change in at_once] == [("running_mean", "running_var", "num_batches_tracked")] * 2
    assert all(change.mean_shift for change in at_once)


def test_a_guard_under_warn_keeps_copies_until_its_changes_are_read(
    taken: list[bool], copies: Callable[[], int]
) -> None:
    """Of then and now; nothing is left once somebody has read them, nor when the guard is gone."""
    net = nn.Sequential(nn.BatchNorm1d(4096))
    for reads in (True, False):
        guard = bnguard.frozen(net, "warn")
        for _ in range(3):
            with told(), guard:
                net(torch.randn(4, 4096))
        assert copies() == 2
        if reads:
            assert len(guard.changes) == 1
        else:
            del guard
        assert copies() == 0
    assert taken[-1]


def test_a_block_under_warn_that_nobody_can_ask_keeps_no_copies(taken: list[bool], copies: Callable[[], int]) -> None:
    """The next guard of the model enters it again, and tells of its own updates."""
    net = nn.Sequential(nn.BatchNorm1d(4096))
    for _ in range(4):
        with told() as said, bnguard.frozen(net, "warn"):
            net(torch.randn(4, 4096))
        assert len(said.warnings) == 1
        assert copies() == 0
    assert taken[-1]


def test_forward_replaced_inside_warn_is_told_of_at_the_end(taken: list[bool]) -> None:
    """The user's own forward takes the place of that of the guard: no line, but no silence either."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "warn")
    for _ in range(3):
        with guard:
            pass
    with told() as said, guard:
        _patch_forward(net, random.Random(0))
        net(torch.randn(4, 6))
    assert taken[-1]
    assert "No forward that bnguard can see explains it" in said.warnings[0]
    assert [change.updates for change in guard.changes] == [0]


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_write_around_updates_within_a_budget_is_found(at: str, taken: list[bool]) -> None:
    """Before the first, between two, and after the last: only what the updates have made of one another stays."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, updates=2)
    for _ in range(3):
        with guard:
            net(torch.randn(4, 6))
    states = [state_of(net)]
    batches = torch.randn(2, 4, 6)
    with told() as said, guard:
        for place, batch in zip(("before", "between"), batches, strict=True):
            if at == place:
                _write(net, random.Random(0))
            net(batch)
            states.append(state_of(net))
        if at == "after":
            _write(net, random.Random(0))
    assert taken[-1]
    assert "0 (BatchNorm1d): running" in str(said.error)
    kept = states[("before", "between", "after").index(at)]
    assert_same_bits(state_of(net[0]), {name[2:]: value for name, value in kept.items() if name.startswith("0.")})
    assert int(net[1].num_batches_tracked) == int(states[2]["1.num_batches_tracked"])
    assert_clean(net)


def test_updates_of_two_threads_share_a_budget(taken: list[bool]) -> None:
    """Forwards that overlap are counted each, and what they leave together is what the block protects."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, updates=2000)
    for _ in range(3):
        with guard:
            pass
    before = int(_first_norm(net).num_batches_tracked)
    with guard:
        threads = [threading.Thread(target=lambda: [net(torch.ones(4, 6)) for _ in range(300)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert taken[-1]
    assert int(_first_norm(net).num_batches_tracked) == before + 900
    assert_clean(net)


@pytest.mark.parametrize("blocks", range(5))
def test_layer_kept_in_a_list_is_named_however_many_blocks_came_before(blocks: int) -> None:
    """A block that is used again looks beside the modules of the model as well."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "restore")
    for _ in range(blocks):
        with guard:
            net(torch.randn(4, 6))
    net.__dict__["kept"] = [nn.BatchNorm1d(6)]
    with told() as said, guard:
        net.__dict__["kept"][0](torch.randn(4, 6))
    assert "kept.0 (BatchNorm1d)" in said.warnings[0]


def test_statistic_that_is_not_saved_is_none_again_after_it_was_deleted(taken: list[bool]) -> None:
    """A buffer of which ``state_dict()`` knows nothing returns as one, in every block of a guard."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    net[0].register_buffer("running_mean", net[0].running_mean, persistent=False)
    before, names = state_of(net), list(net.state_dict())
    guard = bnguard.frozen(net, "restore")
    for _ in range(4):
        with told() as said, guard:
            del net[0].running_mean
        assert "running_mean" in said.warnings[0]
        assert list(net.state_dict()) == names
        assert_same_bits(state_of(net), before)
        for _ in range(3):  # quiet ones
            with guard:
                pass
    assert not any(taken)


class Ending(torch.Tensor):
    """A batch whose normalisation ends a block."""

    guard: bnguard.frozen

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.batch_norm:
            args[0].guard.stop()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_update_within_the_budget_may_outlast_a_block_that_went_the_short_way(taken: list[bool]) -> None:
    """It is an update like any other: output and statistics are the twin's, and the next block protects them."""
    net, twin = nn.Sequential(nn.BatchNorm1d(6)), nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, updates=1)
    for _ in range(3):
        guard.start().stop()
    batch = torch.randn(4, 6)
    ending = batch.as_subclass(Ending)
    ending.guard = guard.start()
    assert_same_bits(net(ending).as_subclass(Tensor), twin(batch))
    assert taken[-1]
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)
    with guard:
        assert_same_bits(net(batch), twin(batch))
    assert_same_bits(state_of(net), state_of(twin))


def test_statistics_that_were_replaced_inside_are_those_that_an_update_within_the_budget_writes() -> None:
    """By a conversion there and back; whatever an earlier block has copied them from."""
    net, twin = nn.Sequential(nn.BatchNorm1d(6)), nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, updates=2)
    for converts in (False, False, False, True):
        with guard:
            if converts:
                net.double().float()
            for batch in torch.randn(2, 4, 6):
                net(batch)
                twin(batch)
    assert_same_bits(state_of(net), state_of(twin))


def test_copies_of_updates_within_a_budget_do_not_pile_up(copies: Callable[[], int]) -> None:
    """However many updates there are, some of each layer are kept."""
    net = nn.Sequential(nn.BatchNorm1d(4096))
    guard = bnguard.frozen(net, updates=100)
    for _ in range(2):
        with guard:
            pass
    with guard:
        for _ in range(100):
            net(torch.randn(2, 4096))
            assert copies() <= 2 * 16 + 1
    assert copies() == 0


def test_layers_that_share_statistics_go_the_long_way_under_a_budget(taken: list[bool]) -> None:
    """An update of one is one of the other; both are within the budget, and nothing else has changed."""
    net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    net[1]._buffers.update(net[0]._buffers)
    guard = bnguard.frozen(net, "warn", updates=1)
    for _ in range(3):
        with told() as said, guard:
            net(torch.randn(4, 6))
        assert (said.error, said.warnings, guard.changes) == (None, [], ())
    assert taken == []


def _convert(norm: nn.Module) -> None:
    for buffer in norm.buffers():
        buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("is_inside", [False, True])
def test_layers_of_two_dtypes_keep_their_budgets(is_inside: bool, is_written: bool, taken: list[bool]) -> None:
    """Also where one is converted inside the block: what an update within the budget has left is the state to keep."""
    net, batch = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)), torch.randn(4, 6)
    guard = bnguard.frozen(net, "warn", updates=2)
    for _ in range(3):
        with guard:
            net[0](batch)
            if not is_inside:
                _convert(net[1])
    with told() as said, guard:
        net[1](batch if is_inside else batch.double())
        _convert(net[1])
        if is_written:
            net[1].running_mean.data.add_(1)
        net[0](batch)
        net[1](batch.double())
    assert [change.names for change in guard.changes] == ([("1",)] if is_written else [])
    assert (said.error, len(said.warnings)) == (None, is_written)
    assert taken[-1]


def test_a_check_under_fake_tensors_reads_what_updates_within_a_budget_have_written(taken: list[bool]) -> None:
    """The copies are made into tensors outside of the mode."""
    net = nn.Sequential(nn.BatchNorm1d(6))
    guard = bnguard.frozen(net, "restore", updates=1)
    for _ in range(2):
        with guard:
            pass
    with told() as said, guard:
        net[0].running_mean.data.add_(1)
        net(torch.randn(4, 6))
        with FakeTensorMode():
            guard.check()
    assert (said.error, [change.names for change in guard.changes]) == (None, [("0",)])
    assert_same_bits(state_of(net), state_of(nn.Sequential(nn.BatchNorm1d(6))))
    assert taken[-1]


def test_layer_whose_width_changes_between_blocks_keeps_its_budget(taken: list[bool]) -> None:
    """Its statistics are the beginning of larger tensors: in the same place in memory at every width."""
    net = nn.Sequential(nn.BatchNorm1d(6, affine=False))
    whole = {name: buffer.data for name, buffer in net[0].named_buffers() if buffer.dim()}
    guard = bnguard.frozen(net, updates=1)
    for number, width in enumerate([6, 6, 6, 4, 4, 5, 6, 6], start=1):
        for name, buffer in whole.items():
            getattr(net[0], name).data = buffer[:width]
        net[0].num_features = width
        with guard:
            net(torch.randn(4, width))
        assert (guard.changes, int(net[0].num_batches_tracked)) == ((), number)
    assert taken[-1]
