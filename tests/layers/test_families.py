"""Every family of layers with running statistics, under every policy; the oracle is an unguarded twin, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.layers import kinds as _layers
from bnguard.layers import tree as _tree
from tests.asserts import assert_clean, assert_same_bits, outcome, statistics, values, warns
from tests.nets import (
    FrozenNorm,
    FrozenNormOfTorchvision,
    MovingNorm,
    NearlyFrozenNorm,
    OwnForward,
    PlainSubclass,
    ReassigningNorm,
    ScaledNorm,
    SharedNet,
    TwoPasses,
    images,
    warmed,
)


@dataclass(frozen=True)
class Family:
    """How to make one layer for three channels, and the dimensions of its input."""

    build: Callable[[], nn.Module]
    dims: int = 2
    is_own: bool = False

    def net(self, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer alone, as a part called ``norm``."""
        net = nn.Sequential()
        net.add_module("norm", warmed(self.build()))
        return net.to(device, dtype)

    def input(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """A batch for it."""
        shape = [4, 3, *[3] * self.dims]
        return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 2 + 1).to(device, dtype)


def _family(cls: Any, dims: int = 2, is_own: bool = False, **options: Any) -> Family:
    return Family(lambda: cls(3, **options), dims, is_own)


def _instance_norm_off() -> nn.Module:
    layer = nn.InstanceNorm2d(3, track_running_stats=True, affine=True)
    layer.track_running_stats = False
    return layer


def _without_counter() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.num_batches_tracked = None
    return layer


FAMILIES = {
    "BatchNorm1d-rows": _family(nn.BatchNorm1d, 0),
    "BatchNorm1d": _family(nn.BatchNorm1d, 1),
    "BatchNorm2d": _family(nn.BatchNorm2d),
    "BatchNorm3d": _family(nn.BatchNorm3d, 3),
    "BatchNorm2d-momentum-none": _family(nn.BatchNorm2d, momentum=None),
    "BatchNorm2d-momentum-0": _family(nn.BatchNorm2d, momentum=0.0),
    "BatchNorm2d-momentum-1": _family(nn.BatchNorm2d, momentum=1.0),
    "BatchNorm2d-plain": _family(nn.BatchNorm2d, affine=False),
    "BatchNorm2d-no-counter": Family(_without_counter),
    "SyncBatchNorm": _family(nn.SyncBatchNorm),
    "SyncBatchNorm-momentum-none": _family(nn.SyncBatchNorm, momentum=None),
    "SyncBatchNorm-plain": _family(nn.SyncBatchNorm, affine=False),
    "InstanceNorm1d": _family(nn.InstanceNorm1d, 1, track_running_stats=True),
    "InstanceNorm2d": _family(nn.InstanceNorm2d, track_running_stats=True, affine=True),
    "InstanceNorm3d": _family(nn.InstanceNorm3d, 3, track_running_stats=True),
    "InstanceNorm2d-off": Family(_instance_norm_off),
    "subclass": _family(PlainSubclass),
    "subclass-own-forward": _family(ScaledNorm, is_own=True),
    "own": _family(OwnForward, is_own=True),
    "own-reassigning": _family(ReassigningNorm, is_own=True),
    "own-moving": _family(MovingNorm, is_own=True),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
# What moves in every forward, whatever the momentum.
STOCK = {name: family for name, family in FAMILIES.items() if not family.is_own}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
HOLDS = pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"use_running_stats": True}], ids=["restore", "running"]
)
POLICIES = pytest.mark.parametrize("on_change", ["raise", "warn", "restore"])


