"""The comparison at the end of a block: whoever wrote, it is seen, and undone unless it is to stand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    assert_same_gradients,
    assert_untouched,
    state_of,
    told,
    warns,
)


def make_net() -> nn.Sequential:
    """Conv-BN, twice, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net(make_input(9))
    return net


def make_input(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch."""
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def other_state(net: nn.Module) -> dict[str, Tensor]:
    """A state dict with other statistics."""
    return {name: tensor + 1 for name, tensor in net.state_dict().items()}


def call_batch_norm(net: nn.Sequential) -> None:
    """The functional form on the layer's buffers."""
    F.batch_norm(torch.randn(4, 3, 2, 2), net[1].running_mean, net[1].running_var, training=True)


def write_numpy(net: nn.Sequential) -> None:
    """Through the memory that torch shares with numpy."""
    net[1].running_var.numpy()[0] = 5


def assign(net: nn.Sequential) -> None:
    """Another tensor in the buffer's place."""
    net[1].running_mean = torch.full((3,), 2.0)


def assign_other_shape(net: nn.Sequential) -> None:
    """A tensor that does not even fit."""
    net[1].running_mean = torch.full((7,), 2.0)


def delete(net: nn.Sequential) -> None:
    """The buffer gone."""
    del net[1].running_mean


def make_parameter(net: nn.Sequential) -> None:
    """The buffer turned into a parameter."""
    mean = net[1].running_mean
    del net[1].running_mean
    net[1].running_mean = nn.Parameter(mean + 1)


def make_attribute(net: nn.Sequential) -> None:
    """The buffer turned into a plain attribute."""
    mean = net[1].running_mean
    del net[1].running_mean
    net[1].__dict__["running_mean"] = mean + 1


def replace_storage(net: nn.Sequential) -> None:
    """The same tensor object with other data, of another shape."""
    net[1].running_mean.data = torch.zeros(5)


WRITES: dict[str, Callable[[nn.Sequential], Any]] = {
    "forward-method": lambda net: net[1].forward(torch.randn(4, 3, 2, 2)),
    "functional": call_batch_norm,
    "data": lambda net: net[1].running_mean.data.add_(1),
    "numpy": write_numpy,
    "in-place": lambda net: net[1].running_mean.add_(1),
    "load_state_dict": lambda net: net.load_state_dict(other_state(net)),
    "load_state_dict-assign": lambda net: net.load_state_dict(other_state(net), assign=True),
    "reset_running_stats": lambda net: net[1].reset_running_stats(),
    "assignment": assign,
    "other-shape": assign_other_shape,
    "none": lambda net: setattr(net[1], "running_mean", None),
    "deleted": delete,
    "parameter": make_parameter,
    "attribute": make_attribute,
    "data-replaced": replace_storage,
    "negative-zero": lambda net: net[1].running_mean.copy_(torch.tensor([-0.0, 0.0, 0.0])),
    "nan": lambda net: net[1].running_var.fill_(float("nan")),
}
EVERY_WRITE = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())


@EVERY_WRITE
def test_exit_raises_and_restores_what_no_forward_wrote(write: Callable[[nn.Sequential], Any]) -> None:
    """Under raise the block's end raises and names the layer; objects and bits are those of entry."""
    net = make_net()
    guard = bnguard.frozen(net)

    def run() -> bnguard.StatsChangedError:
        with pytest.raises(bnguard.StatsChangedError, match=r"1 \(BatchNorm2d\)") as caught, guard:
            write(net)
        return caught.value

    error = assert_untouched(net, run)
    assert error.changes == guard.changes
    assert guard.changes[0].names == ("1",)
    assert guard.changes[0].updates == 0
    assert guard.changes[0].where is None
    assert_clean(net)


