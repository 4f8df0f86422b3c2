"""``torch.func``, ``torch.autograd.functional``, forward-mode AD and ``make_fx`` around and inside a block."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import bnguard
from bnguard.guard import hold as _hold
from tests.asserts import assert_clean, assert_same_bits, state_of, statistics, values, warns
from tests.nets import NORMS, ReassigningNorm, SharedNet, images, warmed

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.*is (deprecated|not supported in Python 3.14):DeprecationWarning"
    ),  # of torch's own jvp
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),  # from torch 2.14 on
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

Call = Callable[[Tensor], Tensor]
GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "affine": {"on_change": "restore", "affine": True},
    "budget": {"updates": 2},
    "budget-warn": {"on_change": "warn", "updates": 2},
    "budget-restore": {"on_change": "restore", "updates": 2},
}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)
SOME_GUARDS = pytest.mark.parametrize("guard", ["raise", "restore", "running", "budget-warn"])


def patched() -> nn.Module:
    """A layer with a forward that somebody put on the instance."""
    layer = nn.BatchNorm2d(2)
    layer.forward = lambda input: nn.BatchNorm2d.forward(layer, input) * 2
    return layer


LAYERS = {**NORMS, "reassigning": lambda: ReassigningNorm(2), "patched": patched}
EVERY_LAYER = pytest.mark.parametrize("kind", LAYERS)


def make_net(kind: str) -> nn.Sequential:
    """A convolution and, three levels down, the layer."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Sequential(nn.Identity(), LAYERS[kind]()))
    return warmed(nn.Sequential(nn.Conv2d(2, 2, 1), inner))


def small() -> Tensor:
    """A batch so small that its Hessian is."""
    return images(3)[:, :, :2, :1].contiguous()


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, cut off the graph."""
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers by name."""
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def scalar(call: Call) -> Call:
    """``call`` as a loss."""
    return lambda input: call(input).square().sum()


def dual(call: Call) -> Any:
    """Forward-mode AD by hand."""
    with fwad.dual_level():
        return tuple(fwad.unpack_dual(call(fwad.make_dual(small(), torch.ones_like(small())))))


def linearize(call: Call) -> Any:
    """Output and linearisation; runs ``call`` twice."""
    output, push = torch.func.linearize(call, small())
    return output, push(torch.ones_like(small()))


def vmap_of_others(call: Call) -> Any:
    """``vmap`` over something that the layer does not see."""
    input = small()  # not inside: no random numbers there
    return torch.func.vmap(lambda shift: call(input) + shift)(torch.arange(2.0))


def make_graph(call: Call, **options: Any) -> Any:
    """The output of a graph that was made of ``call``."""
    return make_fx(call, **options)(small())(small() * 2)


TRANSFORMS: dict[str, Callable[[Call], Any]] = {
    "plain": lambda call: call(small()),
    "grad": lambda call: torch.func.grad(scalar(call))(small()),
    "vmap": lambda call: torch.func.vmap(call)(torch.stack([small(), small() + 1])),
    "make_fx": make_graph,
    "jvp": lambda call: torch.func.jvp(call, (small(),), (torch.ones_like(small()),)),
    "jacrev": lambda call: torch.func.jacrev(call)(small()),
    "jacfwd": lambda call: torch.func.jacfwd(call)(small()),
    "hessian": lambda call: torch.func.hessian(scalar(call))(small()),
    "vmap-of-others": vmap_of_others,
    "vmap-grad": lambda call: torch.func.vmap(torch.func.grad(scalar(call)))(torch.stack([small(), small() + 1])),
    "functionalize": lambda call: torch.func.functionalize(call)(small()),
    "dual": dual,
    "autograd-jacobian": lambda call: torch.autograd.functional.jacobian(scalar(call), small()),
    "autograd-hvp": lambda call: torch.autograd.functional.hvp(scalar(call), small(), torch.ones_like(small())),
    "linearize": linearize,
}
# The first ones with every layer, the others with one of each mechanism; linearize alone takes a second.
CASES = [
    (transform, kind)
    for number, transform in enumerate(TRANSFORMS)
    for kind in LAYERS
    if transform != "linearize" and (number < 4 or kind in ("BatchNorm", "own-forward"))
]
# What make_fx takes down is a program without a guard: tests/guard/test_export.py.
CALLS = [case for case in CASES if case[0] != "make_fx"]
EVERY_CALL = pytest.mark.parametrize(("transform", "kind"), CALLS)
LINEARIZE = [("linearize", "BatchNorm"), ("linearize", "own-forward")]
EVERY_CASE = pytest.mark.parametrize(("transform", "kind"), CASES)