def eval_twin(net: nn.Module) -> nn.Module:
    """A copy whose layers with statistics normalise with them."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if statistics(module) and not list(module.children()):
            module.eval()
            if isinstance(module, nn.InstanceNorm2d):
                module.track_running_stats = True  # with the flag off torch would use the batch
    return twin


@EVERY_FAMILY
@DTYPES
def test_restore_gives_the_twins_results(family: Family, dtype: torch.dtype, device: torch.device) -> None:
    """Under restore outputs and gradients are the unguarded twin's, and the statistics do not move."""
    net, x = family.net(device, dtype), family.input(device, dtype)
    twin, before, objects = copy.deepcopy(net), values(statistics(net)), statistics(net)
    with bnguard.frozen(net, "restore") as guard:
        assert_same_bits(outcome(net, x), outcome(twin, x))
        assert_same_bits(statistics(net), before)
    assert guard.changes == ()
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(objects, before)
    assert_clean(net)


@EVERY_FAMILY
def test_twin_moves_where_restore_holds(family: Family, device: torch.device) -> None:
    """The forward that restore holds is one that moves the statistics of an unguarded net."""
    net = family.net(device)
    before = values(statistics(net))
    outcome(net, family.input(device))
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(statistics(net), before)


@EVERY_FAMILY
def test_raise_names_the_layer_before_anything_moves(family: Family, device: torch.device) -> None:
    """Under raise the forward raises, names the layer, and has moved nothing when it does."""
    net, x = family.net(device), family.input(device)
    before, objects = values(statistics(net)), statistics(net)
    mode = r"norm \(\w+\) is in train mode inside frozen\(\)"
    with pytest.raises(bnguard.StatsChangedError, match=mode) as caught, bnguard.frozen(net):
        try:
            net(x)
        finally:
            assert_same_bits(statistics(net), before)
    assert [change.names for change in caught.value.changes] == [("norm",)]
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(objects, before)
    assert_clean(net)


@EVERY_FAMILY
@DTYPES
def test_warn_leaves_everything_as_unguarded(family: Family, dtype: torch.dtype, device: torch.device) -> None:
    """Under warn results and statistics are the twin's, two forwards long, and one warning names the layer."""
    net, x = family.net(device, dtype), family.input(device, dtype)
    twin = copy.deepcopy(net)
    with warns() as caught, bnguard.frozen(net, "warn") as guard:
        one, two = outcome(net, x), outcome(net, x)
    assert_same_bits([one, two], [outcome(twin, x), outcome(twin, x)])
    assert_same_bits(statistics(net), statistics(twin))
    assert caught.message.startswith(f"norm ({type(net.norm).__name__}) is in train mode inside frozen()")
    assert [(change.names, change.updates) for change in guard.changes] == [(("norm",), 2)]
    assert_clean(net)


@EVERY_FAMILY
@DTYPES
def test_use_running_stats_gives_the_eval_twins_results(
    family: Family, dtype: torch.dtype, device: torch.device
) -> None:
    """With use_running_stats a layer in train mode computes what its twin in eval mode computes, and keeps its mode."""
    net, x = family.net(device, dtype), family.input(device, dtype)
    twin, before = eval_twin(net), values(statistics(net))
    with bnguard.frozen(net, use_running_stats=True) as guard:
        net.train()
        assert_same_bits(outcome(net, x), outcome(twin, x))
        assert net.norm.training
    assert guard.changes == ()
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_FAMILY
@POLICIES
def test_eval_mode_is_no_finding(family: Family, on_change: Any, device: torch.device) -> None:
    """A forward in eval mode of a layer that tracks its statistics is as unguarded, and silent."""
    net, x = family.net(device).eval(), family.input(device)
    if getattr(net.norm, "track_running_stats", True) is False:
        net.norm.track_running_stats = True
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, on_change) as guard:
        assert_same_bits(outcome(net, x), outcome(twin, x))
    assert guard.changes == ()


