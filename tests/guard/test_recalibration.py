"""``recalibrate``: statistics learned anew over a loader, pooled exactly, and nothing else that changes."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.guard.hooks import guard_of
from tests.asserts import assert_clean, assert_same_bits, state_of, warns
from tests.guard.test_interrupts import Interrupt
from tests.nets import (
    NORMS,
    FrozenNormOfTorchvision,
    MovingNorm,
    OwnForward,
    PlainSubclass,
    ScaledNorm,
    SharedNet,
    batch_norms,
    conv_net,
    deep_net,
    images,
    mlp,
    rows,
    warmed,
)
from tests.old_torch import RELEASE, needs_guarded_graphs

# Of unequal sizes, and with other means: an average of their variances is far from the variance of all.
BATCHES = [images(6) + 3, images(4, seed=2) * 2, images(2, seed=3) - 5]


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for the rounding of the layer's own dtype."""
    torch.testing.assert_close(one.double(), other.double(), rtol=2e-6, atol=1e-6)


def inputs_of(net: nn.Module, layers: list[Any], batches: list[Any]) -> list[list[Tensor]]:
    """What each layer gets when it normalises with its batch; from a copy in which nothing of bnguard runs."""
    twin = copy.deepcopy(net)
    places = [list(net.modules()).index(layer) for layer in layers]
    own = [list(twin.modules())[place] for place in places]
    seen: list[list[Tensor]] = [[] for _ in own]
    for layer, values in zip(own, seen, strict=True):
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, values=values: values.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return seen