@EVERY_WRITE
def test_exit_restores_under_restore_with_one_warning(write: Callable[[nn.Sequential], Any]) -> None:
    """Under restore the same, with a warning that names the layer; a forward method is held, and silent."""
    net = make_net()
    is_held = write is WRITES["forward-method"]

    def run() -> None:
        with warns(count=0 if is_held else 1) as caught, bnguard.frozen(net, "restore"):
            write(net)
        assert is_held or "  1 (BatchNorm2d): " in caught.message

    assert_untouched(net, run)


@EVERY_WRITE
def test_exit_lets_changes_stand_under_warn(write: Callable[[nn.Sequential], Any]) -> None:
    """Under warn everything is as without a guard, and listed."""
    net = make_net()
    twin = copy.deepcopy(net)
    torch.manual_seed(3)
    with warns(), bnguard.frozen(net, "warn") as guard:
        write(net)
    torch.manual_seed(3)
    write(twin)
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert guard.changes[0].names == ("1",)


def test_exit_of_an_untouched_block_is_silent() -> None:
    """No write, no finding; and none either for writes that leave the bits as they were."""
    net = make_net()
    for on_change in ("raise", "warn", "restore"):
        with bnguard.frozen(net, on_change) as guard:
            net.load_state_dict(state_of(net))
            net.eval()(make_input())
        assert guard.changes == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_exit_compares_bits_not_numbers(value: float) -> None:
    """NaN equals itself: broken statistics that nobody touches are no change."""
    net = make_net()
    net[1].running_mean.fill_(value)
    net[1].running_var[0] = value
    with bnguard.frozen(net) as guard:
        net.eval()(make_input())
    assert guard.changes == ()


def test_exit_tells_negative_zero_from_zero() -> None:
    """A mean of 0.0 that became -0.0 is a change, and is put back."""
    net = nn.BatchNorm2d(3)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net.running_mean.neg_()
    assert_same_bits(net.running_mean, torch.zeros(3))


def test_exit_does_not_blame_broken_statistics_for_another_change() -> None:
    """Where one layer changed, another with NaN in its statistics is not listed."""
    net = make_net()
    net[1].running_mean.fill_(float("nan"))
    with warns(), bnguard.frozen(net, "warn") as guard:
        net[4].running_mean.add_(1)
    assert [change.names for change in guard.changes] == [("4",)]


def test_exit_returns_the_object_for_an_equal_one() -> None:
    """Another tensor with the same bits is no change, and the original object is back all the same."""
    net = make_net()
    objects = dict(net.named_buffers())
    with bnguard.frozen(net):
        net.load_state_dict(state_of(net), assign=True)
    assert dict(net.named_buffers()).keys() == objects.keys()
    assert all(tensor is objects[name] for name, tensor in net.named_buffers())