@EVERY_FAMILY
@HOLDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_broken_statistics_keep_their_bits(family: Family, options: Any, value: float, device: torch.device) -> None:
    """NaN, infinity and -0.0 in the statistics stay the bits they were, and break no more than unguarded."""
    net, x = family.net(device), family.input(device)
    for tensor in statistics(net).values():
        if tensor.is_floating_point():
            tensor[0] = value
    twin, before = eval_twin(net) if "use_running_stats" in options else copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, **options) as guard:
        one, two = outcome(net, x), outcome(twin, x)
    assert torch.equal(one["output"].isnan(), two["output"].isnan())
    assert_same_bits(one["output"].nan_to_num(), two["output"].nan_to_num())
    assert guard.changes == ()
    assert_same_bits(statistics(net), before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@EVERY_FAMILY
@pytest.mark.parametrize("mode", MODES)
def test_restore_in_every_mode_of_torch(family: Family, mode: str) -> None:
    """Under no_grad, inference_mode and autocast restore gives the twin's output, and gradients where there are any."""
    cpu = torch.device("cpu")
    net, x = (
        nn.Sequential(nn.Conv2d(3, 3, 1), family.net(cpu)) if family.dims == 2 else family.net(cpu),
        family.input(cpu),
    )
    twin, before = copy.deepcopy(net), values(statistics(net))
    has_gradients = mode == "autocast"
    with bnguard.frozen(net, "restore"):
        with MODES[mode]():
            one, two = (outcome(model, x, backward=has_gradients) for model in (net, twin))
        assert_same_bits(one, two)
        # What was made in that mode does not spoil an ordinary forward later.
        assert_same_bits(statistics(net), before)
        net.zero_grad()
        outcome(net, x)
    assert_same_bits(statistics(net), before)


@EVERY_FAMILY
@pytest.mark.parametrize("mode", MODES)
def test_raise_in_every_mode_of_torch(family: Family, mode: str) -> None:
    """Under no_grad, inference_mode and autocast an update is a finding all the same."""
    cpu = torch.device("cpu")
    net = family.net(cpu)
    before = values(statistics(net))
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net), MODES[mode]():
        net(family.input(cpu))
    assert_same_bits(statistics(net), before)


@EVERY_FAMILY
@pytest.mark.parametrize("mode", MODES)
def test_warn_in_every_mode_of_torch(family: Family, mode: str) -> None:
    """Under no_grad, inference_mode and autocast statistics move under warn as the twin's do."""
    cpu = torch.device("cpu")
    net = family.net(cpu)
    twin = copy.deepcopy(net)
    with warns(), bnguard.frozen(net, "warn"), MODES[mode]():
        net(family.input(cpu))
    with MODES[mode]():
        twin(family.input(cpu))
    assert_same_bits(statistics(net), statistics(twin))


@EVERY_FAMILY
@HOLDS
def test_layer_made_in_inference_mode_is_held(family: Family, options: Any) -> None:
    """Statistics that are inference tensors are compared and held like any other."""
    with torch.inference_mode():
        net, x = family.net(torch.device("cpu")), family.input(torch.device("cpu"))
        twin = eval_twin(net) if "use_running_stats" in options else copy.deepcopy(net)
    before = values(statistics(net))
    with torch.inference_mode(), bnguard.frozen(net, **options):
        assert_same_bits(net(x), twin(x))
    assert_same_bits(values(statistics(net)), before)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES.values() if f.dims == 2], ids=[n for n in FAMILIES if FAMILIES[n].dims == 2]
)
@HOLDS
def test_channels_last_keeps_format_and_results(family: Family, options: Any, device: torch.device) -> None:
    """Inputs with channels last give the twin's results, in the twin's memory format."""
    net, x = family.net(device), family.input(device).contiguous(memory_format=torch.channels_last)
    twin, before = eval_twin(net) if "use_running_stats" in options else copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, **options):
        one, two = outcome(net, x), outcome(twin, x)
    assert_same_bits(one, two)
    assert one["output"].stride() == two["output"].stride()
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("name", STOCK)
def test_counts_updates_of_every_family(name: str) -> None:
    """Within the budget each family updates as unguarded, and not once more; the counter alone is no update."""
    cpu = torch.device("cpu")
    net, x = STOCK[name].net(cpu), STOCK[name].input(cpu)
    twin = copy.deepcopy(net)
    twin(x)
    expected = values(statistics(twin))
    with bnguard.frozen(net, "restore", updates=1) as guard:
        assert_same_bits(outcome(net, x)["output"], outcome(STOCK[name].net(cpu), x)["output"])
        assert_same_bits(statistics(net), expected)
        assert_same_bits(net(x), twin(x))
    assert_same_bits(statistics(net), values(statistics(twin)) if "momentum-0" in name else expected)
    assert guard.changes == ()