def attempt(function: Callable[[], Any]) -> Any:
    """The tensors that ``function`` returns, or the type and the text of its error."""
    try:
        return tree_leaves(function())
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(one: Any, other: Any) -> None:
    """Both came to the same tensors, or to the same error."""
    if isinstance(one, list) and isinstance(other, list):
        assert_same_bits(one, other)
    else:
        assert one == other


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether a state dict has other values."""
    return any(not torch.equal(before[name], after[name]) for name in before)


def lending(net: nn.Module, lent: dict[str, Tensor]) -> Call:
    """``net`` as a function that uses, and updates, the buffers that it is lent."""
    return lambda input: functional_call(net, (parameters_of(net), lent), (input,))


def pure(net: nn.Module) -> Call:
    """``net`` as a function without side effects: it gets fresh copies of its buffers each time."""
    return lambda input: functional_call(net, (parameters_of(net), buffers_of(net)), (input,))


def per_example(net: nn.Module) -> Call:
    """``net`` as a function without side effects that gets copies of its buffers for each example of a ``vmap``."""

    def call(input: Tensor) -> Tensor:
        zeros = torch.zeros_like(input).sum()
        return functional_call(
            net, (parameters_of(net), {name: b + zeros.to(b.dtype) for name, b in buffers_of(net).items()}), (input,)
        )

    return call


def on_its_own(net: nn.Module) -> Call:
    """``net`` with other parameters, and with its own buffers."""
    return lambda input: functional_call(net, parameters_of(net), (input,))


@dataclass(frozen=True)
class Expected:
    """What an unguarded twin came to."""

    outcome: Any
    state: dict[str, Tensor]
    lent: dict[str, Tensor]


@functools.cache
def expected(transform: str, kind: str, how: str) -> Expected:
    """A transform of an unguarded twin: on its own buffers, in eval mode, as a pure function, or on what it is lent."""
    twin = make_net(kind).train(how != "eval")
    lent = buffers_of(twin)
    call = {
        "own": on_its_own,
        "eval": on_its_own,
        "pure": pure,
        "per-example": per_example,
        "lent": lambda twin: lending(twin, lent),
    }[how](twin)
    return Expected(attempt(lambda: TRANSFORMS[transform](call)), state_of(twin), lent)


def without_side_effects(transform: str, kind: str) -> Expected:
    """What a twin comes to that updates nothing of its own."""
    return expected(transform, kind, "per-example" if transform in ("vmap", "vmap-grad") else "pure")


# Buffers that are lent.


@pytest.mark.parametrize("guard", ["raise", "restore", "budget-warn"])
@EVERY_CASE
def test_lent_statistics_are_the_callers(transform: str, kind: str, guard: str) -> None:
    """They move, or torch refuses to move them, as without a guard; the layer's own stay, and nobody says a word."""
    net, twin = make_net(kind), expected(transform, kind, "lent")
    lent, before = buffers_of(net), state_of(net)
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        result = attempt(lambda: TRANSFORMS[transform](lending(net, lent)))
    assert_same_outcome(result, twin.outcome)
    assert_same_bits(lent, twin.lent)
    assert_same_bits(net.state_dict(), before)
    assert block.changes == ()
    assert_clean(net)


@pytest.mark.parametrize("guard", ["raise", "budget-warn"])
@EVERY_CALL
def test_statistics_lent_inside_a_transform(transform: str, kind: str, guard: str) -> None:
    """Copies that are made and lent inside of the function that is transformed: no finding, same results."""
    net = make_net(kind)
    before = state_of(net)
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        result = attempt(lambda: TRANSFORMS[transform](pure(net)))
    assert_same_outcome(result, expected(transform, kind, "pure").outcome)
    assert_same_bits(net.state_dict(), before)
    assert block.changes == ()


@SOME_GUARDS
@EVERY_LAYER
def test_lent_statistics_move_at_each_call(kind: str, guard: str) -> None:
    """However often they are lent, each call moves them once more and spends no budget."""
    net, twin = make_net(kind), make_net(kind)
    lent, lent_twin = buffers_of(net), buffers_of(net)
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        for _ in range(3):
            functional_call(net, lent, (images(),))
    for _ in range(3):
        functional_call(twin, lent_twin, (images(),))
    assert_same_bits(lent, lent_twin)
    assert any(not torch.equal(lent[name], buffer) for name, buffer in net.named_buffers())
    assert block.changes == ()