def pooled(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of all values of each channel, in one computation."""
    flat = torch.cat([value.transpose(0, 1).reshape(value.shape[1], -1) for value in values], dim=1)
    return flat.mean(1), flat.var(1)


NETS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), rows),
    "1d-sequences": (lambda: nn.BatchNorm1d(2), lambda *args, **options: images(*args, **options).flatten(2)),
    "2d": (lambda: nn.BatchNorm2d(2), images),
    "3d": (lambda: nn.BatchNorm3d(2), lambda *args, **options: images(*args, **options).unsqueeze(2)),
    "sync": (lambda: nn.SyncBatchNorm(2), images),
    "momentum-none": (lambda: nn.BatchNorm2d(2, momentum=None), images),
    "no-affine": (lambda: nn.BatchNorm2d(2, affine=False), images),
    "flag-off": (lambda: flag_off(nn.BatchNorm2d(2)), images),
    "subclass": (lambda: PlainSubclass(2), images),
    "own-forward": (lambda: ScaledNorm(2), images),
    "own-forward-flag-off": (lambda: flag_off(ScaledNorm(2)), images),
    "channels-last": (lambda: nn.BatchNorm2d(2), lambda *a, **o: images(*a, **o).to(memory_format=torch.channels_last)),
}


def flag_off(layer: Any) -> Any:
    """A layer whose flag is off although it has statistics: in eval mode it normalises with them."""
    layer.track_running_stats = False
    return layer


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_statistics_are_those_of_all_values(name: str, is_training: bool) -> None:
    """One computation over all data in float64 gives the same; the counter counts the batches."""
    make, data = NETS[name]
    layer = warmed(make()).train(is_training)
    batches = [data(6) + 3, data(4, seed=2) * 2, data(2, seed=3) - 5]
    mean, var = pooled([batch.double() for batch in batches])
    result = bnguard.recalibrate(layer, batches)
    close(layer.running_mean, mean)
    close(layer.running_var, var)
    assert layer.num_batches_tracked == 3
    assert result == bnguard.Recalibration(layers=("",), held=(), unused=(), batches=3)
    assert_clean(layer)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("make", [conv_net, lambda: deep_net(4), SharedNet], ids=["conv", "deep", "shared"])
def test_deeper_layers_are_pooled_as_well(make: Callable[[], nn.Module], is_training: bool) -> None:
    """Each layer has the mean and variance of all that it got while every layer normalised with its batch."""
    torch.manual_seed(0)
    net = make().train(is_training)
    layers = batch_norms(net)
    seen = inputs_of(net, layers, BATCHES)
    bnguard.recalibrate(net, BATCHES)
    for layer, values in zip(layers, seen, strict=True):
        mean, var = pooled(values)
        close(layer.running_mean, mean)
        close(layer.running_var, var)
        assert layer.num_batches_tracked == len(values)
    assert_clean(net)


def test_large_mean_costs_no_digits() -> None:
    """Values around 10,000 with a deviation of 0.01: a sum of squares in float32 would have none left."""
    layer = nn.BatchNorm1d(4).double()
    batches = [rows(n, seed=n).double() * 0.01 + 1e4 for n in (6, 4, 2)]
    mean, var = pooled(batches)
    bnguard.recalibrate(layer, batches)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-9, atol=0)


def test_update_bn_averages_and_this_pools() -> None:
    """Over batches that differ update_bn is far off; over a single batch both agree."""
    layer, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    mean, var = pooled(BATCHES)
    update_bn(BATCHES, other)
    bnguard.recalibrate(layer, BATCHES)
    assert ((other.running_var - var).abs() / var).max() > 0.3
    assert ((other.running_mean - mean).abs() / var.sqrt()).max() > 0.2
    close(layer.running_var, var)
    update_bn(BATCHES[:1], other)
    bnguard.recalibrate(layer, BATCHES[:1])
    close(layer.running_mean, other.running_mean)
    close(layer.running_var, other.running_var)
    assert layer.num_batches_tracked == other.num_batches_tracked


def test_instance_norm_has_the_mean_over_instances() -> None:
    """As torch defines it: each instance weighs the same, whatever its size; the counter stays, as in training."""
    layer = warmed(nn.InstanceNorm2d(2, track_running_stats=True))
    sizes = [images(3), images(2, seed=2)[:, :, :3] * 2, images(1, seed=3)[0]]  # the last without a batch
    single = [each for batch in sizes[:2] for each in batch] + [sizes[2]]
    layer.num_batches_tracked.fill_(7)
    bnguard.recalibrate(layer, sizes)
    close(layer.running_mean, torch.stack([each.double().mean((1, 2)) for each in single]).mean(0))
    close(layer.running_var, torch.stack([each.double().var((1, 2)) for each in single]).mean(0))
    assert layer.num_batches_tracked == 7
    one = nn.InstanceNorm2d(2, momentum=1.0, track_running_stats=True)
    one(sizes[0])
    bnguard.recalibrate(layer, [sizes[0]])
    close(layer.running_mean, one.running_mean)
    close(layer.running_var, one.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float64(dtype: torch.dtype) -> None:
    """The result is rounded once, to the dtype that the layer has."""
    layer = nn.BatchNorm2d(2).to(dtype)
    batches = [batch.to(dtype) for batch in BATCHES]
    mean, var = pooled([batch.double() for batch in batches])
    bnguard.recalibrate(layer, batches)
    assert_same_bits(layer.running_mean, mean.to(dtype))
    assert_same_bits(layer.running_var, var.to(dtype))


def test_forwards_are_those_of_training() -> None:
    """Every selected layer normalises with its batch, in eval mode too: the outputs are those of train mode."""
    net, twin = deep_net(3).eval(), deep_net(3).train()
    outputs: list[Tensor] = []
    bnguard.recalibrate(net, BATCHES, forward=lambda model, batch: outputs.append(model(batch)))
    assert_same_bits(outputs, [twin(batch).detach() for batch in BATCHES])
    assert not any(output.requires_grad for output in outputs)
    assert torch.is_grad_enabled()


def test_forward_may_change_modes() -> None:
    """A forward= that calls eval() or train() neither stops the layers from learning nor outlasts the pass."""
    net, twin = conv_net().train(), conv_net().train()
    net.stem.bn.eval()
    modes = [module.training for module in net.modules()]
    bnguard.recalibrate(net, BATCHES, forward=lambda model, batch: model.eval()(batch))
    bnguard.recalibrate(twin, BATCHES)
    assert_same_bits(state_of(net), state_of(twin))
    assert [module.training for module in net.modules()] == modes


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        self.seen += 1
        self.last = input.sum()
        return input


@pytest.mark.parametrize("is_training", [True, False])
def test_nothing_else_changes(is_training: bool) -> None:
    """Parameters, other buffers, layers that are left out, modes, momentum and hooks; they are the same objects."""
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2, momentum=0.3), _Counts(), deep_net(2))
    net.append(MovingNorm(2)).append(nn.Dropout(0.5)).append(OwnForward(2))
    net.train(is_training)
    net[1].eval()
    kept = {name: tensor for name, tensor in net.state_dict(keep_vars=True).items() if not name.startswith("1.r")}
    kept.pop("1.num_batches_tracked")
    kept["last"] = net[2].last
    before = {name: tensor.detach().clone() for name, tensor in kept.items()}
    modes = [module.training for module in net.modules()]
    own = dict(net[1].named_buffers())
    result = bnguard.recalibrate(net, BATCHES, include="1")
    assert result.layers == ("1",)
    now = {**dict(net.state_dict(keep_vars=True)), "last": net[2].last}
    for name, tensor in kept.items():
        assert now[name] is tensor, name
    assert_same_bits({name: now[name] for name in kept}, before)
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.3
    assert net[1].num_batches_tracked == 3
    assert all(dict(net[1].named_buffers())[name] is tensor for name, tensor in own.items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert_clean(net)


def test_random_numbers_are_those_that_forwards_draw() -> None:
    """Without dropout none is drawn; with it, as many as in the plain forwards."""
    net = conv_net().eval()
    state = torch.get_rng_state()
    bnguard.recalibrate(net, BATCHES)
    assert_same_bits(torch.get_rng_state(), state)
    net.train()
    for batch in BATCHES:
        net(batch)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    bnguard.recalibrate(net, BATCHES)
    assert_same_bits(torch.get_rng_state(), after)


def test_training_goes_on_from_the_new_statistics() -> None:
    """Momentum is as it was: the next update is the one that torch makes from these statistics."""
    net = conv_net()
    bnguard.recalibrate(net, BATCHES)
    twin = conv_net()
    twin.load_state_dict(net.state_dict())
    for model in (net, twin):
        torch.manual_seed(0)
        model.train()(images()).sum().backward()
    assert_same_bits(state_of(net), state_of(twin))


# What a loader may yield.


class _Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, *, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn(input=pixels * scale)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: {"pixels": x, "scale": 1.0}, lambda x: UserDict(pixels=x), lambda x: ({"pixels": x}, torch.zeros(1))],
    ids=["dict", "mapping", "pair"],
)
def test_dicts_are_keyword_arguments(wrap: Callable[[Tensor], Any]) -> None:
    """As the data loaders of transformers yield them; the layer may get its input by keyword, too."""
    net = _Keywords()
    bnguard.recalibrate(net, map(wrap, BATCHES))
    close(net.bn.running_var, pooled(BATCHES)[1])


@pytest.mark.parametrize("kind", [tuple, list])
def test_first_element_is_the_input(kind: type) -> None:
    """Targets are left alone, and the loader may be any iterable."""
    layer = nn.BatchNorm2d(2)
    assert bnguard.recalibrate(layer, (kind([batch, "target"]) for batch in BATCHES)).batches == 3
    close(layer.running_var, pooled(BATCHES)[1])


def test_data_loader_with_a_small_last_batch() -> None:
    """The usual case: pairs from a DataLoader whose last batch is smaller."""
    data = images(10)
    layer = nn.BatchNorm2d(2)
    loader = DataLoader(TensorDataset(data, torch.zeros(10)), batch_size=4)
    assert bnguard.recalibrate(layer, loader).batches == 3
    close(layer.running_var, pooled([data])[1])


def test_forward_gets_the_batch_as_it_is() -> None:
    """Whatever the loader yields, with the model that runs."""
    net, batch = nn.Sequential(nn.BatchNorm2d(2)), object()
    seen = []

    def forward(model: nn.Module, given: Any) -> None:
        seen.append((model, given))
        model(BATCHES[0])

    bnguard.recalibrate(net, [batch], forward=forward)
    assert seen == [(net, batch)]


def test_tensors_are_moved_to_the_model(device: torch.device) -> None:
    """As ``update_bn(device=)`` does, without being told."""
    net = conv_net().to(device)
    bnguard.recalibrate(net, BATCHES)
    twin = conv_net()
    bnguard.recalibrate(twin, BATCHES)
    torch.testing.assert_close(net.stem.bn.running_var.cpu(), twin.stem.bn.running_var)


def test_layer_under_autocast_is_pooled_from_what_it_gets() -> None:
    """Autocast stays on, and the statistics are those of the half-precision values."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    seen: list[Tensor] = []
    hook = net[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        bnguard.recalibrate(net, BATCHES)
    hook.remove()
    assert {value.dtype for value in seen} == {torch.bfloat16}
    close(net[1].running_var, pooled([value.double() for value in seen])[1])


def test_input_is_the_one_that_the_users_hooks_leave() -> None:
    """A pre-hook that changes the input runs first."""
    layer = nn.BatchNorm2d(2)
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 10,))
    bnguard.recalibrate(layer, BATCHES)
    close(layer.running_var, pooled([batch * 10 for batch in BATCHES])[1])