# Half-precision inputs to a layer that keeps its statistics in single precision, as autocast makes them.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@HOLDS
def test_half_input_on_single_precision_statistics(dtype: torch.dtype, affine: bool, options: Any) -> None:
    """A mixed-precision BatchNorm computes what its twin computes."""
    net = warmed(nn.BatchNorm2d(2, affine=affine))
    twin, before = copy.deepcopy(net), values(statistics(net))
    if "use_running_stats" in options:
        twin.eval()
    with bnguard.frozen(net, **options):
        assert_same_bits(outcome(net, images().to(dtype)), outcome(twin, images().to(dtype)))
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, ScaledNorm, OwnForward])
def test_input_by_keyword_is_the_same(cls: Any) -> None:
    """A layer that is called with ``input=`` is held and judged as any other."""
    net = warmed(cls(2))
    twin, before = copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, "restore"):
        assert_same_bits(net(input=images()), twin(input=images()))
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(input=images())
    assert_same_bits(statistics(net), before)


# Flags.


def test_instance_norm_updates_in_eval_mode_when_the_flag_is_off() -> None:
    """An InstanceNorm whose flag was turned off updates in eval mode: raise says so, and names the mode."""
    net = _instance_norm_off().eval()
    with (
        pytest.raises(bnguard.StatsChangedError, match=r"\(root\) \(InstanceNorm2d\) is in eval mode"),
        bnguard.frozen(net),
    ):
        net(torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize("on_change", ["restore", "warn"])
def test_instance_norm_with_the_flag_off_has_its_twins_results(on_change: Any) -> None:
    """In eval mode with the flag off, restore holds and warn reports what torch does there."""
    net = warmed(_instance_norm_off()).eval()
    twin, before, x = copy.deepcopy(net), values(statistics(net)), torch.randn(2, 3, 2, 2)
    with warns(count=on_change == "warn"), bnguard.frozen(net, on_change):
        assert_same_bits(outcome(net, x), outcome(twin, x))
    assert_same_bits(statistics(net), before if on_change == "restore" else statistics(twin))


def test_batch_norm_with_the_flag_off_is_no_finding() -> None:
    """A BatchNorm whose flag was turned off does not update, and raise has nothing to say."""
    net = warmed(nn.BatchNorm2d(2))
    net.track_running_stats = False
    twin = copy.deepcopy(net)
    with bnguard.frozen(net) as guard:
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert guard.changes == ()
    assert net.track_running_stats is False


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("inner", [None, {"on_change": "warn"}, {"updates": 1}], ids=str)
def test_use_running_stats_overrules_the_flag(cls: Any, inner: Any) -> None:
    """With the flag off a BatchNorm in train mode still normalises with its statistics, whatever guard lies within."""
    net = warmed(cls(2))
    twin = copy.deepcopy(net).eval()
    net.track_running_stats = False
    with bnguard.frozen(net, use_running_stats=True), bnguard.frozen(net, **inner) if inner else nullcontext():
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert net.track_running_stats is False


def test_momentum_0_without_a_counter_is_no_finding() -> None:
    """Nothing moves with momentum 0 and no counter: raise lets it run."""
    net = nn.BatchNorm2d(2, momentum=0.0)
    net.num_batches_tracked = None
    before = values(statistics(net))
    with bnguard.frozen(net) as guard:
        net(images())
    assert guard.changes == ()
    assert_same_bits(statistics(net), before)


def test_layers_without_statistics_are_not_guarded() -> None:
    """LayerNorm, GroupNorm and an untracked BatchNorm have nothing to guard."""
    net = nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2))
    assert [layer.names for layer in bnguard.frozen(net).layers] == [("2",)]