@EVERY_LAYER
def test_guard_goes_on_after_lent_statistics(kind: str) -> None:
    """A call with lent statistics in between leaves the layer as guarded as before, in both orders."""
    net, twin, lent = make_net(kind), make_net(kind), buffers_of(make_net(kind))
    before = state_of(net)
    with bnguard.frozen(net, "restore"):
        for _ in range(2):
            assert_same_bits(net(images()), pure(twin)(images()))
            functional_call(net, lent, (images(),))
    assert_same_bits(net.state_dict(), before)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        functional_call(net, lent, (images(),))
        net(images())
    assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize("guard", ["raise", "warn", "restore", "running"])
@EVERY_LAYER
def test_some_statistics_lent_and_some_not(kind: str, guard: str) -> None:
    """What is not lent moves as without a guard, and the end of the block sees it."""
    net, twin = make_net(kind), make_net(kind)
    before = state_of(net)
    lent = {name: buffer for name, buffer in buffers_of(net).items() if name.endswith("running_mean")}
    lent_twin = values(lent)
    ends_in_error = guard in ("raise", "running")
    with (
        pytest.raises(bnguard.StatsChangedError) if ends_in_error else warns(),
        bnguard.frozen(net, **GUARDS[guard]) as block,
    ):
        output = functional_call(net, lent, (images(),))
    assert_same_bits(output, functional_call(twin, lent_twin, (images(),)))
    assert_same_bits(lent, lent_twin)
    assert_same_bits(net.state_dict(), twin.state_dict() if guard == "warn" else before)
    assert [change.names for change in block.changes] == [("1.0.1",)]


def lend_under_one_name(net: nn.Module, tied: bool) -> Any:
    """Statistics for one of the two names of a shared layer: what came of it, and what was lent."""
    lent = {f"norm.{name}": buffer for name, buffer in buffers_of(net.norm).items()}
    return attempt(lambda: functional_call(net, lent, (images(),), tie_weights=tied)), lent


@EVERY_GUARD
def test_lent_statistics_of_a_shared_layer(guard: str) -> None:
    """Statistics that are lent under one of its names are the caller's, under either name."""
    net = warmed(SharedNet())
    before = state_of(net)
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        result, lent = lend_under_one_name(net, tied=False)
    other, lent_twin = lend_under_one_name(warmed(SharedNet()), tied=False)
    assert_same_outcome(result, other)
    assert_same_bits(lent, lent_twin)
    assert_same_bits(net.state_dict(), before)
    assert block.changes == ()


@EVERY_GUARD
def test_statistics_that_functional_call_forgets_to_take_back(guard: str) -> None:
    """With ``tie_weights`` torch leaves a shared layer with what it was lent: its own return, and it is reported."""
    net, twin = warmed(SharedNet()), warmed(SharedNet())
    objects, before = statistics(net), values(statistics(net))
    with (
        warns() if "on_change" in GUARDS[guard] else pytest.raises(bnguard.StatsChangedError),
        bnguard.frozen(net, **GUARDS[guard]),
    ):
        result, lent = lend_under_one_name(net, tied=True)
    other, lent_twin = lend_under_one_name(twin, tied=True)
    assert twin.norm.running_mean is lent_twin["norm.running_mean"]
    assert_same_outcome(result, other)
    assert_same_bits(lent, lent_twin)
    if GUARDS[guard].get("on_change") == "warn":
        assert_same_bits(net.state_dict(), twin.state_dict())
    else:
        assert_same_bits(statistics(net), before)
        assert all(tensor is objects[name] for name, tensor in statistics(net).items())


@EVERY_GUARD
@pytest.mark.parametrize("wrong", [{}, {"nonsense": torch.zeros(2)}, {"1.0.1.running_mean": torch.zeros(7)}])
def test_errors_of_functional_call_are_torchs(guard: str, wrong: dict[str, Tensor]) -> None:
    """With ``strict``, or statistics of another shape, torch's own error comes out, and nothing has moved."""
    net, twin = make_net("BatchNorm"), make_net("BatchNorm")
    before, strict = state_of(net), "1.0.1.running_mean" not in wrong
    lent = wrong if strict else {**buffers_of(net), **wrong}
    with bnguard.frozen(net, **GUARDS[guard]) as block:
        result = attempt(lambda: functional_call(net, dict(lent), (images(),), strict=strict))
    expected = attempt(lambda: functional_call(twin, values(lent), (images(),), strict=strict))
    assert isinstance(expected, tuple)
    assert result == expected
    assert_same_bits(net.state_dict(), before)
    assert block.changes == ()


