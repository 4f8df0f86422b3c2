"""Statistics without values: the meta device, fake tensors, lazy modules; and how they get some inside a block."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, statistics, told, values, warns
from tests.nets import NORMS, images, warmed

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

EVERY_LAYER = pytest.mark.parametrize("kind", NORMS)
GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "budget": {"updates": 1},
    "affine": {"on_change": "restore", "affine": True},
}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)
PREDICTED = ("BatchNorm", "SyncBatchNorm", "InstanceNorm")
VALUELESS = "not compared at exit: on the meta device, fake, or inside a transform, its statistics have no values"


def make_net(kind: str, device: str = "cpu") -> nn.Sequential:
    """A convolution and the layer."""
    torch.manual_seed(0)
    return warmed(nn.Sequential(nn.Conv2d(2, 2, 1), NORMS[kind]())).to(device)


# The meta device.


@EVERY_GUARD
@EVERY_LAYER
def test_model_on_the_meta_device_runs_as_unguarded(kind: str, guard: str) -> None:
    """A forward on the meta device gives what the twin gives; an update that is predicted is judged as ever."""
    net, twin, x = make_net(kind, "meta"), make_net(kind, "meta"), images().to("meta")
    objects = statistics(net)
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
        output = net(x)
        assert (output.shape, output.is_meta) == (twin(x).shape, True)
    assert (said.error is not None) == (guard == "raise" and kind in PREDICTED)
    assert len(said.warnings) == (guard == "warn" and kind in PREDICTED)
    assert {layer.protection.partition("; ")[2] for layer in block.layers} == {VALUELESS}
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_clean(net)


@EVERY_GUARD
@EVERY_LAYER
def test_guard_of_a_model_on_the_meta_device_is_used_again(kind: str, guard: str) -> None:
    """The second and third block of a guard are like the first."""
    net = make_net(kind, "meta").eval()
    block = bnguard.frozen(net, **GUARDS[guard])
    for _ in range(4):
        with block:
            assert net(images().to("meta")).is_meta
        assert_clean(net)


@EVERY_LAYER
def test_second_update_on_the_meta_device_is_counted(kind: str) -> None:
    """``updates=1`` counts forwards that it can predict; of the others nothing can be told there."""
    net, x = make_net(kind, "meta"), images().to("meta")
    with told() as said, bnguard.frozen(net, updates=1):
        net(x)
        net(x)
    assert (said.error is not None) == (kind in PREDICTED)


@EVERY_GUARD
def test_model_that_goes_to_the_meta_device_inside(guard: str) -> None:
    """It stays there, as nothing of it has a value to bring back; a forward before that is judged."""
    net = make_net("BatchNorm")
    with told(), bnguard.frozen(net, **GUARDS[guard]):
        net.to("meta")
        if guard != "raise":
            assert net(images().to("meta")).is_meta
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert_clean(net)


@pytest.mark.parametrize("guard", ["raise", "restore", "running"])
@EVERY_LAYER
def test_deferred_initialisation_inside(kind: str, guard: str) -> None:
    """``to_empty`` and ``load_state_dict`` inside give a meta model its first values: no finding, they stay."""
    net, source = make_net(kind, "meta"), make_net(kind)
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        net.to_empty(device="cpu")
        net.load_state_dict(source.state_dict())
        assert_same_bits(net.eval()(images()), source.eval()(images()))
    assert block.changes == ()
    assert_same_bits(net.state_dict(), source.state_dict())
    assert_clean(net)


@EVERY_LAYER
def test_assigned_statistics_of_a_meta_model_are_held(kind: str) -> None:
    """After ``load_state_dict(assign=True)`` inside, forwards are held on the new tensors, which are the user's."""
    net, source = make_net(kind, "meta"), make_net(kind)
    twin, given = copy.deepcopy(source), source.state_dict()
    before = values(given)
    with bnguard.frozen(net, "restore"):
        net.load_state_dict(given, assign=True)
        assert_same_bits(net(images()), twin(images()))
    assert_same_bits(net.state_dict(), before)
    assert_same_bits(given, before)


def test_model_made_under_a_device_context_is_guarded() -> None:
    """A block inside ``with torch.device("meta")`` guards a model that is on the CPU, on the CPU."""
    net, twin = make_net("BatchNorm"), make_net("BatchNorm")
    before = state_of(net)
    x = images()
    with torch.device("meta"), bnguard.frozen(net, "restore"):
        output = net(x)
    assert_same_bits(output, twin(x))
    assert_same_bits(net.state_dict(), before)


# Fake tensors.