def test_instance_norm_with_momentum_0_is_held() -> None:
    """The mean over the batch's copies rounds, with momentum 0 too: under restore the statistics keep their bits."""
    net = warmed(nn.InstanceNorm2d(2, track_running_stats=True, momentum=0.0))
    before = values(statistics(net))
    with bnguard.frozen(net, "restore"):
        for number in range(1, 20):
            net(images(number))
        assert_same_bits(statistics(net), before)


# FrozenBatchNorm and its like.


FROZEN_NORMS = pytest.mark.parametrize("make", [FrozenNorm, FrozenNormOfTorchvision])


@POLICIES
@FROZEN_NORMS
def test_frozen_norm_is_no_finding(make: Any, on_change: Any) -> None:
    """A layer that only reads its statistics runs as unguarded, under every policy."""
    net = warmed(make(2))
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, on_change) as guard:
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert guard.changes == ()
    assert [layer.buffers for layer in guard.layers] == [("running_mean", "running_var")]


@FROZEN_NORMS
def test_frozen_norm_with_a_budget_spends_none_of_it(make: Any) -> None:
    """Forwards that do not update are not counted."""
    with bnguard.frozen(nn.Sequential(make(2)), updates=1) as guard:
        for _ in range(3):
            guard._model(images())
    assert guard.changes == ()


def operations(net: nn.Module) -> int:
    """The number of operations in one forward, also of those outside of any mode."""
    with torch.autograd.profiler.profile() as seen:
        net(images())
    return len([event for event in seen.function_events if event.name.startswith("aten::")])


def norm_of_transformers() -> nn.Module:
    """That of DETR."""
    try:
        from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
    except (ImportError, NameError):  # the latter with an older torch than it takes
        pytest.skip("no transformers")
    return DetrFrozenBatchNorm2d(2)


@pytest.mark.parametrize(
    "make", [lambda: FrozenNormOfTorchvision(2), norm_of_transformers], ids=["torchvision", "detr"]
)
@pytest.mark.parametrize("on_change", ["raise", "warn"])
def test_known_frozen_norm_is_not_copied_and_compared_at_each_forward(make: Any, on_change: Any) -> None:
    """It makes the operations of an unguarded one. One whose forward is not known is copied before each."""
    net = nn.Sequential(make())
    plain = operations(net)
    with bnguard.frozen(net, on_change) as guard:
        assert operations(net.train()) == operations(net.eval()) == plain
    assert [layer.protection for layer in guard.layers] == ["checked before each forward; compared at exit"]
    unknown = nn.Sequential(FrozenNorm(2))
    plain = operations(unknown)
    with bnguard.frozen(unknown, on_change):
        assert operations(unknown) > plain


def test_norm_that_looks_frozen_and_updates_later_is_stopped_at_that_forward() -> None:
    """One more line in its forward, a subclass with one of its own, one that is put on the instance."""

    class Subclass(FrozenNormOfTorchvision):
        forwards = 0
        forward = NearlyFrozenNorm.forward

    patched = FrozenNormOfTorchvision(2)
    patched.forwards = 0
    patched.forward = NearlyFrozenNorm.forward.__get__(patched)
    for norm in (NearlyFrozenNorm(2), Subclass(2), patched):
        net = nn.Sequential(norm)
        before = values(statistics(net))
        outputs = []
        with pytest.raises(bnguard.StatsChangedError, match=r"^0 \(\w+\) is in train mode inside"), bnguard.frozen(net):
            for _ in range(9):
                outputs.append(net(images()))  # noqa: PERF401  # kept up to the error
        assert len(outputs) == 3
        assert_same_bits(statistics(net), before)


