"""How a forward runs without touching the statistics: with scratch, or with its own statistics swapped out."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from bnguard.guard import hold as _hold
from bnguard.guard import hooks as _hooks
from bnguard.guard import policy as _policy
from bnguard.guard import watching as _watching
from bnguard.layers import kinds as _layers
from bnguard.layers import tree as _tree
from bnguard.layers.swaps import own_values
from bnguard.torch_internals import known_forwards
from tests.asserts import assert_clean, assert_same_bits, state_of, warns
from tests.nets import NORMS, images, warmed


def make_input() -> torch.Tensor:
    """A batch for three channels."""
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))


class Remembering(nn.Module):
    """A layer of its own that keeps things on itself as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("last", torch.zeros(()))
        self.calls = 0
        self.draft: str | None = "set"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean = input.mean((0, 2, 3))
        self.calls += 1
        self.last = input.sum().detach()
        if "draft" in self.__dict__:
            del self.draft
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
        return input - mean[None, :, None, None] + self.running_mean[None, :, None, None]


@pytest.fixture
def unknown_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose normalisation layers have a source that nobody has read yet."""
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: source(thing) + "        pass\n")
    known_forwards.is_known.cache_clear()
    known_forwards._digest.cache_clear()
    yield
    known_forwards.is_known.cache_clear()
    known_forwards._digest.cache_clear()


@pytest.mark.parametrize("function", _layers._STOCK, ids=lambda function: function.__qualname__)
def test_pin_knows_the_installed_torch(function: Callable[..., Any]) -> None:
    """The sources of the torch that the suite runs with are among those that bnguard was tested against."""
    assert known_forwards.is_known(function)


@pytest.mark.usefixtures("unknown_torch")
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_pin_does_not_trust_another_source(cls: type[nn.Module]) -> None:
    """A layer whose source has changed counts as one with a forward of its own."""
    assert _tree.find_layers(cls(3))[0].kind is _layers.OWN_FORWARD


@pytest.mark.usefixtures("unknown_torch")
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_unknown_source_is_held_all_the_same(layer: nn.Module) -> None:
    """Without knowing the forward, restore gives the twin's output and keeps the statistics; raise raises."""
    layer = copy.deepcopy(layer)
    twin, before, x = copy.deepcopy(layer), state_of(layer), make_input()
    with bnguard.frozen(layer, "restore"):
        assert_same_bits(layer(x), twin(x))
    assert_same_bits(layer.state_dict(), before)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer):
        layer(x)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.usefixtures("unknown_torch")
def test_source_that_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python finds no source, as in a frozen application, nothing is taken for known."""

    def fail(thing: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", fail)
    assert not known_forwards.is_known(nn.BatchNorm2d.forward)


def test_stock_layer_never_reads_its_statistics_in_train_mode() -> None:
    """Under restore the layer's own buffers are not what F.batch_norm is given."""
    layer, seen = nn.BatchNorm2d(3), []

    def spy(input: torch.Tensor, mean: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(mean)
        return torch.nn.functional.layer_norm(input, input.shape[1:])

    with pytest.MonkeyPatch.context() as patch, bnguard.frozen(layer, "restore"):
        patch.setattr(F, "batch_norm", spy)
        layer(make_input())
    assert len(seen) == 1
    assert seen[0] is not layer.running_mean


@pytest.mark.filterwarnings("ignore:also moved")  # another buffer, as it should
def test_layer_keeps_what_it_set_on_itself() -> None:
    """Attributes, deleted attributes and other buffers end up on the layer; the statistics do not."""
    layer = Remembering()
    twin, before, x = copy.deepcopy(layer), layer.running_mean, make_input()
    with bnguard.frozen(layer, "restore"):
        output = layer(x)
    assert_same_bits(output, twin(x))
    assert layer.calls == twin.calls == 1
    assert not hasattr(layer, "draft")
    assert_same_bits(layer.last, twin.last)
    assert layer.running_mean is before
    assert_same_bits(before, torch.zeros(3))
    assert_clean(layer)


def test_own_forward_with_budget_updates_as_its_twin() -> None:
    """Within the budget a layer with a forward of its own moves as unguarded; beyond, it stays."""
    layer, x = Remembering(), make_input()
    twin = copy.deepcopy(layer)
    twin(x)
    with bnguard.frozen(layer, "restore", updates=1):
        layer(x)
        assert_same_bits(layer.running_mean, twin.running_mean)
        layer(x)
    assert_same_bits(layer.running_mean, twin.running_mean)


def test_own_forward_that_fails_under_a_budget_has_counted_the_batch() -> None:
    """What an unguarded layer writes before it fails, it writes under a budget, too; the error is the layer's."""

    class Failing(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.num_batches_tracked.add_(1)
            raise ZeroDivisionError("mine")

    layer = Failing(3)
    with bnguard.frozen(layer, "restore", updates=1):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="mine"):
                layer(make_input())
    assert layer.num_batches_tracked == 2
    with pytest.raises(ZeroDivisionError, match="mine"), bnguard.frozen(layer):
        layer(make_input())
    assert layer.num_batches_tracked == 2


def test_own_forward_beyond_the_budget_in_an_eval_mode_guard() -> None:
    """What the inner budget lets stand is up to the guard around it: use_running_stats runs it in eval mode."""
    layer, x = Remembering(), make_input()
    twin = copy.deepcopy(layer).eval()
    with bnguard.frozen(layer, use_running_stats=True), bnguard.frozen(layer, updates=1):
        assert_same_bits(layer(x), twin(x))
    assert_same_bits(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}])