def test_empty_batches_have_no_weight() -> None:
    """Torch lets some through; they have no values to pool."""
    layer, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    bnguard.recalibrate(layer, [images(0), BATCHES[0], images(0), BATCHES[1]])
    bnguard.recalibrate(other, BATCHES[:2])
    assert_same_bits([layer.running_mean, layer.running_var], [other.running_mean, other.running_var])


# Layers that keep their statistics.


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("options", [{"on_change": "raise"}, {"on_change": "restore"}, {"use_running_stats": True}])
def test_held_layers_are_as_they_were(options: dict[str, Any], is_training: bool) -> None:
    """A layer that an open block holds is left out, and normalises as it would without the call; the result says so."""
    net, twin = deep_net(3).train(is_training), deep_net(3).train(is_training)
    outputs: list[Tensor] = []
    before = state_of(net[0])
    with bnguard.frozen(net, include="0", **options) as guard:
        result = bnguard.recalibrate(net, BATCHES, forward=lambda model, batch: outputs.append(model(batch)))
        assert result == bnguard.Recalibration(("1", "2"), held=("0",), unused=(), batches=3)
        assert_same_bits(state_of(net[0]), before)
        assert guard_of(net[0]) is not None
    assert not guard.changes
    twin[1:].train()
    if "use_running_stats" in options:
        twin[0].eval()
    assert_same_bits(outputs, [twin(batch).detach() for batch in BATCHES])
    close(net[2].running_var, pooled(inputs_of(twin, [twin[2]], BATCHES)[0])[1])
    assert_clean(net)


