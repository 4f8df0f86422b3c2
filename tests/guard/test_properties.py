"""One law each, over random nets and inputs; the oracle is a twin that no guard has ever seen.

``HYPOTHESIS_PROFILE=long`` runs 5,000 examples of each, see ``tests/strategies.py``.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.strategies import (
    ODD,
    HandmadeNorm,
    NetSpec,
    batch,
    differing,
    eager_switching,
    nets,
    norm_layers,
    odd_batch,
    property_settings,
    random_state,
    same,
    seeds,
)
from tests.twin import Guard, Twin, may_update

POLICIES = ("raise", "warn", "restore")
# (seed, size) of each batch
batches = st.lists(st.tuples(seeds(), st.integers(2, 4)), min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def _one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def train_step(net: nn.Module, inputs: Tensor, seed: int = 0) -> list[Tensor]:
    """One forward and backward pass: the output, the random state and all gradients."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = None
    inputs = inputs.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = net(inputs)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
    (output * weights.to(output.dtype)).sum().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return [output.detach(), *random_state(), inputs.grad, *gradients]


def descend(net: nn.Module) -> None:
    """One step of plain gradient descent."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad


def eval_output(net: nn.Module, inputs: Tensor) -> Tensor:
    """What the net gives in eval mode; modes are as before afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    with torch.no_grad():
        output = net.eval()(inputs)
    for module, mode in modes:
        module.training = mode
    return output


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Two lists hold the same bits."""
    assert len(ours) == len(theirs)
    for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert same(one, other), f"tensor {position} differs"


def assert_same_state(net: nn.Module, twin: nn.Module) -> None:
    """Two state dicts hold the same bits."""
    assert not (keys := list(differing(net.state_dict(), twin.state_dict()))), keys


def inputs_of(spec: NetSpec, batches: list[tuple[int, int]], device: str) -> list[Tensor]:
    """The inputs that ``batches`` stands for."""
    return [batch(spec, size, seed, device) for seed, size in batches]


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collects warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@contextmanager
def collect(kind: type[Exception], caught: list[Any]) -> Iterator[None]:
    """Catches an exception and keeps it."""
    try:
        yield
    except kind as error:
        caught.append(error)


def is_eval_stable(net: nn.Module) -> bool:
    """Whether eval mode leaves the net alone; not so for an InstanceNorm that had its flag taken away."""
    return not any(may_update(layer) for layer in norm_layers(copy.deepcopy(net).eval()))


def use_statistics(layer: nn.Module) -> None:
    """Makes a layer normalise with its running statistics."""
    layer.training = False
    if isinstance(layer, _InstanceNorm):
        layer.track_running_stats = True  # with the flag off torch would use the batch


@property_settings
@given(spec=nets(), batches=batches)
def test_repeated_forwards_give_the_same_bits(device, spec, batches):
    """Under restore, a train-mode forward and backward pass is a function of its batch."""
    net = spec.build(device)
    inputs = inputs_of(spec, batches, device)
    with bnguard.frozen(net, "restore"):
        rounds = [[tensor for each in inputs for tensor in train_step(net, each)] for _ in range(3)]
    assert_same(rounds[1], rounds[0])
    assert_same(rounds[2], rounds[0])


@property_settings
@given(spec=nets(), batches=batches, policy=st.sampled_from(["raise", "restore"]), running=st.booleans())
def test_eval_output_is_the_same_before_and_after(device, spec, batches, policy, running):
    """Whatever runs inside a block that holds, the eval-mode output afterwards is that of before."""
    net = spec.build(device)
    assume(is_eval_stable(net))
    probe, *_ = inputs_of(spec, batches, device)
    before, objects = eval_output(net, probe), [id(tensor) for tensor in net.buffers()]
    with suppress(bnguard.StatsChangedError), bnguard.frozen(net, policy, use_running_stats=running):
        for inputs in inputs_of(spec, batches, device):
            with suppress(bnguard.StatsChangedError):
                train_step(net.train(), inputs)
            assert same(eval_output(net, probe), before)
    assert same(eval_output(net, probe), before)
    assert [id(tensor) for tensor in net.buffers()] == objects


@property_settings
@given(spec=nets(), batches=batches, policy=st.sampled_from(["warn", "restore"]), late=st.booleans())
def test_outputs_gradients_and_random_numbers_are_the_twins(device, spec, batches, policy, late):
    """A guard that lets forwards run changes nothing about them, wherever the backward pass runs."""
    net, twin = spec.build(device), spec.build(device)
    entry = {name: tensor.clone() for name, tensor in twin.named_buffers()}
    ours, theirs = [], []

    def run(net: nn.Module, inputs: Tensor, results: list[Any]) -> None:
        torch.manual_seed(0)
        inputs = inputs.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        results.append((net(inputs), inputs, random_state()))

    def go_back(results: list[Any], net: nn.Module) -> list[Tensor]:
        tensors = []
        for output, inputs, state in results:
            output.sin().sum().backward()
            tensors += [output, inputs.grad, *state]
        return tensors + [parameter.grad for parameter in net.parameters()]

    with quiet(), bnguard.frozen(net, policy):
        for inputs in inputs_of(spec, batches, device):
            run(net, inputs, ours)
        if not late:
            found = go_back(ours, net)
    if late:
        found = go_back(ours, net)
    for inputs in inputs_of(spec, batches, device):
        run(twin, inputs, theirs)
        if policy == "restore":
            for name, tensor in twin.named_buffers():
                tensor.data.copy_(entry[name])
    assert_same(found, go_back(theirs, twin))
    assert_same_state(net, twin)


@property_settings
@given(spec=nets(noise=False, linear=False), seed=seeds(), policy=st.sampled_from(["warn", "restore", "restore"]))
def test_errors_are_word_for_word_torchs(device, spec, seed, policy):
    """What a net turns down, the guarded one turns down in the same words; what it takes gives the same bits."""

    def outcome(net: nn.Module, inputs: Tensor) -> Any:
        try:
            return net(inputs)
        except Exception as error:
            return type(error), str(error)

    for kind in ODD:
        net, twin = spec.build(device), spec.build(device)
        entry = copy.deepcopy(twin.state_dict())
        inputs = odd_batch(spec, kind, seed, device)
        with quiet():
            with bnguard.frozen(net, policy):
                ours = outcome(net, inputs)
            theirs = outcome(twin, inputs)
        if isinstance(theirs, Tensor):
            assert same(ours, theirs)
        else:
            assert ours == theirs
        if policy == "warn":
            assert_same_state(net, twin)
        else:
            assert not list(differing(net.state_dict(), entry))


@property_settings
@given(spec=nets(), batches=batches, policy=st.sampled_from(POLICIES), mode=st.booleans())
def test_running_statistics_are_used_as_in_eval_mode(device, spec, batches, policy, mode):
    """With use_running_stats, the net is the twin whose normalising layers alone are in eval mode."""
    net, twin = spec.build(device).train(mode), spec.build(device).train(mode)
    entry = {name: tensor.clone() for name, tensor in twin.named_buffers()}
    for layer in norm_layers(twin):
        use_statistics(layer)
    with bnguard.frozen(net, policy, use_running_stats=True):
        for inputs in inputs_of(spec, batches, device):
            assert_same(train_step(net, inputs), train_step(twin, inputs))
            for name, tensor in twin.named_buffers():
                tensor.data.copy_(entry[name])
            assert_same_state(net, twin)
    assert [module.training for module in net.modules()] == [mode] * len(list(net.modules()))


@property_settings
@given(
    spec=nets(),
    batches=batches,
    policy=st.sampled_from(POLICIES),
    running=st.booleans(),
    updates=st.integers(0, 2),
    affine=st.booleans(),
)
def test_training_goes_on_as_the_twins(device, spec, batches, policy, running, updates, affine):
    """After a block the net trains exactly as a net that has never been guarded."""
    net, twin = spec.build(device), spec.build(device)
    assume(is_eval_stable(net) or running or not updates)
    options = {"use_running_stats": running, "updates": 0 if running else updates, "affine": affine}
    with quiet(), suppress(bnguard.StatsChangedError), bnguard.frozen(net, policy, **options):
        for inputs in inputs_of(spec, batches, device):
            with suppress(bnguard.StatsChangedError):
                train_step(net, inputs)
    twin.load_state_dict(net.state_dict()) if is_eval_stable(net) else copy_buffers(net, twin)
    for _ in range(2):
        for inputs in inputs_of(spec, batches, device):
            assert_same(train_step(net, inputs), train_step(twin, inputs))
            for each in (net, twin):
                descend(each)
            assert_same_state(net, twin)
    for module, other in zip(net.modules(), twin.modules(), strict=True):
        assert sorted(module.__dict__) == sorted(other.__dict__)
        assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 0


def copy_buffers(net: nn.Module, twin: nn.Module) -> None:
    """Gives the twin the statistics of the net, where ``load_state_dict`` would refuse them."""
    for tensor, other in zip(net.buffers(), twin.buffers(), strict=True):
        other.data.copy_(tensor)


@property_settings
@given(spec=nets(noise=False), batches=batches, updates=st.integers(1, 3), policy=st.sampled_from(["raise", "restore"]))
def test_a_budget_lets_the_first_updates_stand(device, spec, batches, updates, policy):
    """With updates=N, each layer ends where N forwards of the twin end, and no later one counts."""
    assume(not spec.shared or not spec.stages[1])  # a layer that is used twice updates twice
    net, twin = spec.build(device), spec.build(device)
    assume(all([getattr(module, "momentum", None) != 0 for module in net.modules()]))  # which spends nothing
    inputs = inputs_of(spec, batches, device) * 2
    with suppress(bnguard.StatsChangedError), bnguard.frozen(net, policy, updates=updates):
        for each in inputs:
            with torch.no_grad(), suppress(bnguard.StatsChangedError):
                net(each)
    for each in inputs[:updates]:
        with torch.no_grad():
            twin(each)
    assert_same_state(net, twin)


@property_settings
@given(spec=nets(), seed=seeds(), policy=st.sampled_from(POLICIES), how=st.sampled_from(["deepcopy", "pickle", "copy"]))
def test_copies_made_inside_are_ordinary_nets(device, spec, seed, policy, how):
    """A copy taken inside a block trains as a net that has never been guarded; the original does not notice."""
    net, twin = spec.build(device), spec.build(device)
    make: dict[str, Callable[[nn.Module], nn.Module]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "copy": lambda net: torch.optim.swa_utils.AveragedModel(net).module,
    }
    inputs = batch(spec, 3, seed, device)
    with bnguard.frozen(net, policy):
        duplicate = make[how](net)
        assert_same(train_step(duplicate, inputs), train_step(twin, inputs))
        assert_same_state(duplicate, twin)
    for module, other in zip(duplicate.modules(), twin.modules(), strict=True):
        assert sorted(module.__dict__) == sorted(other.__dict__)
        assert not module._forward_pre_hooks
    assert_same_state(net, spec.build(device))


@property_settings
@given(
    spec=nets(kinds=("batch", "sync", "instance", "handmade"), noise=False),
    batches=batches,
    policy=st.sampled_from(POLICIES),
    inside=st.lists(st.sampled_from(["step", "zero", "fill", "convert", "convert back", "nest"]), max_size=4),
)
def test_affine_parameters_come_back_as_they_were(device, spec, batches, policy, inside):
    """With affine=True, weights, flags and gradients of guarded layers are those of entry, whatever happens inside."""
    net = spec.build(device)
    inputs, *_ = inputs_of(spec, batches, device)
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(inputs.new_zeros(1))], 0.1, 0.9, weight_decay=0.1)
    train_step(net, inputs)
    optimizer.step()
    held = [parameter for layer in norm_layers(net) for parameter in layer.parameters()]
    entry = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in held]
    dtype = spec.dtype
    with quiet(), ExitStack() as stack:
        stack.enter_context(suppress(bnguard.StatsChangedError))
        stack.enter_context(bnguard.frozen(net, policy, affine=True, use_running_stats=True))
        for how in inside:
            if how == "step":
                train_step(net, inputs.to(dtype))
                optimizer.step()
            elif how == "zero":
                optimizer.zero_grad()
            elif how == "fill":
                for parameter in held:
                    parameter.grad = torch.ones_like(parameter)
            elif how == "nest":
                stack.enter_context(bnguard.frozen(net, policy, affine=True, use_running_stats=True))
            else:
                dtype = torch.float64 if how == "convert" else spec.dtype
                net.to(dtype)
                for state in optimizer.state.values():
                    state.pop("momentum_buffer", None)
    for parameter, (value, gradient) in zip(held, entry, strict=True):
        assert parameter.requires_grad
        assert same(parameter, value.to(parameter.dtype))
        assert same(parameter.grad, gradient.to(parameter.dtype))


@property_settings
@given(
    spec=nets(noise=False) | nets(kinds=("patched",), noise=False),
    seed=seeds(),
    policy=st.sampled_from(["raise", "restore"]),
    updates=st.integers(0, 1),
)
def test_threads_share_a_budget(device, spec, seed, policy, updates):
    """Of forwards at the same time, the budget lets one update each layer; the others are stopped or held."""
    assume(not spec.shared or not spec.stages[1])
    net, twin = spec.build(device), spec.build(device)
    assume(not updates or all([getattr(module, "momentum", None) != 0 for module in net.modules()]))
    inputs = batch(spec, 3, seed, device)
    number = 3
    barrier = threading.Barrier(number)
    outputs: list[Tensor] = []
    errors: list[Exception] = []

    def call() -> None:
        barrier.wait()
        try:
            with torch.no_grad():
                outputs.append(net(inputs))
        except Exception as error:
            errors.append(error)

    caught: list[Any] = []
    guard = bnguard.frozen(net, policy, updates=updates)
    with eager_switching(), quiet() as warned, collect(bnguard.StatsChangedError, caught), guard:
        threads = [threading.Thread(target=call) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if updates:
        with torch.no_grad():
            expected = twin(inputs)
    else:
        expected = spec.build(device)(inputs)
    assert_same_state(net, twin)
    assert not warned
    assert all(same(output, expected) for output in outputs)
    stopped = number - updates if policy == "raise" else 0
    assert (len(errors), len(outputs)) == (stopped, number - stopped)
    assert not [error for error in errors if not isinstance(error, bnguard.StatsChangedError)]
    assert len(caught) == (policy == "raise")
    assert sum(change.updates for change in guard.changes) == stopped


@property_settings
@given(spec=nets(noise=False), seed=seeds(), reentrant=st.booleans(), running=st.booleans())
def test_checkpointed_regions_are_held_twice(device, spec, seed, reentrant, running):
    """A region that is recomputed inside the block gives the twin's gradients and no update."""
    net, twin = spec.build(device), spec.build(device)
    entry = copy.deepcopy(twin.state_dict())
    if running:
        for layer in norm_layers(twin):
            use_statistics(layer)
    inputs = batch(spec, 3, seed, device)

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, input: Tensor) -> Tensor:
            return checkpoint(self.net, input, use_reentrant=reentrant)

    with bnguard.frozen(net, "restore", use_running_stats=running):
        ours = train_step(Checkpointed(net), inputs)
    assert not list(differing(net.state_dict(), entry))
    assert_same(ours, train_step(twin, inputs))