def test_write_to_a_known_frozen_norm_is_found_at_the_end() -> None:
    """By whatever makes it."""
    net = nn.Sequential(FrozenNormOfTorchvision(2))
    before = values(statistics(net))
    with pytest.raises(bnguard.StatsChangedError, match="running_mean"), bnguard.frozen(net):
        net[0].running_mean.add_(1)
        net(images())
    assert_same_bits(statistics(net), before)


def test_known_frozen_norm_normalises_with_the_statistics_of_entry() -> None:
    """Under ``use_running_stats``, whatever is written to them."""
    net = warmed(nn.Sequential(FrozenNormOfTorchvision(2)))
    plain = net(images())
    with warns(count=1), bnguard.frozen(net, "restore", use_running_stats=True):
        net[0].running_mean.add_(1)
        assert_same_bits(net(images()), plain)


# Layers in other layers, and in several places.


def qat_net() -> nn.Module:
    """Quantisation-aware Conv and BatchNorm in one."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    torch.manual_seed(0)
    return ConvBn2d(2, 3, 1, qconfig=get_default_qat_qconfig("fbgemm"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
@pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"on_change": "warn"}, {"use_running_stats": True}], ids=str
)
def test_qat_conv_bn(options: Any) -> None:
    """A QAT ConvBn2d computes what its twin computes; its BatchNorm is held, or reported under its own name."""
    net = qat_net()
    twin, before = copy.deepcopy(net), values(statistics(net))
    if "use_running_stats" in options:
        twin.bn.eval()
    is_warn = options.get("on_change") == "warn"
    with warns(count=is_warn) as caught, bnguard.frozen(net, **options) as guard:
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(statistics(net), statistics(twin) if is_warn else before)
    assert [layer.names for layer in guard.layers] == [("bn",)]
    assert all(message.startswith("bn (BatchNorm2d)") for message in caught.messages)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
def test_qat_conv_bn_raises() -> None:
    """Under raise the BatchNorm inside a QAT ConvBn2d is named."""
    net = qat_net()
    before = values(statistics(net))
    with pytest.raises(bnguard.StatsChangedError, match=r"bn \(BatchNorm2d\)"), bnguard.frozen(net):
        net(images())
    assert_same_bits(statistics(net), before)


def test_shared_layer_is_one_layer_with_two_names() -> None:
    """A layer under two names is listed once, with both, and every message prints both."""
    net = SharedNet()
    with (
        pytest.raises(bnguard.StatsChangedError, match=r"^norm = again \(BatchNorm2d\) is in train mode"),
        bnguard.frozen(net),
    ):
        net(images())
    assert [layer.names for layer in bnguard.frozen(net).layers] == [("norm", "again")]


def test_shared_layer_is_held_in_both_places() -> None:
    """Under restore neither of the two forwards of a shared layer moves it; results are the twin's."""
    net = warmed(SharedNet())
    twin, before = copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, "restore"):
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(statistics(net), before)
    assert statistics(twin)["norm.num_batches_tracked"] == 5


def test_shared_layer_updates_twice_in_a_forward() -> None:
    """``updates=1`` around one forward finds the second update of a shared layer."""
    with (
        pytest.raises(bnguard.StatsChangedError, match="has updated once inside frozen"),
        bnguard.frozen(net := SharedNet(), updates=1),
    ):
        net(images())