def test_functional_call_updates_the_tensors_that_it_is_given(options: dict[str, Any]) -> None:
    """Statistics lent by functional_call are the caller's: they move as without a guard, the layer's own do not."""
    layer, x = nn.BatchNorm2d(3), make_input()
    twin, before = copy.deepcopy(layer), state_of(layer)
    lent = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    lent_twin = copy.deepcopy(lent)
    with bnguard.frozen(layer, **options):
        output = torch.func.functional_call(layer, lent, (x,))
    assert_same_bits(output, torch.func.functional_call(twin, lent_twin, (x,)))
    assert_same_bits(lent, lent_twin)
    assert_same_bits(layer.state_dict(), before)


def test_functional_call_is_no_finding_under_raise() -> None:
    """Lent statistics may move; the layer's own may not, in a functional_call either."""
    layer, x = nn.BatchNorm2d(3), make_input()
    with bnguard.frozen(layer) as guard:
        torch.func.functional_call(layer, {name: t.clone() for name, t in layer.named_buffers()}, (x,))
    assert guard.changes == ()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer):
        torch.func.functional_call(layer, {"weight": torch.ones(3)}, (x,))


def test_statistics_that_the_user_replaced_are_held_too() -> None:
    """Converted or assigned statistics are the layer's own: a forward on them does not move them."""
    layer, x = nn.BatchNorm2d(3), make_input().double()
    with bnguard.frozen(layer, "restore"):
        layer.double()
        replaced = layer.running_mean
        layer(x)
        layer(x)
        assert_same_bits(replaced, torch.zeros(3, dtype=torch.float64))


def test_functional_call_after_statistics_were_replaced_between_blocks_is_held() -> None:
    """Statistics that were converted between two blocks of one guard are the layer's own: a parameter alone is lent."""
    layer, x = nn.BatchNorm2d(3), make_input().double()
    guard = bnguard.frozen(layer, "restore")
    with guard:
        pass
    layer.double()
    twin, before = copy.deepcopy(layer), state_of(layer)
    lent = {"weight": torch.full((3,), 2.0, dtype=torch.float64)}
    with guard:
        output = torch.func.functional_call(layer, lent, (x,))
        assert_same_bits(layer.state_dict(), before)
    assert_same_bits(output, torch.func.functional_call(twin, lent, (x,)))


def test_kept_forward_is_inert_after_the_block() -> None:
    """Whoever keeps the layer's forward of inside a block gets the layer's own behaviour from it afterwards."""
    layer, x = nn.BatchNorm2d(3), make_input()
    twin = copy.deepcopy(layer)
    with bnguard.frozen(layer, "restore"):
        kept = layer.forward
    assert_same_bits(kept(x), twin(x))
    assert_same_bits(layer.state_dict(), twin.state_dict())


