"""``on_change="rollback"``: statistics move inside the block as without a guard, and are put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    assert_same_gradients,
    assert_untouched,
    outcome,
    state_of,
    statistics,
    values,
)
from tests.nets import NORMS, OwnForward, conv_net, images, warmed
from tests.old_torch import needs_guarded_graphs

EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def make_net(norm: str) -> nn.Sequential:
    """A convolution and one layer with statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 2, 1), warmed(NORMS[norm]()))


@EVERY_NORM
def test_inside_everything_is_as_in_the_twin(norm: str) -> None:
    """Outputs, gradients and statistics inside are bit for bit those of an unguarded twin; afterwards all is back."""
    net = make_net(norm)
    twin = copy.deepcopy(net)

    def run() -> None:
        with bnguard.frozen(net, "rollback") as guard:
            for seed in range(3):
                assert_same_bits(outcome(net, images(seed=seed)), outcome(twin, images(seed=seed)))
                assert_same_bits(state_of(net), state_of(twin))
            assert_same_bits(outcome(net.eval(), images()), outcome(twin.eval(), images()))
            assert guard.report()
        net.train()

    assert_untouched(net, run)
    assert_clean(net)


@EVERY_NORM
def test_backward_after_the_block_has_the_twins_gradients(norm: str) -> None:
    """Test-time adaptation: what a forward has read of the statistics is not what the end of the block puts back."""
    net = make_net(norm)
    twin = copy.deepcopy(net)

    def adapt(model: nn.Module, batch: Tensor) -> Tensor:
        model.train()(batch.detach() * 3 + 5)
        output: Tensor = model.eval()(batch)
        return output

    one, other = (images().requires_grad_() for _ in range(2))
    with bnguard.frozen(net, "rollback"):
        output = adapt(net, one)
    output.square().sum().backward()
    expected = adapt(twin, other)
    expected.square().sum().backward()
    assert_same_bits(output, expected)
    assert_same_bits(one.grad, other.grad)
    assert_same_gradients(net, twin)


@pytest.mark.parametrize("write", ["forward", "load", "data", "assign", "reset", "error"])
def test_whoever_writes_is_rolled_back_silently(write: str) -> None:
    """Forwards, other writes and exceptions: no warning, no error of ours, and the original tensors afterwards."""
    net = warmed(conv_net())
    other = conv_net()

    def run() -> None:
        with bnguard.frozen(net, "rollback"):
            if write == "forward":
                net(images())
            layer: Any = net.get_submodule(next(iter(statistics(net))).rpartition(".")[0])
            if write == "load":
                net.load_state_dict(other.state_dict())
            elif write == "data":
                layer.running_mean.data.fill_(7)
            elif write == "assign":
                layer.running_mean = layer.running_mean + 1
            elif write == "reset":
                layer.reset_running_stats()
            elif write == "error":
                raise ZeroDivisionError

    before, objects = values(statistics(net)), statistics(net)
    try:
        run()
    except ZeroDivisionError:
        assert write == "error"
    assert_same_bits(statistics(net), before)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_clean(net)


@pytest.mark.parametrize("outer", ["raise", "warn", "restore"])
def test_inner_rollback_is_no_change_for_the_guard_around_it(outer: Any) -> None:
    """Statistics move inside the inner block, and the outer one has nothing to say."""
    net = warmed(conv_net())
    before = values(statistics(net))
    with bnguard.frozen(net, outer) as guard:
        with bnguard.frozen(net, "rollback"):
            net(images())
            assert any(not torch.equal(before[name], tensor) for name, tensor in statistics(net).items())
        assert_same_bits(statistics(net), before)
    assert guard.changes == ()
    assert_same_bits(statistics(net), before)


def test_guard_inside_a_rollback_decides_for_itself() -> None:
    """The innermost guard comes first: it stops the forward."""
    net = warmed(conv_net())
    with bnguard.frozen(net, "rollback"), pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(images())


def test_check_puts_nothing_back() -> None:
    """``check()`` lists what has moved so far, and the statistics go on moving."""
    net = warmed(conv_net())
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "rollback") as guard:
        net(images())
        guard.check()
        assert guard.changes
        assert_same_bits(outcome(net, images(seed=2)), (twin(images()), outcome(twin, images(seed=2)))[1])
        assert_same_bits(state_of(net), state_of(twin))