def test_layer_with_a_budget_is_held() -> None:
    """The updates that a block allows are those of steps."""
    net = deep_net(2).train()
    with bnguard.frozen(net, include="0", updates=1) as guard:
        assert bnguard.recalibrate(net, BATCHES).held == ("0",)
        net(BATCHES[0])
    assert not guard.changes


def test_whole_model_held_is_an_error() -> None:
    """Nothing would be done: the error says where to call it."""
    net = conv_net()
    before = state_of(net)
    text = r"^stem\.bn \(BatchNorm2d\), body\.bn \(BatchNorm2d\) cannot be recalibrated: an open block of frozen\(\)"
    with bnguard.frozen(net), pytest.raises(bnguard.BNGuardError, match=text):
        bnguard.recalibrate(net, BATCHES)
    assert_same_bits(state_of(net), before)


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "own-forward"])
def test_rollback_puts_back_what_was_learned(norm: str) -> None:
    """Statistics of test data for one evaluation: inside they are new, afterwards the old ones."""
    net, twin = nn.Sequential(warmed(NORMS[norm]())), nn.Sequential(warmed(NORMS[norm]()))
    before = state_of(net)
    bnguard.recalibrate(twin, BATCHES)
    with bnguard.frozen(net, "rollback"):
        assert bnguard.recalibrate(net, BATCHES).layers == ("0",)
        assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(state_of(net), before)
    assert_clean(net)


def test_warn_reports_what_was_learned() -> None:
    """The change stands, and the block around it says so."""
    net = deep_net(1)
    with warns(count=1), bnguard.frozen(net, "warn") as guard:
        bnguard.recalibrate(net, BATCHES)
    assert [change.names for change in guard.changes] == [("0",)]
    close(net[0].running_var, pooled(BATCHES)[1])


def test_block_inside_the_forward_may_hold_others() -> None:
    """A block that forward= opens around a teacher is its own business."""
    net, teacher = deep_net(1), deep_net(1).train()

    def forward(model: nn.Module, batch: Tensor) -> None:
        with bnguard.frozen(teacher, "restore"):
            model(teacher(batch))

    before = state_of(teacher)
    bnguard.recalibrate(net, BATCHES, forward=forward)
    assert_same_bits(state_of(teacher), before)
    close(net[0].running_mean, torch.zeros(2))


def test_recompute_guard_holds_nothing_here() -> None:
    """It is about the forwards of a backward pass, and there is none."""
    net = deep_net(1)
    with bnguard.recompute_frozen(net):
        assert bnguard.recalibrate(net, BATCHES).layers == ("0",)


def test_layer_that_never_updates_is_left_alone() -> None:
    """Torchvision's FrozenBatchNorm2d has statistics and learns none."""
    net = nn.Sequential(warmed(FrozenNormOfTorchvision(2)), nn.BatchNorm2d(2))
    before = state_of(net[0])
    assert bnguard.recalibrate(net, BATCHES) == bnguard.Recalibration(("1",), ("0",), (), 3)
    assert_same_bits(state_of(net[0]), before)