@EVERY_GUARD
@EVERY_LAYER
def test_fake_model_runs_as_unguarded(kind: str, guard: str) -> None:
    """A model that was made under ``FakeTensorMode`` gives fake outputs, and is judged where that is predicted."""
    with FakeTensorMode():
        net = nn.Sequential(nn.Conv2d(2, 2, 1), NORMS[kind]())
        x = torch.empty(4, 2, 5, 5)
        with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
            assert net(x).shape == x.shape
    assert (said.error is not None) == (guard == "raise" and kind in PREDICTED)
    assert len(said.warnings) == (guard == "warn" and kind in PREDICTED)
    assert block.layers[0].protection.endswith(VALUELESS)
    assert_clean(net)


@EVERY_GUARD
def test_block_on_a_fake_model_makes_torch_warn_of_nothing(guard: str) -> None:
    """Asking for its pointer makes torch warn, as a rule once a process."""
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
            block = bnguard.frozen(net, **GUARDS[guard])
            for _ in range(3):
                with block:
                    net(torch.empty(4, 2, 5, 5))
    finally:
        torch.set_warn_always(was_always)
    assert [str(warning.message) for warning in caught] == []


@EVERY_GUARD
@EVERY_LAYER
@pytest.mark.parametrize("where", ["inside", "around", "entered-inside", "left-inside"])
def test_real_model_in_fake_mode_keeps_its_statistics(where: str, kind: str, guard: str) -> None:
    """A fake forward of a real model moves at most what the twin's moves; the guard puts back, warns or raises."""
    net, twin = make_net(kind), make_net(kind)
    before, x = values(statistics(net)), images()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    block = bnguard.frozen(net, **GUARDS[guard])

    def run(model: nn.Module) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model(x)

    with told() as said:
        if where == "inside":
            with block:
                run(net)
        elif where == "around":
            with mode, block:
                net(x)
        elif where == "entered-inside":
            with mode:
                block.start()
            net.eval()(x)
            net.train()
            block.stop()
        else:
            with block, mode:
                net(x)
    if where != "entered-inside":
        run(twin)
    if guard in ("raise", "restore", "running", "affine"):
        assert_same_bits(statistics(net), before)
    elif said.error is None:
        assert_same_bits(statistics(net), statistics(twin))
    assert all(type(tensor) is Tensor for tensor in statistics(net).values())
    assert_clean(net)


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
@pytest.mark.parametrize("guard", ["warn", "restore", "running", "budget"])
@EVERY_LAYER
def test_fake_trace_has_nothing_of_the_guard(kind: str, guard: str, tracing_mode: Any) -> None:
    """``make_fx`` on fake tensors inside a block gives the graph of the unguarded model, node for node."""
    net, twin = make_net(kind).eval(), make_net(kind).eval()
    before = state_of(net)

    def trace(model: nn.Module) -> str:
        def run(state: Any, input: Tensor) -> Tensor:
            return torch.func.functional_call(model, state, (input,))

        return make_fx(run, tracing_mode=tracing_mode)(dict(model.state_dict()), images()).code

    with bnguard.frozen(net, **GUARDS[guard]) as block:
        code = trace(net)
    assert code == trace(twin)
    assert block.changes == ()
    assert_same_bits(net.state_dict(), before)


def test_forward_in_inference_mode_of_a_block_left_outside() -> None:
    """A block that begins in inference mode may end outside, and the other way round; what it made can be written."""
    net = make_net("BatchNorm")
    before = state_of(net)
    with torch.inference_mode():
        block = bnguard.frozen(net, "restore").start()
        net(images())
    net(images()).sum().backward()
    block.stop()
    block.start()
    with torch.inference_mode():
        net(images())
        block.stop()
    assert_same_bits(net.state_dict(), before)


# Lazy modules.


LAZY = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}


def lazy_input(dims: int) -> Tensor:
    """A batch from which a lazy layer learns that it has three channels."""
    return torch.randn(4, 3, *[3] * (dims if dims > 1 else 1), generator=torch.Generator().manual_seed(5)) * 2 + 1


@pytest.mark.parametrize("dims", LAZY)
@pytest.mark.parametrize("on_change", ["restore", "warn"])
def test_lazy_layer_materialised_inside(dims: int, on_change: Any) -> None:
    """A lazy layer that gets its shape inside: the twin's results; under restore the initial statistics."""
    net, x = nn.Sequential(LAZY[dims]()), lazy_input(dims)
    twin = nn.Sequential(LAZY[dims]())
    with warns(count=on_change == "warn"), bnguard.frozen(net, on_change):
        assert_same_bits(outcome(net, x), outcome(twin, x))
    initial = {
        "0.running_mean": torch.zeros(3),
        "0.running_var": torch.ones(3),
        "0.num_batches_tracked": torch.tensor(0),
    }
    assert_same_bits(statistics(net), initial if on_change == "restore" else statistics(twin))
    assert type(net[0]) is type(twin[0])
    assert_clean(net)
    assert_same_bits(outcome(net, x)["output"], outcome(twin, x)["output"])