def test_exit_never_writes_into_the_users_tensors() -> None:
    """Tensors that the user assigned keep their values."""
    net = make_net()
    mine = other_state(net)
    kept = {name: tensor.clone() for name, tensor in mine.items()}
    with warns(), bnguard.frozen(net, "restore"):
        net.load_state_dict(mine, assign=True)
        net(make_input())
    assert_same_bits(mine, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_inside_is_no_change(dtype: torch.dtype) -> None:
    """``.to(dtype)`` alone is no finding; the converted statistics hold the values of entry, cast."""
    net = make_net()
    expected = {name: tensor.to(dtype) for name, tensor in state_of(net).items() if "running" in name}
    with bnguard.frozen(net) as guard:
        net.to(dtype)
    assert guard.changes == ()
    assert_same_bits({name: tensor for name, tensor in net.state_dict().items() if "running" in name}, expected)


def test_conversion_inside_hides_no_change() -> None:
    """Converted and moved: the converted statistics hold the values of entry again, cast, in a tensor of our own."""
    net = make_net()
    expected = net[1].running_mean.double()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net.double()
        mine = net[1].running_mean = net[1].running_mean + 1
    assert_same_bits(net[1].running_mean, expected)
    assert_same_bits(mine, expected + 1)


def test_conversion_there_and_back_returns_the_originals() -> None:
    """Half and back loses digits; the original objects with the original bits return, and the loss is reported."""
    net = make_net()
    before, objects = state_of(net), dict(net.named_buffers())
    with warns(), bnguard.frozen(net, "restore"):
        net.half().float()
    for name, tensor in net.named_buffers():
        assert tensor is objects[name]
        assert_same_bits(tensor, before[name])


def test_conversion_in_place_is_no_change() -> None:
    """A dtype changed through ``.data`` keeps the object; the values of entry, cast, are in it."""
    net = make_net()
    mean, expected = net[1].running_mean, net[1].running_mean.double()
    with bnguard.frozen(net) as guard:
        mean.data = mean.data.double()
    assert guard.changes == ()
    assert net[1].running_mean is mean
    assert_same_bits(mean, expected)


def test_removed_layer_is_restored_too() -> None:
    """A layer that leaves the model inside the block has its statistics of entry; the model is as the user left it."""
    net = make_net()
    gone, before = net[4], state_of(net[4])
    with pytest.raises(bnguard.StatsChangedError, match=r"4 \(BatchNorm2d\)"), bnguard.frozen(net):
        net[4] = nn.Identity()
        gone.running_mean.add_(1)
    assert isinstance(net[4], nn.Identity)
    assert_same_bits(gone.state_dict(), before)
    assert_clean(gone)


def test_added_layer_is_pointed_out() -> None:
    """A layer that came inside was not guarded, and the block's end says so."""
    net = make_net()
    with warns(at="with warns") as caught, bnguard.frozen(net, "restore"):
        net.append(nn.BatchNorm2d(3))
        net(make_input())
    assert caught.message.startswith("5 came into the model inside frozen() and was not guarded there.")
    assert net[5].num_batches_tracked == 1


@pytest.mark.parametrize("blocks", [0, 3])
def test_layer_added_with_a_new_table_of_modules_is_pointed_out(blocks: int) -> None:
    """So is one that came with another dictionary of modules; also in the fourth block of a guard."""
    net = make_net()
    guard = bnguard.frozen(net, "restore")
    for _ in range(blocks):
        with guard:
            pass
    with warns(at="with warns") as caught, guard:
        net._modules = {**net._modules, "5": nn.BatchNorm2d(3)}
        net(make_input())
    assert caught.message.startswith("5 came into the model inside frozen() and was not guarded there.")
    assert net[5].num_batches_tracked == 1


def test_check_finds_and_restores_in_mid_block() -> None:
    """``check()`` raises as the end would, and puts back; if its error is caught, the block fails all the same."""
    net = make_net()
    guard = bnguard.frozen(net)
    text = "1 layer changed inside frozen(), and the StatsChangedError that said so was caught:"

    def move_and_check() -> None:
        net[1].running_mean.add_(1)
        with pytest.raises(bnguard.StatsChangedError, match=r"1 \(BatchNorm2d\)"):
            guard.check()

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError, match=re.escape(text)), guard:
            guard.check()
            assert_untouched(net, move_and_check)

    assert_untouched(net, run)
    assert len(guard.changes) == 1