# Buffers of the model's own.


@pytest.mark.parametrize(("transform", "kind"), CASES + LINEARIZE)
def test_transform_under_warn(transform: str, kind: str) -> None:
    """Results, errors and statistics are those of the unguarded model; a change is reported."""
    net, twin = make_net(kind), expected(transform, kind, "own")
    before = state_of(net)
    with warnings.catch_warnings(record=True) as caught, bnguard.frozen(net, "warn") as block:
        warnings.simplefilter("always")
        result = attempt(lambda: TRANSFORMS[transform](on_its_own(net)))
    assert_same_outcome(result, twin.outcome)
    assert_same_bits(net.state_dict(), twin.state)
    if moved(before, twin.state):
        assert [change.names for change in block.changes] == [("1.0.1",)]
        assert sum(warning.category is bnguard.BNGuardWarning for warning in caught) == 1


@EVERY_CASE
def test_transform_under_raise(transform: str, kind: str) -> None:
    """What would update raises, unless torch refuses it first, in its own words; the statistics are those of entry."""
    net, twin = make_net(kind), expected(transform, kind, "own")
    before, end = state_of(net), None
    try:
        with bnguard.frozen(net):
            result = attempt(lambda: TRANSFORMS[transform](on_its_own(net)))
    except bnguard.StatsChangedError as error:
        end = error
    if isinstance(twin.outcome, list):
        assert end is not None
        assert result[0] is bnguard.StatsChangedError
    elif end is None:
        assert result == twin.outcome
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


@pytest.mark.parametrize(("transform", "kind"), CALLS + LINEARIZE)
def test_transform_under_restore(transform: str, kind: str) -> None:
    """The model is a function without side effects: same results and errors as with fresh copies of its buffers."""
    net, twin = make_net(kind), without_side_effects(transform, kind)
    before = state_of(net)
    with bnguard.frozen(net, "restore") as block:
        result = attempt(lambda: TRANSFORMS[transform](on_its_own(net)))
    assert_same_outcome(result, twin.outcome)
    assert_same_bits(net.state_dict(), before)
    assert block.changes == ()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["BatchNorm", "SyncBatchNorm", "subclass"])
def test_vmap_under_restore_normalises_each_example(kind: str, depth: int) -> None:
    """Which torch refuses without a guard: outputs and gradients of a twin that tracks nothing, and of a loop."""
    net, twin = make_net(kind), make_net(kind)
    torch.func.replace_all_batch_norm_modules_(twin)
    before, examples = state_of(net), torch.stack([small() + number for number in range(4)])
    results = []
    for model in (net, twin):
        call, input = model, examples.clone().requires_grad_()
        for _ in range(depth):
            call = torch.func.vmap(call)
        with bnguard.frozen(net, "restore") if model is net else nullcontext():
            output = call(input.unflatten(0, (2, 2)) if depth == 2 else input).reshape(examples.shape)
            output.square().sum().backward()
        results.append([output.detach(), input.grad, *[p.grad for p in model.parameters()]])
    assert_same_bits(*results)
    assert torch.allclose(results[0][0], torch.stack([twin(example) for example in examples]), atol=1e-6)
    assert_same_bits(net.state_dict(), before)
    with pytest.raises(RuntimeError, match="batched tensor"):
        torch.func.vmap(net)(examples)


@pytest.mark.parametrize("kind", ["BatchNorm", "own-forward"])
def test_error_under_vmap_is_torchs(kind: str) -> None:
    """A batch that torch refuses is refused in its words, with a guard that holds as with copies for each example."""
    net, twin, wrong = make_net(kind), make_net(kind), torch.zeros(2, 3, 5, 2, 2)
    with bnguard.frozen(net, "restore"):
        result = attempt(lambda: torch.func.vmap(net[1])(wrong))
    assert isinstance(result, tuple)
    assert result == attempt(lambda: torch.func.vmap(per_example(twin[1]))(wrong))