def test_wrapped_forward_stays_after_the_block() -> None:
    """A forward that somebody put over ours inside the block is theirs, and still there afterwards."""
    layer, x = nn.BatchNorm2d(3), make_input()
    twin = copy.deepcopy(layer)
    with bnguard.frozen(layer, "restore"):
        inner = layer.forward
        layer.forward = lambda input: inner(input) + 1
        wrapped = layer.forward
    assert layer.__dict__["forward"] is wrapped
    assert_same_bits(layer(x), twin(x) + 1)
    assert_same_bits(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("mode", ["restore", "running"])
def test_forward_on_the_instance_overlaps_with_itself(mode: str) -> None:
    """Two threads inside a forward that somebody put on the instance: the statistics are back when both are out."""
    layer, x = nn.BatchNorm2d(3), make_input()
    both_in, own = threading.Barrier(2), layer.forward
    errors: list[BaseException] = []

    def slow(input: torch.Tensor) -> torch.Tensor:
        both_in.wait(20)
        return own(input)

    def run() -> None:
        try:
            layer(x)
        except BaseException as error:
            errors.append(error)

    layer.forward = slow
    before, mean = state_of(layer), layer.running_mean
    guard = bnguard.frozen(layer, use_running_stats=True) if mode == "running" else bnguard.frozen(layer, "restore")
    with guard:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert not errors
    assert layer.running_mean is mean
    assert layer.training
    assert_same_bits(layer.state_dict(), before)
    assert layer.__dict__["forward"] is slow


@pytest.mark.filterwarnings("ignore:also moved")  # another buffer, as it should
def test_scratch_survives_a_layer_that_writes_its_own_in_place() -> None:
    """Layers of one shape share scratch statistics; none of them makes the backward pass of another fail."""
    norms = [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3), Remembering()]
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), *norms, nn.BatchNorm2d(3)), make_input()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"):
        loss = net(x).square().sum()
        net(x)
    loss.backward()
    twin(x).square().sum().backward()
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same_bits(parameter.grad, other.grad)


def test_scratch_follows_the_buffer() -> None:
    """Another dtype gets other scratch statistics; two statistics of one layer never share one."""
    layer = nn.BatchNorm2d(5)
    mean, var = layer.running_mean, layer.running_var
    assert _hold.scratch_like(mean, 0) is _hold.scratch_like(var, 0)
    assert _hold.scratch_like(mean, 0) is not _hold.scratch_like(var, 1)
    assert _hold.scratch_like(mean.double(), 0).dtype == torch.float64


def test_scratch_of_a_tensor_subclass_is_made_each_time() -> None:
    """Only plain tensors are kept for later: others may belong to a mode that ends."""

    class Marked(torch.Tensor):
        pass

    marked = torch.zeros(5).as_subclass(Marked)
    assert _hold.scratch_like(marked, 0) is not _hold.scratch_like(marked, 0)


def test_flag_off_under_restore_is_the_layers_own_forward() -> None:
    """A layer that does not track, although it has statistics, is not in need of holding."""
    layer, x = nn.BatchNorm2d(3), make_input()
    layer.track_running_stats = False
    twin, before = copy.deepcopy(layer), state_of(layer)
    with bnguard.frozen(layer, "restore"):
        assert_same_bits(layer(x), twin(x))
    assert_same_bits(layer.state_dict(), before)


def test_scratch_made_in_inference_mode_serves_training() -> None:
    """The first forward of a shape may run under inference_mode; a later one still trains."""
    layer = nn.BatchNorm2d(77)
    x = torch.randn(2, 77, 2, 2)
    with bnguard.frozen(layer, "restore"):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_argument_errors_are_worded_as_the_layers_own() -> None:
    """A call with wrong arguments fails with the words of the unguarded layer."""
    layer = nn.BatchNorm2d(3)
    with pytest.raises(TypeError) as plain:
        layer()
    with bnguard.frozen(layer, "restore"), pytest.raises(TypeError) as held:
        layer()
    assert str(held.value) == str(plain.value)


def test_input_that_a_later_hook_repairs_is_not_refused() -> None:
    """An input of the wrong shape when our hook sees it may be right when the layer does."""
    layer, x = nn.BatchNorm2d(3), make_input()
    twin = copy.deepcopy(layer)
    with warns(), bnguard.frozen(layer, "warn"):
        handle = layer.register_forward_pre_hook(lambda module, args: args[0][None])
        for batch in (x[0], x[1]):
            assert_same_bits(layer(batch), twin(batch[None]))
    handle.remove()
    assert_same_bits(layer.state_dict(), twin.state_dict())