def test_error_of_check_that_is_let_through_is_told_once() -> None:
    """It ends the block by itself, without a note."""
    net = make_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net) as guard:
        net[1].running_mean.add_(1)
        guard.check()
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_write_before_an_allowed_update_is_found(on_change: Any) -> None:
    """An update within the budget does not hide what somebody wrote before it: the statistics of entry come back."""
    net = make_net()
    guard = bnguard.frozen(net, on_change, updates=1)

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError) if on_change == "raise" else warns(), guard:
            net[1].running_mean.data.fill_(1e6)
            net[:2](make_input())

    assert_untouched(net, run)
    assert [change.names for change in guard.changes] == [("1",)]


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_update_after_another_guard_has_restored_is_kept(on_change: Any) -> None:
    """An update that began from the protected values is allowed, although an earlier one had not."""
    net, twin = make_net(), make_net()
    with bnguard.frozen(net, on_change, updates=2):
        with warns(), bnguard.frozen(net, "restore", updates=1):
            net[1].running_mean.add_(1)
            net[:2](make_input(1))
        assert_same_bits(state_of(net), state_of(twin))
        net[:2](make_input(2))
        twin[:2](make_input(2))
    assert_same_bits(state_of(net), state_of(twin))


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_update_after_a_check_is_kept_whatever_that_found(on_change: Any) -> None:
    """What ``check()`` has restored once is over: a later update within the budget is not undone along with it."""
    net, twin = make_net(), make_net()
    guard = bnguard.frozen(net, on_change, updates=2)
    tells = pytest.raises(bnguard.StatsChangedError) if on_change == "raise" else nullcontext()  # once more, at the end
    with tells, guard:
        net[1].running_mean.add_(1)
        net[:2](make_input(1))
        with pytest.raises(bnguard.StatsChangedError) if on_change == "raise" else warns():
            guard.check()
        assert_same_bits(state_of(net), state_of(twin))
        net[:2](make_input(2))
        twin[:2](make_input(2))
        guard.check()
        assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(state_of(net), state_of(twin))


def test_check_under_restore_warns_each_time() -> None:
    """Under restore each finding of ``check()`` is put back and warned about."""
    net = make_net()
    before = state_of(net)
    with warns(count=2), bnguard.frozen(net, "restore") as guard:
        for _ in range(2):
            net[1].running_mean.add_(1)
            guard.check()
            assert_same_bits(net.state_dict(), before)


def test_check_under_warn_completes_the_list() -> None:
    """Under warn ``check()`` lists what differs from entry; what is back by then is none."""
    net = make_net()
    with warns(), bnguard.frozen(net, "warn") as guard:
        net[1].running_mean.add_(1)
        guard.check()
        assert [change.names for change in guard.changes] == [("1",)]
        net[1].running_mean.sub_(1).copy_(net[1].running_mean)
        net(make_input())
    assert [change.names for change in guard.changes] == [("1",), ("4",)]


def test_mean_shift_is_measured_in_standard_deviations() -> None:
    """The shift is the largest over the channels, in standard deviations at entry; None where nothing of it moved."""
    net = make_net()
    with warns(), bnguard.frozen(net, "warn") as guard:
        net[1].running_mean[1] += 3
        net[4].num_batches_tracked += 1
    var = net[1].running_var[1].double() + net[1].eps
    assert guard.changes[0].mean_shift == pytest.approx(3 / var.sqrt().item(), rel=1e-5)
    assert guard.changes[1].mean_shift == 0
    assert guard.changes[1].buffers == ("num_batches_tracked",)


# Backward after the block.


RUNNING = {"on_change": "restore", "use_running_stats": True}
HOLDS = pytest.mark.parametrize("options", [{"on_change": "restore"}, RUNNING], ids=["restore", "running"])
# Those that move no version counter: after the others, backward fails without a guard as well.
SILENT_WRITES = ("forward-method", "functional", "data", "numpy", "assignment", "none", "deleted")


@HOLDS
@pytest.mark.parametrize("write", [None, *SILENT_WRITES])
def test_backward_after_the_block_has_the_right_gradients(options: dict[str, Any], write: str | None) -> None:
    """Statistics put back at the end disturb no backward pass that comes later; its gradients are the twin's."""
    net, x = make_net(), make_input()
    twin = in_eval_mode(copy.deepcopy(net)) if options is RUNNING else copy.deepcopy(net)
    is_silent = write is None or (write == "forward-method")
    with warns(count=0 if is_silent else 1), bnguard.frozen(net, **options):
        loss = net(x).square().sum()
        if write is not None:
            WRITES[write](net)
    loss.backward()
    twin(x).square().sum().backward()
    assert_same_gradients(net, twin)