@POLICIES
def test_tied_buffers_are_held_as_one(on_change: Any) -> None:
    """Two layers around the same tensors: both are held, the tensors return once, and both places keep them."""
    net = warmed(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(net[1], name, getattr(net[0], name))
    twin, before, mean = copy.deepcopy(net), values(statistics(net)), net[0].running_mean
    if on_change == "raise":
        with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
            net(images())
    else:
        with warns(count=on_change == "warn"), bnguard.frozen(net, on_change):
            assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(statistics(net), statistics(twin) if on_change == "warn" else before)
    assert net[0].running_mean is net[1].running_mean is mean


def test_tied_buffers_of_a_guarded_and_an_unguarded_layer() -> None:
    """A layer outside the guard that writes the tensors of one inside is found at the end, and undone."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    net[1].running_mean = net[0].running_mean
    with warns(), bnguard.frozen(net, "restore", include="0"):
        net(images())
    assert_same_bits(net[0].running_mean, torch.zeros(2))
    assert net[1].num_batches_tracked == 1


def test_layer_that_runs_twice_under_restore_has_one_pass_statistics() -> None:
    """However often a layer runs in a forward, restore gives the output of a layer whose statistics nobody reads."""
    net = warmed(TwoPasses(3))
    twin, before = copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, "restore"):
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(statistics(net), before)


def test_modules_that_only_own_statistics_are_guarded() -> None:
    """A bare owner of running statistics that others write is compared at the end."""
    net = nn.Module()
    net.register_buffer("running_mean", torch.zeros(2))
    with pytest.raises(bnguard.StatsChangedError, match=r"\(root\) \(Module\): running_mean"), bnguard.frozen(net):
        net.running_mean += 1
    assert_same_bits(net.running_mean, torch.zeros(2))


# A forward that somebody put on one layer before the block.


@pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"on_change": "warn"}, {"use_running_stats": True}], ids=str
)
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, OwnForward])
def test_foreign_forward_is_respected(cls: Any, options: Any) -> None:
    """A forward on the instance runs, is held or reported, and is the same object afterwards."""
    net = warmed(cls(2))

    def patch(layer: nn.Module) -> Any:
        layer.forward = lambda input: cls.forward(layer, input) * 3
        return layer.forward

    twin, before, foreign = copy.deepcopy(net), values(statistics(net)), patch(net)
    patch(twin.eval() if "use_running_stats" in options else twin)
    is_warn = options.get("on_change") == "warn"
    with warns(count=is_warn), bnguard.frozen(net, **options):
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert net.__dict__["forward"] is foreign
    assert_same_bits(statistics(net), statistics(twin) if is_warn else before)
    assert_clean(net)


def test_foreign_forward_is_judged_under_raise() -> None:
    """A forward on the instance that updates raises, and nothing has moved."""
    net = nn.BatchNorm2d(2)
    own, before = net.forward, values(statistics(net))
    net.forward = lambda input: own(input)
    foreign = net.__dict__["forward"]
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(images())
    assert_same_bits(statistics(net), before)
    assert net.__dict__["forward"] is foreign


# register_layer.


class EmaNorm(nn.Module):
    """Names its statistics in a way that nobody else does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.ema.lerp_(input.mean((0, 2, 3)).detach(), 0.5)
        return input - self.ema.view(1, -1, 1, 1)


class SubEmaNorm(EmaNorm):
    pass


@pytest.mark.parametrize("cls", [EmaNorm, SubEmaNorm])
@pytest.mark.parametrize("updates", [None, lambda layer: layer.training], ids=["compared", "predicted"])
def test_registered_layer_is_guarded(cls: Any, updates: Any) -> None:
    """A registered class and its subclasses are held under restore and judged under raise."""
    net = cls()
    registration = bnguard.register_layer(EmaNorm, ["ema"], updates=updates)
    try:
        with bnguard.frozen(net, "restore"):
            assert_same_bits(net(images()), cls()(images()))
        assert_same_bits(net.ema, torch.zeros(2))
        with pytest.raises(bnguard.StatsChangedError, match="would update ema"), bnguard.frozen(net):
            net(images())
        assert_same_bits(net.ema, torch.zeros(2))
        with bnguard.frozen(net, use_running_stats=True):
            assert_same_bits(net(images()), cls().eval()(images()))
    finally:
        registration.remove()


def test_registration_is_gone_after_remove() -> None:
    """``remove()``, once or twice, makes the class unknown again."""
    registration = bnguard.register_layer(EmaNorm, ["ema"])
    assert len(bnguard.frozen(EmaNorm()).layers) == 1
    registration.remove()
    registration.remove()
    with warns(at="bnguard.frozen(EmaNorm())"):
        bnguard.frozen(EmaNorm())


def test_removing_an_old_registration_keeps_a_newer_one() -> None:
    """The last registration of a class counts; taking back an earlier one does not end it."""
    older = bnguard.register_layer(EmaNorm, ["nothing"])
    newer = bnguard.register_layer(EmaNorm, ["ema"])
    older.remove()
    assert bnguard.frozen(EmaNorm()).layers[0].buffers == ("ema",)
    newer.remove()


def test_registration_overrules_what_is_found_by_name() -> None:
    """A registered class is guarded for the buffers that were named, and no others."""
    registration = bnguard.register_layer(OwnForward, ["running_mean"])
    try:
        assert bnguard.frozen(OwnForward()).layers[0].buffers == ("running_mean",)
    finally:
        registration.remove()


@pytest.mark.parametrize(
    "name",
    [
        "running_mean",
        "running_variance",
        "moving_var",
        "moving_average_mean",
        "running_std",
        "running_cov_inv",
        "ra_mean",
        "ra_var",
    ],
)
def test_statistics_under_other_names_are_found(name: str) -> None:
    """What other libraries call their statistics counts too; other running things do not."""
    layer = nn.Module()
    layer.register_buffer(name, torch.zeros(2))
    layer.register_buffer("running_total", torch.zeros(2))
    assert [found.buffers for found in _tree.find_layers(layer)] == [(name,)]


class Standardised(nn.Module):
    """A normaliser whose statistics have the shortest names, with a counter of its own."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.spread = spread
        self.register_buffer("_mean", torch.zeros(2))
        self.register_buffer(spread, torch.ones(2))
        self.register_buffer("_count", torch.tensor(1.0))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self._count += len(input)
            rate = len(input) / self._count
            self._mean.lerp_(input.detach().mean(0), rate)
            self._buffers[self.spread].lerp_(input.detach().var(0), rate)
        return (input - self._mean) / self._buffers[self.spread]


@pytest.mark.parametrize("spread", ["_var", "_std"])
def test_pair_of_short_names_is_held_with_its_counter(spread: str) -> None:
    """Whatever happened inside, later updates are those of a twin that never ran in the block."""
    layer = Standardised(spread)
    layer(torch.randn(4, 2))
    twin = copy.deepcopy(layer)
    assert _tree.find_layers(layer)[0].buffers == ("_mean", spread, "_count")
    with bnguard.frozen(layer, "restore"):
        layer(torch.randn(4, 2) + 3)
    assert_same_bits(layer.state_dict(), twin.state_dict())
    batch = torch.randn(4, 2)
    assert_same_bits(layer(batch), twin(batch))


@pytest.mark.parametrize("name", ["_mean", "_var", "_std"])
def test_short_name_alone_is_a_constant(name: str) -> None:
    """The mean of a data set, which a model subtracts, is no statistic to be guarded."""
    layer = nn.Module()
    layer.register_buffer(name, torch.zeros(2))
    assert list(_tree.find_layers(layer)) == []


def test_subclass_with_another_application_counts_as_one_with_a_forward_of_its_own() -> None:
    """A subclass that replaces the inner function of InstanceNorm is not predicted as InstanceNorm."""

    class Idle(nn.InstanceNorm2d):
        def _apply_instance_norm(self, input: Tensor) -> Tensor:
            return input

    layer = Idle(3, track_running_stats=True)
    assert _tree.find_layers(layer)[0].kind is _layers.OWN_FORWARD
    with bnguard.frozen(layer) as guard:
        layer(torch.randn(4, 3, 2, 2))
    assert guard.changes == ()