def test_layer_that_does_not_run_is_named() -> None:
    """It keeps its statistics, with one warning at the user's line."""
    net = nn.ModuleDict({"used": nn.BatchNorm2d(2), "spare": warmed(nn.BatchNorm2d(2))})
    before = state_of(net["spare"])
    with warns(at="bnguard.recalibrate(net, BATCHES, forward") as caught:
        result = bnguard.recalibrate(net, BATCHES, forward=lambda model, batch: model["used"](batch))
    assert caught.message == "spare (BatchNorm2d) did not run in 3 batches. The statistics are unchanged"
    assert result == bnguard.Recalibration(("used",), (), ("spare",), 3)
    assert_same_bits(state_of(net["spare"]), before)


def test_no_layer_that_runs_is_an_error() -> None:
    """The forward has run another model."""
    with pytest.raises(bnguard.BNGuardError, match=r"^0 \(BatchNorm2d\) did not run in 1 batch\."):
        bnguard.recalibrate(deep_net(1), BATCHES[:1], forward=lambda model, batch: None)


def test_watch_takes_it_for_calibration() -> None:
    """The forwards count as calibration: no finding about train mode without gradients."""
    net = conv_net()
    with bnguard.watch(net) as record:
        bnguard.recalibrate(net, BATCHES)
    assert {str(update.mode) for update in record.updates} == {"train, no_grad, calibration"}
    assert {update.where for update in record.updates if "test_watch_takes_it" not in update.where} == set()
    assert [finding.code for finding in record.findings if finding.code != "BN003"] == []


# Layers that are refused.


class _OtherMean(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2) / 2


class _OtherVariance(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + torch.tensor([-1.0, 1.0]).repeat(input.shape[0] // 2)[:, None, None, None] * 3)


class _Hidden(nn.BatchNorm2d):
    def forward(self, input: Any) -> Tensor:
        return super().forward(input[0])


@pytest.mark.parametrize("make", [lambda: OwnForward(2), lambda: MovingNorm(2)], ids=["OwnForward", "MovingNorm"])
def test_layer_of_another_library_is_refused(make: Callable[[], nn.Module]) -> None:
    """What its statistics are cannot be known; the error names the layer and the way out."""
    net = nn.Sequential(nn.BatchNorm2d(2), warmed(make()))
    before = state_of(net)
    name = type(net[1]).__name__
    with pytest.raises(bnguard.BNGuardError, match=rf"(?s)^1 \({name}\) cannot be recalibrated.*exclude='1'$"):
        bnguard.recalibrate(net, BATCHES)
    assert_same_bits(state_of(net), before)
    assert bnguard.recalibrate(net, BATCHES, exclude="1").layers == ("0",)


@pytest.mark.parametrize("cls", [_OtherMean, _OtherVariance, _Hidden])
def test_subclass_that_normalises_something_else_is_refused(cls: type[nn.BatchNorm2d]) -> None:
    """It learns statistics that are not those of its input, which the pass finds."""
    net = nn.Sequential(nn.BatchNorm2d(2), warmed(cls(2)))
    before = state_of(net)
    forward = (lambda model, batch: model[1]([model[0](batch)])) if cls is _Hidden else None
    with pytest.raises(bnguard.BNGuardError, match=rf"^1 \({cls.__name__}\) cannot be recalibrated"):
        bnguard.recalibrate(net, BATCHES, forward=forward)
    assert_same_bits(state_of(net), before)
    assert_clean(net)


def test_forward_on_the_instance_is_checked() -> None:
    """Someone's wrapper around the forward of one layer may change the input."""
    layer = warmed(nn.BatchNorm2d(2))
    own = layer.forward
    layer.forward = lambda input: own(input)
    bnguard.recalibrate(layer, BATCHES)
    close(layer.running_var, pooled(BATCHES)[1])
    layer.forward = lambda input: own(input * 2)
    with pytest.raises(bnguard.BNGuardError, match=r"^\(root\) \(BatchNorm2d\) cannot be recalibrated"):
        bnguard.recalibrate(layer, BATCHES)
    assert layer.momentum == 0.1


@pytest.mark.parametrize("make", [lambda: nn.LazyBatchNorm2d(), lambda: nn.BatchNorm2d(2, device="meta")])
def test_statistics_without_values_are_refused(make: Callable[[], nn.Module]) -> None:
    """There is nothing to write to yet."""
    with pytest.raises(bnguard.BNGuardError, match=r"^0 \(\w+\): the running statistics have no values yet"):
        bnguard.recalibrate(nn.Sequential(make()), BATCHES)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is (deprecated|not supported in Python 3.14):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")  # from torch 2.14 on
def test_script_module_is_refused() -> None:
    """It runs no hooks of a layer."""
    net = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2)))
    with pytest.raises(bnguard.BNGuardError, match="cannot be recalibrated"):
        bnguard.recalibrate(net, BATCHES)