def test_guard_entered_in_inference_mode_serves_training() -> None:
    """What a guard keeps, and what it puts into the layer, are ordinary tensors wherever it was entered."""
    layer, x = nn.BatchNorm2d(3), make_input()
    with torch.inference_mode():
        guard = bnguard.frozen(layer, "restore", updates=1).start()
    layer(x)
    layer(x)
    with warns(), torch.inference_mode():
        layer.double()
        layer.running_mean = layer.running_mean + 1
        guard.stop()
    assert not layer.running_mean.is_inference()  # ours; the user's own conversions are as they come
    assert layer.num_batches_tracked == 1


def test_functional_call_on_a_layer_with_swapped_statistics() -> None:
    """What is lent moves, for layers other than torch's BatchNorm too."""
    layer, x = nn.SyncBatchNorm(3), make_input()
    before = state_of(layer)
    lent = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    with bnguard.frozen(layer, "restore"):
        torch.func.functional_call(layer, lent, (x,))
        layer.eval()(x)
    assert lent["num_batches_tracked"] == 1
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("action", ["running", "hold"])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_update_whose_budget_is_gone_by_then_is_held(
    make: Callable[[int], nn.Module], action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another thread spends the budget first, the update that was to happen is held after all."""
    layer, x = make(3), make_input()
    twin = copy.deepcopy(layer).train(action == "hold")
    with bnguard.frozen(layer, "restore", updates=1):
        guard = _hooks.guard_of(layer)
        assert guard is not None
        entry = guard.ruling.entries[0]
        with monkeypatch.context() as patch:
            patch.setattr(_watching, "decide_and_count", lambda *_: _policy.Decision(action, entry))
            assert_same_bits(layer(x), twin(x))
    assert layer.num_batches_tracked == 0


def test_dropping_entries_that_were_never_added_does_nothing() -> None:
    """An undo may be run although its acquisition never got anywhere."""
    norm = nn.BatchNorm2d(3)
    entry = _policy.PolicyEntry(None, _policy.POLICIES["restore"])
    _hooks.drop_entry([], entry, norm)
    layers = _tree.find_layers(norm)
    _hooks.drop_entry([_hooks.LayerGuard(layers[0], own_values(layers)[0])], entry, norm)
    assert_clean(norm)


def test_update_within_the_budget_may_outlast_the_block() -> None:
    """A forward within its budget that goes on after the end is an update like any other."""
    reached, go_on = threading.Event(), threading.Event()

    class Slow(nn.BatchNorm2d):
        def _check_input_dim(self, input: torch.Tensor) -> None:
            if threading.current_thread() is not threading.main_thread() and not reached.is_set():
                reached.set()
                go_on.wait(20)

    layer = Slow(3)
    thread = threading.Thread(target=lambda: layer(make_input()))
    with bnguard.frozen(layer, "restore", updates=1):
        thread.start()
        assert reached.wait(20)
    go_on.set()
    thread.join(20)
    assert layer.num_batches_tracked == 1
    assert_clean(layer)


@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}, {"updates": 1}], ids=str)
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_forward_that_somebody_binds_anew_is_the_same(make: Callable[[], nn.Module], options: Any) -> None:
    """``MethodType(layer.forward.__func__, layer)`` is held inside the block, and the layer's own forward after it."""
    layer, same = warmed(make()), warmed(make())
    twin = copy.deepcopy(layer)
    with bnguard.frozen(same, **options):
        expected = same(images())
    with bnguard.frozen(layer, **options):
        layer.forward = MethodType(layer.forward.__func__, layer)
        assert_same_bits(layer(images()), expected)
    assert_same_bits(state_of(layer), state_of(same))
    if "updates" in options:
        twin(images())
    assert_same_bits(layer(images(seed=2)), twin(images(seed=2)))
    assert_same_bits(state_of(layer), state_of(twin))


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3), Remembering], ids=["stock", "own-forward"])
@pytest.mark.parametrize("policy", ["warn", "restore"])
def test_entry_without_a_block_reports_nothing(make: Callable[[], nn.Module], policy: str) -> None:
    """It counts and decides: a second update stands or is held, in silence."""
    layer, x = make(), make_input()
    twin, guards = copy.deepcopy(layer), []
    entry = _policy.PolicyEntry(None, _policy.POLICIES[policy], 1)
    _hooks.add_entry(_tree.find_layers(layer), entry, guards)
    for _ in range(2):
        layer(x)
    _hooks.drop_entry(guards, entry, layer)
    for _ in range(2 if policy == "warn" else 1):
        twin(x)
    assert_same_bits(layer.running_mean, twin.running_mean)
    assert entry.counts[id(layer)].within == 1
    assert_clean(layer)