def in_eval_mode(net: nn.Sequential) -> nn.Sequential:
    """The normalisation layers in eval mode."""
    net[1].eval()
    net[4].eval()
    return net


def test_backward_on_a_device(device: torch.device) -> None:
    """Forward inside and backward after the block, on every device."""
    net, x = make_net().to(device), make_input().to(device)
    twin, before = copy.deepcopy(net), state_of(net)
    with warns(), bnguard.frozen(net, "restore"):
        loss = net(x).square().sum()
        net[1].running_mean.data.add_(1)
    loss.backward()
    twin(x).square().sum().backward()
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), before)


def test_ordinary_write_would_break_backward() -> None:
    """The reason to write past autograd: an ordinary write back makes the later backward pass fail."""
    net = make_net()
    before = net[1].running_mean.clone()
    loss = net.eval()(make_input()).sum()
    net[1].running_mean.copy_(before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@HOLDS
def test_double_backward_after_the_block(options: dict[str, Any]) -> None:
    """Gradients of gradients are the twin's, too."""
    net, x, y = make_net(), make_input().requires_grad_(), make_input().requires_grad_()
    twin = in_eval_mode(copy.deepcopy(net)) if options is RUNNING else copy.deepcopy(net)
    with bnguard.frozen(net, **options):
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(twin(y).square().sum(), y, create_graph=True)
    gradient.square().sum().backward()
    expected.square().sum().backward()
    assert_same_bits(x.grad, y.grad)
    assert_same_gradients(net, twin)


@HOLDS
def test_eval_then_train_then_backward_has_the_right_gradients(options: dict[str, Any]) -> None:
    """Backward of an eval-mode forward reads the statistics; a train-mode forward in between has not moved them."""
    net = make_net()
    twin = copy.deepcopy(net)
    twin.eval()(make_input()).square().sum().backward()
    with bnguard.frozen(net, **options):
        loss = net.eval()(make_input()).square().sum()
        net.train()(make_input(2))
        loss.backward()
    assert_same_gradients(net, twin)
    unguarded = copy.deepcopy(twin).eval()
    unguarded.zero_grad()
    loss = unguarded(make_input()).square().sum()
    unguarded.train()(make_input(2))
    loss.backward()
    assert not torch.equal(unguarded[1].weight.grad, twin[1].weight.grad)  # what happens without a guard


def test_write_to_statistics_and_parameters_is_one_change() -> None:
    """With affine=True what moved of a layer is listed together."""
    net = make_net()
    with warns(), bnguard.frozen(net, "restore", affine=True) as guard:
        net[1].running_mean.add_(1)
        net[1].weight.data.add_(1)
    assert [change.buffers for change in guard.changes] == [("running_mean", "weight")]
    assert_clean(net)


def test_many_updates_within_the_budget_hide_no_write() -> None:
    """More than are remembered at once: they stand as the twin's, and a write between two of them is found."""
    for writes in (False, True):
        net = make_net()
        twin, before = copy.deepcopy(net), state_of(net)
        with told() as said, bnguard.frozen(net, updates=40):
            for number in range(40):
                net(make_input(number))
                twin(make_input(number))
                if writes and number == 20:
                    net[1].running_mean.data.add_(1)
        assert (said.error is not None) == writes
        if writes:
            assert_same_bits(net[4].running_mean, twin[4].running_mean)
            assert_same_bits(net[1].num_batches_tracked, before["1.num_batches_tracked"] + 21)
        else:
            assert_same_bits(state_of(net), state_of(twin))


def test_tensor_with_another_number_of_dimensions_is_restored() -> None:
    """It cannot be compared along with the others, and is a change like any other."""
    net = make_net()

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net) as guard:
            net[1].running_mean.data = torch.zeros(3, 1)
        assert [change.buffers for change in guard.changes] == [("running_mean",)]

    assert_untouched(net, run)