# Bad input.

NET = nn.Sequential(nn.BatchNorm2d(2))
SELECTORS = "takes glob patterns on layer names, modules, classes of layers"
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((3, BATCHES), {}, TypeError, "recalibrate() takes a torch.nn.Module, got int"),
    ((BATCHES, NET), {}, TypeError, "got list; the model comes first, unlike in update_bn()"),
    ((nn.BatchNorm2d, BATCHES), {}, TypeError, "recalibrate() takes a torch.nn.Module, got type"),
    ((NET, None), {}, TypeError, "loader must yield batches, as a DataLoader does, got NoneType"),
    ((NET, images()), {}, TypeError, "got Tensor; put a single batch in a list"),
    ((NET, {"x": images()}), {}, TypeError, "got dict; put a single batch in a list"),
    ((NET, BATCHES), {"forward": 3}, TypeError, "forward must be callable, as in forward=lambda model, batch: model("),
    ((NET, BATCHES), {"reduce": 1}, TypeError, "reduce must be True or False, got 1"),
    ((NET, BATCHES), {"include": 3}, TypeError, f"include {SELECTORS}"),
    ((NET, BATCHES), {"exclude": []}, ValueError, "exclude is an empty list"),
    ((NET, BATCHES), {"include": "bn"}, ValueError, "include='bn' matches none of the 1 layer"),
    ((NET, BATCHES), {"exclude": "0"}, ValueError, "include and exclude leave none"),
    ((nn.ReLU(), BATCHES), {}, ValueError, "recalibrate() found no layer with running statistics in ReLU"),
    ((NET, []), {}, ValueError, "the loader is empty: it has yielded no batch. The statistics are unchanged"),
    ((NET, [object()]), {}, TypeError, "the input in a batch must be a tensor or a dict, got object: say how to run"),
    ((NET, [[]]), {}, TypeError, "the input in a batch must be a tensor or a dict, got list: say how to run a batch"),
    ((NET, [images(1)[:, :, :1, :1]]), {}, ValueError, "Expected more than 1 value per channel when training"),
    ((NET, [rows()]), {}, ValueError, "expected 4D input (got 2D input)"),
    ((NET, [rows()[0]]), {}, ValueError, "expected 4D input (got 1D input)"),
    ((NET, [images()[:, :1]]), {}, RuntimeError, "running_mean should contain 1 elements not 2"),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_input_is_refused(arguments: Any, options: Any, kind: type[Exception], text: str) -> None:
    """The error says what was given and what is valid, or is torch's own; nothing has changed."""
    before = state_of(NET)
    with pytest.raises(kind, match=re.escape(text)):
        bnguard.recalibrate(*arguments, **options)
    assert_same_bits(state_of(NET), before)
    assert_clean(NET)
    assert NET.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_would_be_broken_are_not_written(bad: float) -> None:
    """One value that is not finite would spoil the model; the error names the layer."""
    net = conv_net()
    before = state_of(net)
    text = r"^stem\.bn \(BatchNorm2d\), body\.bn \(BatchNorm2d\) would get running statistics that are not finite"
    with pytest.raises(bnguard.BNGuardError, match=text):
        bnguard.recalibrate(net, [BATCHES[0], torch.full_like(BATCHES[0], bad)])
    assert_same_bits(state_of(net), before)


def test_variance_that_overflows_is_not_written() -> None:
    """In float16 a variance above 65,504 is infinite."""
    layer = nn.BatchNorm2d(2).half()
    with pytest.raises(bnguard.BNGuardError, match="not finite"):
        bnguard.recalibrate(layer, [BATCHES[0].half() * 1000])
    assert_same_bits(layer.running_var, torch.ones(2, dtype=torch.float16))


# Every way out.


class _Boom(Exception):
    pass


def failing_loader(error: BaseException) -> Iterator[Tensor]:
    """Two batches, then an error."""
    yield from BATCHES[:2]
    raise error