@property_settings
@given(spec=nets(noise=False), seed=seeds(), policies=st.lists(st.sampled_from(POLICIES), min_size=2, max_size=4))
def test_the_innermost_guard_decides(spec, seed, policies):
    """Of nested guards, the innermost one that does not warn decides what a forward does."""
    net = spec.build()
    twin = Twin(copy.deepcopy(net))
    inputs = batch(spec, 3, seed)
    with quiet(), torch.no_grad():
        opened = [bnguard.frozen(net, policy).start() for policy in policies]
        for policy in policies:
            twin.enter(Guard(policy, norm_layers(twin.net)))
        decider = next((policy for policy in reversed(policies) if policy != "warn"), "warn")
        updating = [layer for layer in norm_layers(net) if may_update(layer)]
        try:
            output = net(inputs)
        except bnguard.StatsChangedError:
            assert decider == "raise"
            assert updating
        else:
            assert decider != "raise" or not updating
            assert same(output, twin.forward(inputs))
        for guard in reversed(opened):
            with suppress(bnguard.StatsChangedError):
                guard.stop()
    while twin.guards:
        twin.leave(twin.guards[-1])
    assert_same_state(net, twin.net)


@property_settings
@given(spec=nets(), seed=seeds(), policy=st.sampled_from(POLICIES))
def test_strict_is_frozen_around_each_call(spec, seed, policy):
    """A strict function does to a net what the same code does inside frozen."""
    nets_ = [spec.build(), spec.build()]
    inputs = batch(spec, 3, seed)

    @bnguard.strict(on_change=policy)
    def step(net: nn.Module) -> list[Tensor]:
        return train_step(net, inputs)

    def attempt(call: Callable[[], list[Tensor]]) -> Any:
        with quiet() as caught:
            try:
                return call(), len(caught)
            except bnguard.StatsChangedError as error:
                return [change.names for change in error.changes], len(caught)

    def frozen_step() -> list[Tensor]:
        with bnguard.frozen(nets_[1], policy):
            return train_step(nets_[1], inputs)

    for _ in range(2):
        ours, theirs = attempt(lambda: step(nets_[0])), attempt(frozen_step)
        assert ours[1] == theirs[1]
        if isinstance(ours[0][0], Tensor):
            assert_same(ours[0], theirs[0])
        else:
            assert ours[0] == theirs[0]
    assert_same_state(*nets_)