@EVERY_CALL
def test_transform_under_use_running_stats(transform: str, kind: str) -> None:
    """Same results as in eval mode."""
    net, twin = make_net(kind), expected(transform, kind, "eval")
    before = state_of(net)
    with bnguard.frozen(net, use_running_stats=True):
        result = attempt(lambda: TRANSFORMS[transform](on_its_own(net)))
    assert_same_outcome(result, twin.outcome)
    assert_same_bits(net.state_dict(), before)


@EVERY_CALL
def test_transform_within_the_budget(transform: str, kind: str) -> None:
    """No transform updates more than twice: with ``updates=2`` everything is as without a guard, and silent."""
    net, twin = make_net(kind), expected(transform, kind, "own")
    with bnguard.frozen(net, updates=2) as block:
        result = attempt(lambda: TRANSFORMS[transform](on_its_own(net)))
    assert_same_outcome(result, twin.outcome)
    assert_same_bits(net.state_dict(), twin.state)
    assert block.changes == ()


@pytest.mark.parametrize("guard", ["budget", "budget-restore", "budget-warn"])
@EVERY_LAYER
def test_graph_that_updates_is_found(kind: str, guard: str) -> None:
    """What a graph of ``make_fx`` writes is no forward: the budget does not pay for it, and the end finds it."""
    net, twin = make_net(kind), make_net(kind)
    ends_in_error = guard == "budget"
    with (
        pytest.raises(bnguard.StatsChangedError) if ends_in_error else warns(),
        bnguard.frozen(net, **GUARDS[guard]),
    ):
        graph = make_fx(on_its_own(net))(images())
        traced = make_fx(on_its_own(twin))(images())
        after_one = state_of(twin)
        assert_same_bits(graph(images(seed=2)), traced(images(seed=2)))
    assert_same_bits(net.state_dict(), twin.state_dict() if guard == "budget-warn" else after_one)


@SOME_GUARDS
@EVERY_LAYER
def test_traced_graph_has_nothing_of_the_guard(kind: str, guard: str) -> None:
    """A graph of a model in eval mode is the one that the unguarded model gives, node for node."""
    net, twin = make_net(kind).eval(), make_net(kind).eval()
    with bnguard.frozen(net, **GUARDS[guard]):
        graph = make_fx(on_its_own(net))(images())
    assert graph.code == make_fx(on_its_own(twin))(images()).code


@pytest.mark.parametrize("kind", ["BatchNorm", "SyncBatchNorm"])
def test_scratch_of_a_transform_does_not_outlive_it(kind: str) -> None:
    """Tensors of a transform that is over are not kept for forwards that come later."""
    net = make_net(kind)
    _hold._scratch.clear()
    with bnguard.frozen(net, "restore"):
        torch.func.grad(scalar(net))(images())
        assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in _hold._scratch.values())
        assert_same_bits(net(images()), pure(make_net(kind))(images()))


# Guards inside.


@pytest.mark.parametrize(("guard", "mode"), [("raise", "eval"), ("restore", "train"), ("budget", "train")])
@pytest.mark.parametrize("kind", ["BatchNorm", "own-forward"])
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name not in ("make_fx", "linearize")])
def test_block_inside_a_transform(transform: str, kind: str, guard: str, mode: str) -> None:
    """A block that is entered and left inside the function that is transformed changes nothing but what it holds."""
    net = make_net(kind).train(mode == "train")
    before = state_of(net)

    def guarded(input: Tensor) -> Tensor:
        with bnguard.frozen(net, **GUARDS[guard]):
            return net(input)

    twin = expected(transform, kind, {"raise": "eval", "budget": "own"}.get(guard, "pure"))
    if guard == "restore":
        twin = without_side_effects(transform, kind)
    assert_same_outcome(attempt(lambda: TRANSFORMS[transform](guarded)), twin.outcome)
    assert_same_bits(net.state_dict(), twin.state if guard == "budget" else before)


class GuardedInside(nn.Module):
    """A model that guards its own layer in its forward."""

    def __init__(self, kind: str, options: dict[str, Any] | None) -> None:
        super().__init__()
        self.net = make_net(kind)
        self.options = options

    def forward(self, input: Tensor) -> Tensor:
        with nullcontext() if self.options is None else bnguard.frozen(self.net, **self.options):
            return self.net(input)