def failing_forward(error: BaseException) -> Callable[[nn.Module, Tensor], None]:
    """Runs the model, then fails at the second batch."""
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        model.eval()
        model(batch)
        seen.append(batch)
        if len(seen) == 2:
            raise error

    return forward


def failing_net(error: BaseException) -> nn.Sequential:
    """Its last module fails at the second batch, after its layers have run."""
    net = make_net()
    net.append(nn.Identity())
    fail = failing_forward(error)
    net[-1].register_forward_hook(lambda _, args, output: fail(nn.Identity(), args[0]))
    return net


def make_net() -> nn.Sequential:
    """A layer of each kind, in mixed modes."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(2), ScaledNorm(2), nn.InstanceNorm2d(2, track_running_stats=True), _Counts()]
    net = warmed(nn.Sequential(*layers, nn.BatchNorm2d(2))).train()
    net[0].eval()
    return net


@pytest.mark.parametrize("error", [_Boom(), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("place", ["loader", "forward", "model"])
def test_after_an_error_everything_is_as_before(place: str, error: BaseException) -> None:
    """The error comes out as it is; statistics, modes, momentum, gradients mode and hooks are those of before."""
    net = failing_net(error) if place == "model" else make_net()
    before, modes = state_of(net), [module.training for module in net.modules()]
    objects = dict(net.named_buffers())
    loader = failing_loader(error) if place == "loader" else BATCHES
    with pytest.raises(type(error)) as caught:
        bnguard.recalibrate(net, loader, forward=failing_forward(error) if place == "forward" else None)
    assert caught.value is error
    assert_same_bits(state_of(net), before)
    assert all(tensor is objects[name] for name, tensor in net.named_buffers())
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.1
    assert torch.is_grad_enabled()
    assert_clean(net)


class _Broken(Tensor):
    """A buffer that fails at whatever is done with it, once it is broken."""

    is_broken = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.is_broken:
            raise _Boom
        return super().__torch_function__(func, types, args, kwargs or {})


class _BreaksItsBuffer(nn.Module):
    """Breaks a buffer of its own when it runs, and changes modes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("broken", torch.zeros(2).as_subclass(_Broken))

    def forward(self, input: Tensor) -> Tensor:
        self.eval()
        _Broken.is_broken = True
        return input


def test_what_cannot_be_undone_keeps_nothing_else_from_being_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer cannot be compared with what it was: its error comes out, and all the rest is as before."""
    monkeypatch.setattr(_Broken, "is_broken", False)
    net = nn.Sequential(*make_net(), _BreaksItsBuffer())
    before, modes = state_of(net[:-1]), [module.training for module in net.modules()]
    with pytest.raises(_Boom):
        bnguard.recalibrate(net, BATCHES[:1], include=nn.BatchNorm2d)
    assert_same_bits(state_of(net[:-1]), before)
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()
    assert_clean(net)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a generator of torch's is dropped
def test_interrupted_anywhere_leaves_the_old_statistics_or_the_new() -> None:
    """Wherever Python may raise KeyboardInterrupt: all statistics are the old ones or all are the new ones."""
    dynamo = importlib.import_module("torch._dynamo.eval_frame")
    stance = getattr(dynamo, "_stance", None)

    def run(target: int | None = None) -> tuple[nn.Sequential, list[Any]]:
        net, interrupt = make_net(), Interrupt(target)
        with suppress(KeyboardInterrupt), interrupt:
            bnguard.recalibrate(net, BATCHES[:2], exclude="4")
        return net, list(interrupt.places)

    run()  # imports what is imported when it is first needed
    old = state_of(make_net())
    done, places = run()
    new, modes = state_of(done), [module.training for module in done.modules()]
    assert len(places) > 50
    for target, place in enumerate(places):
        net, _ = run(target)
        now = state_of(net)
        assert any(all(torch.equal(now[name], each[name]) for name in now) for each in (old, new)), place
        assert [module.training for module in net.modules()] == modes, place
        assert net[1].momentum == 0.1, place
        assert torch.is_grad_enabled(), place
        assert getattr(dynamo, "_stance", None) is stance, place
        assert_clean(net)


def test_interrupted_write_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are written one after the other; if that fails half-way, the ones that were written return."""
    from bnguard.guard import recalibration

    net = make_net()
    before, write, seen = state_of(net), recalibration.write, []

    def fail(tensor: Tensor, value: Tensor) -> None:
        write(tensor, value)
        seen.append(tensor)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(recalibration, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        bnguard.recalibrate(net, BATCHES)
    assert_same_bits(state_of(net), before)


def test_forward_that_is_tried_again_counts_once() -> None:
    """A layer that fails, and is run again by forward=, has pooled what it has normalised."""
    net, twin = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))

    def forward(model: nn.Module, batch: Tensor) -> None:
        with suppress(ValueError):
            model(batch[:1, :, :1, :1])  # one value per channel
        model(batch)

    bnguard.recalibrate(net, BATCHES, forward=forward)
    bnguard.recalibrate(twin, BATCHES)
    assert_same_bits(state_of(net), state_of(twin))