def test_recomputed_forward_inside_is_the_twins() -> None:
    """Activation checkpointing inside the block works as without a guard."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), warmed(OwnForward(2)), warmed(nn.BatchNorm2d(2)))
    twin = copy.deepcopy(net)

    def run(model: nn.Module) -> list[Tensor]:
        batch = images().requires_grad_()
        output = torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)
        output.square().sum().backward()
        return [output, batch.grad]

    before = values(statistics(net))
    with bnguard.frozen(net, "rollback"):
        assert_same_bits(run(net), run(twin))
        assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(statistics(net), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_guarded_graphs)])
def test_compiled_model_is_rolled_back(compiled: bool) -> None:
    """A graph that was warm before the block updates inside, and the original statistics come back."""
    net = make_net("BatchNorm")
    twin = copy.deepcopy(net)
    run: Callable[[Tensor], Tensor] = torch.compile(net, backend="eager") if compiled else net
    run(images())
    twin(images())
    before = values(statistics(net))
    with bnguard.frozen(net, "rollback"):
        assert_same_bits(run(images(seed=2)), twin(images(seed=2)))
        assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("option", [{"updates": 1}, {"use_running_stats": True}], ids=str)
def test_options_that_contradict_it_are_refused(option: dict[str, Any]) -> None:
    """Inside a rollback the statistics are free to move; the error names both options."""
    with pytest.raises(ValueError, match=f"'rollback' contradicts {next(iter(option))}="):
        bnguard.frozen(nn.BatchNorm1d(2), "rollback", **option)


def test_strict_rolls_back_each_call() -> None:
    """As the option of a decorator."""
    net = warmed(conv_net())

    @bnguard.strict(on_change="rollback")
    def look(model: nn.Module) -> Tensor:
        model(images())
        output: Tensor = model.eval()(images())
        model.train()
        return output

    twin = copy.deepcopy(net)
    twin(images())
    assert_same_bits(assert_untouched(net, lambda: look(net)), twin.eval()(images()))


class Changing(OwnForward):
    """A layer whose forward does something else to its statistics."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__(2)
        self.change = change

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.change(self)
        return output


CHANGES: dict[str, Callable[[Any], None]] = {
    "removed": lambda layer: layer._buffers.pop("running_var"),
    "shape": lambda layer: setattr(layer, "running_var", layer.running_var[:, None]),
    "dtype": lambda layer: setattr(layer, "running_var", layer.running_var.double()),
    "meta": lambda layer: setattr(layer, "running_var", layer.running_var.to("meta")),
}


@pytest.mark.parametrize("momentum", [0.0, 0.1])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_write_between_forward_and_backward_is_what_it_is_without_a_guard(norm: Any, momentum: float) -> None:
    """As torch has kept the statistics for the backward pass, it says that they have changed: they are no copies."""
    net, twin = (norm(2, momentum=momentum, affine=False) for _ in range(2))

    def write_in_between(net: nn.Module) -> None:
        output = net(images().requires_grad_())
        net.load_state_dict(twin.state_dict())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    write_in_between(twin)
    with bnguard.frozen(net, "rollback"), bnguard.frozen(net, updates=1):
        write_in_between(net)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_forward_makes_of_its_statistics_is_rolled_back(change: str) -> None:
    """Inside, output and statistics are the twin's; afterwards the values of before are back, in the dtype of now."""
    net, twin = (warmed(Changing(CHANGES[change])) for _ in range(2))
    before = values(statistics(net))
    with bnguard.frozen(net, "rollback"):
        assert_same_bits(net(images()), twin(images()))
        assert_same_bits(net.running_mean, twin.running_mean)
        if change in ("shape", "dtype"):
            assert_same_bits(net.running_var, twin.running_var)
    dtype = torch.float64 if change == "dtype" else torch.float32
    assert_same_bits(statistics(net), {**before, "running_var": before["running_var"].to(dtype)})
    assert_clean(net)


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_what_goes_back_under_a_guard_that_goes_on_is_a_change(make: Callable[..., nn.Module], converts: bool) -> None:
    """It has accepted the update, whatever dtype the layer had then: so that is put back once more, and told."""
    net, twin = (nn.Sequential(make(3, affine=False, track_running_stats=True)) for _ in range(2))
    batch = torch.randn(2, 3, 4)
    outer = bnguard.frozen(net, "rollback").start()
    inner = bnguard.frozen(net, updates=1).start()
    for model in (net, twin):
        if converts:
            model.double()(batch.double())
            model.float()
        else:
            model(batch)
    outer.stop()
    with pytest.raises(bnguard.StatsChangedError, match="running_mean"):
        inner.stop()
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)