@pytest.mark.parametrize("dims", LAZY)
def test_lazy_layer_materialised_inside_raises(dims: int) -> None:
    """Under raise the first forward of a lazy layer raises; its statistics are as torch initialises them."""
    net = nn.Sequential(LAZY[dims]())
    with pytest.raises(bnguard.StatsChangedError, match=r"0 \(BatchNorm\dd\)"), bnguard.frozen(net):
        net(lazy_input(dims))
    assert_same_bits(net[0].running_mean, torch.zeros(3))
    assert_same_bits(net[0].num_batches_tracked, torch.tensor(0))
    assert_clean(net)


@pytest.mark.parametrize("dims", LAZY)
def test_lazy_layer_with_use_running_stats(dims: int) -> None:
    """With use_running_stats the first forward of a lazy layer normalises with the initial statistics."""
    net, x = nn.Sequential(LAZY[dims]()), lazy_input(dims)
    twin = nn.Sequential(LAZY[dims]()).eval()
    with bnguard.frozen(net, use_running_stats=True):
        assert_same_bits(outcome(net, x), outcome(twin, x))
    assert_same_bits(statistics(net), statistics(twin))


@pytest.mark.parametrize("dims", LAZY)
@pytest.mark.parametrize("on_change", ["raise", "warn", "restore"])
def test_lazy_layer_that_never_gets_its_shape(dims: int, on_change: Any) -> None:
    """A block around a lazy layer that is not run is silent, and the layer is as lazy as before."""
    net = nn.Sequential(LAZY[dims]())
    objects = statistics(net)
    with bnguard.frozen(net, on_change, affine=True) as guard:
        pass
    assert guard.changes == ()
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert is_lazy(net[0].running_mean)
    assert_clean(net)
    net(lazy_input(dims))
    assert net[0].num_batches_tracked == 1


@pytest.mark.parametrize("on_change", ["restore", "warn"])
def test_lazy_layer_that_is_initialised_and_moved(on_change: Any) -> None:
    """A write after the initialisation is found; under restore torch's initial statistics come back."""
    layer = nn.LazyBatchNorm2d()
    with warns(), bnguard.frozen(layer, on_change) as guard:
        layer.eval()(torch.randn(4, 3, 2, 2))
        layer.running_var.add_(1)
    twin = nn.BatchNorm2d(3)
    if on_change == "warn":
        twin.running_var.add_(1)
    assert_same_bits(layer.state_dict(), twin.state_dict())
    assert guard.changes[0].buffers == ("running_var",)


def make_lazy() -> nn.Sequential:
    """A net that gets its shape at its first forward."""
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.LazyBatchNorm2d())


@pytest.mark.parametrize("guard", ["raise", "warn", "restore", "running", "affine"])
def test_pickle_of_a_lazy_model_made_inside_gets_its_shape_unguarded(guard: str) -> None:
    """It is as lazy as its original, and trains as the pickle of an unguarded twin. torch copies no lazy model."""
    torch.manual_seed(0)
    net = make_lazy()
    twin = pickle.loads(pickle.dumps(net))
    with bnguard.frozen(net, **GUARDS[guard]):
        other = pickle.loads(pickle.dumps(net))
        with pytest.raises(ValueError, match="uninitialized parameter"):
            copy.deepcopy(net)
    assert_clean(other)
    assert is_lazy(other[1].running_mean)
    assert_same_bits(outcome(other, images()), outcome(twin, images()))
    assert_same_bits(other.state_dict(), twin.state_dict())
    assert [p.requires_grad for p in other.parameters()] == [True] * 4


@pytest.mark.parametrize("guard", ["restore", "running"])
def test_lazy_model_that_loads_its_shape_inside(guard: str) -> None:
    """``load_state_dict`` gives a lazy layer shape and values: those are a change, and torch's initial ones return."""
    source = warmed(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    net = make_lazy()
    with told() as said, bnguard.frozen(net, **GUARDS[guard]):
        net.load_state_dict(source.state_dict())
        assert_same_bits(net.state_dict(), source.state_dict())
    assert (said.error or said.warnings[0]).startswith("running statistics of 1 layer changed inside frozen():")
    assert_same_bits(net[1].running_mean, torch.zeros(2))
    assert_same_bits(net[1].running_var, torch.ones(2))
    assert_same_bits(net[1].weight, source[1].weight)