# Wrappers and graphs.


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")], ids=["dp", "compile"]
)
def test_wrapped_model_is_the_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Names are those of the model, which runs by itself."""
    net, twin = conv_net().eval(), conv_net().eval()
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(model)
        model(batch)

    result = bnguard.recalibrate(wrap(net), BATCHES, forward=forward)
    assert result.layers == ("stem.bn", "body.bn")
    assert seen == [net] * 3
    bnguard.recalibrate(twin, BATCHES)
    assert_same_bits(state_of(net), state_of(twin))


@needs_guarded_graphs
@pytest.mark.skipif(RELEASE < (2, 6), reason="torch cannot turn graphs off")
def test_compiled_model_runs_eagerly_and_its_graphs_serve_afterwards() -> None:
    """However it is compiled, also by forward=; afterwards the graph normalises with the new statistics."""
    net, twin = conv_net().eval(), conv_net().eval()
    bnguard.recalibrate(twin, BATCHES)
    expected = twin(images())
    net.stem.compile(backend="eager", fullgraph=True)
    step: Any = torch.compile(lambda model, batch: model(batch), backend="eager", fullgraph=True)
    step(net, images())  # a graph that was there before
    bnguard.recalibrate(net, BATCHES, forward=step)
    assert_same_bits(state_of(net), state_of(twin))
    torch.testing.assert_close(step(net, images()), expected)
    assert_clean(net)


@pytest.mark.skipif(RELEASE >= (2, 6), reason="torch can turn graphs off")
def test_compiled_part_is_refused_before_torch_2_6() -> None:
    """A graph would run without the hooks."""
    net = conv_net()
    net.stem.compile(backend="eager")
    with pytest.raises(bnguard.BNGuardError, match=r"^parts of the model are compiled, which takes"):
        bnguard.recalibrate(net, BATCHES)


def test_call_in_a_compiled_function_is_made_outside_of_the_graph() -> None:
    """The graph breaks around the call."""
    net, twin = deep_net(1), deep_net(1)

    @torch.compile(backend="eager")
    def run(net: nn.Module, batch: Tensor) -> Tensor:
        bnguard.recalibrate(net, [batch])
        return batch + 1

    run(net, BATCHES[0])
    bnguard.recalibrate(twin, BATCHES[:1])
    assert_same_bits(state_of(net), state_of(twin))


def test_in_inference_mode() -> None:
    """The statistics stay ordinary tensors, which a later step may update."""
    net, twin = mlp(), mlp()
    batches = [rows(), rows(6, seed=2)]
    with torch.inference_mode():
        bnguard.recalibrate(net, batches)
    bnguard.recalibrate(twin, batches)
    assert_same_bits(state_of(net), state_of(twin))
    net(rows()).sum().backward()


def test_statistics_that_cannot_be_read_are_refused() -> None:
    """The error says what they are, and which layer to leave out."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[1].running_mean = net[1].running_mean.to_sparse()
    with pytest.raises(bnguard.BNGuardError, match=r"running statistics are in a tensor with the layout"):
        bnguard.recalibrate(net, [torch.randn(4, 3)])
    assert bnguard.recalibrate(net[:1], [torch.randn(4, 3)]).layers == ("0",)


def test_models_are_recalibrated_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler there is nothing to switch off."""
    for name in ("torch._dynamo", "torch._dynamo.eval_frame"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    net = nn.Sequential(nn.BatchNorm1d(3))
    rows = torch.randn(4, 3)
    bnguard.recalibrate(net, [rows])
    assert torch.allclose(net[0].running_mean, rows.mean(0))
    with bnguard.frozen(net) as guard:
        assert [layer.protection for layer in guard.layers] == ["checked before each forward; compared at exit"]
    assert "torch._dynamo.eval_frame" not in sys.modules