_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
_SHAPES = ((), (0,), (1,), (3,), (7,), (2, 3), (1, 4, 1))


class Odd(nn.Module):
    """Statistics of any dtype and shape, some of them tied, some of them not contiguous."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for position, tensor in enumerate(tensors):
            self.register_buffer(f"running_{position}_mean", tensor)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits, NaN, infinities and negative zero among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    specials = raw if seed % 2 else torch.tensor([0, 0xFF, 0x80, 0x7F], dtype=torch.uint8)[raw.long() % 4]
    return specials.view(dtype).reshape(shape)


_tensors = st.tuples(st.sampled_from(_DTYPES), st.sampled_from(_SHAPES), seeds())


@property_settings
@given(
    parts=st.lists(st.lists(_tensors, min_size=1, max_size=3), min_size=1, max_size=3),
    tie=st.booleans(),
    transpose=st.booleans(),
    writes=st.lists(
        st.tuples(seeds(), st.sampled_from(["bits", "same", "assign", "resize", "delete", "none", "parameter"])),
        max_size=4,
    ),
    policy=st.sampled_from(POLICIES),
)
def test_bits_of_any_dtype_and_shape_come_back(device, parts, tie, transpose, writes, policy):
    """What is written, replaced or taken away inside comes back, object and bits; other bits are reported."""
    made = [[random_bits(*part).to(device) for part in tensors] for tensors in parts]
    if transpose:
        made = [[t.t().contiguous().t() if t.dim() == 2 else t for t in tensors] for tensors in made]
    if tie:
        made.append([made[0][0]])
    model = nn.Sequential(*[Odd(tensors) for tensors in made])
    entry = [(owner, name, t, t.clone()) for owner in model for name, t in owner._buffers.items()]
    guard = bnguard.frozen(model, policy)
    with quiet() as caught:
        raised = False
        try:
            with guard:
                for seed, how in writes:
                    owner, name, tensor, _ = entry[seed % len(entry)]
                    write(owner, name, tensor, how, seed)
                differs = {
                    f"{position}"
                    for position, owner in enumerate(model)
                    for other, name, _, bits in entry
                    if owner is other and not holds(owner, name, bits)
                }
                outside = [(owner._buffers.get(name), owner.__dict__.get(name)) for owner, name, _, _ in entry]
        except bnguard.StatsChangedError:
            raised = True
    assert raised == (policy == "raise" and bool(differs))
    assert len(caught) == (policy != "raise" and bool(differs))
    assert {name for change in guard.changes for name in change.names} == differs
    for (owner, name, tensor, bits), (now, _) in zip(entry, outside, strict=True):
        if policy == "warn":
            assert owner._buffers.get(name) is now
        else:
            assert owner._buffers[name] is tensor
            assert same(tensor, bits)
            assert getattr(owner, name) is tensor


def write(owner: nn.Module, name: str, tensor: Tensor, how: str, seed: int) -> None:
    """What user code may do to a statistic."""
    bits = random_bits(tensor.dtype, tuple(tensor.shape), seed).to(tensor.device)
    if how == "bits":
        tensor.data = tensor.data.clone() if tensor.shape != bits.shape else tensor.data
        if tensor.shape == bits.shape:
            tensor.data.copy_(bits)
    elif how == "same":
        owner._buffers[name] = tensor.clone()
    elif how == "assign":
        owner._buffers[name] = bits
    elif how == "resize":
        tensor.data = torch.cat([tensor.data.reshape(-1).view(torch.uint8)] * 2).view(tensor.dtype)
    elif how == "delete":
        owner._buffers.pop(name, None)
    elif how == "none":
        owner._buffers[name] = None
    elif tensor.is_floating_point():
        owner._buffers.pop(name, None)
        owner._parameters[name] = nn.Parameter(tensor.clone())


def holds(owner: nn.Module, name: str, bits: Tensor) -> bool:
    """Whether a statistic is there and has these bits."""
    now = owner._buffers.get(name)
    return now is not None and same(now, bits)


@property_settings
@given(
    spec=nets(noise=False),
    seed=seeds(),
    include=st.sampled_from([None, "stem", "body", "stem.*", "*.0", "*"]),
    exclude=st.sampled_from([None, "stem", "body", "*.0"]),
)
def test_selection_guards_exactly_what_it_names(spec, seed, include, exclude):
    """A layer that include and exclude leave is held; every other one moves as the twin's does."""
    net, twin = spec.build(), spec.build()
    try:
        guard = bnguard.frozen(net, "restore", include=include, exclude=exclude)
    except ValueError:
        return
    guarded = {layer.names for layer in guard.layers}
    held = {
        (name, buffer)
        for name, module in net.named_modules(remove_duplicate=False)
        for buffer in module._buffers
        if any(name in names for names in guarded)
    }
    entry = copy.deepcopy(twin.state_dict())
    inputs = batch(spec, 3, seed)
    with quiet() as caught, torch.no_grad(), guard:
        net(inputs)
    assert not caught
    with torch.no_grad():
        twin(inputs)
    moved = twin.state_dict()
    for key, tensor in net.state_dict().items():
        prefix, _, name = key.rpartition(".")
        expected = entry if (prefix, name) in held else moved
        assert same(tensor, expected[key]), key


@property_settings
@given(
    spec=nets(kinds=("handmade",)),
    seed=seeds(),
    guards=st.lists(st.tuples(st.sampled_from(POLICIES), st.booleans(), st.integers(0, 2)), min_size=1, max_size=3),
)
def test_own_forwards_run_once_a_call(spec, seed, guards):
    """A layer's own code runs once for each forward, whatever the guards around it decide."""
    net = spec.build()
    calls = []
    original = HandmadeNorm.forward

    def counted(layer: HandmadeNorm, input: Tensor) -> Tensor:
        calls.append(layer)
        return original(layer, input)

    with quiet(), pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(HandmadeNorm, "forward", counted)
        for policy, running, updates in guards:
            stack.enter_context(suppress(bnguard.StatsChangedError))
            stack.enter_context(
                bnguard.frozen(net, policy, use_running_stats=running, updates=0 if running else updates)
            )
        for _ in range(3):
            calls.clear()
            with torch.no_grad(), suppress(bnguard.StatsChangedError):
                net(batch(spec, 3, seed))
                assert len(calls) == sum(isinstance(layer, HandmadeNorm) for stage in net for layer in stage)