@SOME_GUARDS
@pytest.mark.parametrize("kind", [name for name in LAYERS if name != "patched"])  # its forward runs one of the models
def test_guard_in_the_forward_of_an_ensemble(kind: str, guard: str) -> None:
    """Stacked models in eval mode whose forward opens a block give what they give without it."""
    results: list[Any] = []
    for options in (GUARDS[guard], None):
        models = [GuardedInside(kind, options).eval() for _ in range(2)]
        member = functools.partial(functional_call, models[0])
        stacked = stack_module_state(models)
        results.append(
            attempt(lambda member=member, stacked=stacked: torch.func.vmap(member, (0, None))(stacked, small()))
        )
    assert isinstance(results[1], list)
    assert_same_outcome(*results)


# Ensembles.


def ensemble(base: nn.Module, models: list[nn.Module]) -> Any:
    """Every model's output on the same batch, its gradients, and the stacked buffers afterwards."""
    parameters, buffers = stack_module_state(models)
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(parameters: Any, buffers: Any, input: Tensor) -> Any:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(base, (parameters, buffers), (input,))
        return output.square().sum(), (output, buffers)

    train = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(0, 0, None), randomness="different")
    torch.manual_seed(11)
    return train(parameters, buffers, images())


@pytest.mark.parametrize("kind", [name for name in LAYERS if name != "patched"])  # a closure cannot be copied
@pytest.mark.parametrize("base", ["guarded", "meta"])
@SOME_GUARDS
def test_ensemble_trains_as_unguarded(kind: str, base: str, guard: str) -> None:
    """Stacked statistics are nobody's layer: they move as without a guard, whatever module carries them."""
    models = [nn.Sequential(make_net(kind), nn.Dropout()) for _ in range(2)]
    with torch.no_grad():
        models[1][0][0].weight.add_(1)
    twins = copy.deepcopy(models)
    before = state_of(models[0])
    with bnguard.frozen(models[0], **GUARDS[guard]) as block:
        carrier = models[0] if base == "guarded" else copy.deepcopy(models[0]).to("meta")
        result = attempt(lambda: ensemble(carrier, models))
    assert_same_outcome(result, attempt(lambda: ensemble(twins[0], twins)))
    assert_same_bits(models[0].state_dict(), before)
    assert block.changes == ()
    assert_clean(models[0])


# replace_all_batch_norm_modules_.


def per_sample_gradients(net: nn.Module) -> Any:
    """The gradient of each image."""

    def loss(parameters: Any, image: Tensor) -> Tensor:
        return functional_call(net, parameters, (image[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters_of(net), images())


@EVERY_GUARD
def test_replaced_before_the_block(guard: str) -> None:
    """A model whose statistics were taken away has nothing to guard, says so, and works as unguarded."""
    net, twin = make_net("BatchNorm"), make_net("BatchNorm")
    for model in (net, twin):
        torch.func.replace_all_batch_norm_modules_(model)
    with warns() as caught, bnguard.frozen(net, **GUARDS[guard]):
        result = attempt(lambda: per_sample_gradients(net))
    assert "nothing to guard" in caught.message
    assert_same_outcome(result, attempt(lambda: per_sample_gradients(twin)))


@EVERY_GUARD
@pytest.mark.parametrize("kind", ["BatchNorm", "SyncBatchNorm", "subclass"])
def test_replaced_inside_the_block(kind: str, guard: str) -> None:
    """Inside, everything is as unguarded; the end finds the statistics gone, and puts them back (not under warn)."""
    net, twin = make_net(kind), make_net(kind)
    objects, before = statistics(net), values(statistics(net))
    with (
        warns() if "on_change" in GUARDS[guard] else pytest.raises(bnguard.StatsChangedError),
        bnguard.frozen(net, **GUARDS[guard]) as block,
    ):
        torch.func.replace_all_batch_norm_modules_(net)
        results = [attempt(lambda: per_sample_gradients(net)), attempt(lambda: net(images()))]
    torch.func.replace_all_batch_norm_modules_(twin)
    for result, expected in zip(
        results, [attempt(lambda: per_sample_gradients(twin)), attempt(lambda: twin(images()))], strict=True
    ):
        assert_same_outcome(result, expected)
    if GUARDS[guard].get("on_change") == "warn":
        assert statistics(net) == {}
    else:
        assert all(tensor is objects[name] for name, tensor in statistics(net).items())
        assert_same_bits(statistics(net), before)
    assert [change.buffers for change in block.changes] == [("running_mean", "running_var", "num_batches_tracked")]
    assert_clean(net)
