"""Clones that copy ``__dict__`` inside a block, as meta-learning libraries make them: ordinary modules throughout."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.nets import OwnForward, ReassigningNorm, warmed
from tests.old_torch import needs_guarded_graphs

GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "budget": {"updates": 99},
    "rollback": {"on_change": "rollback"},
}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)
HOLDING = pytest.mark.parametrize("guard", ["restore", "running"])


class CopyingNorm(nn.BatchNorm1d):
    """Makes its copies itself, as a parametrized layer does, and pickles itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyingNorm:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> Any:
        return rebuilt, (self.__dict__,)


def rebuilt(attributes: dict[str, Any]) -> CopyingNorm:
    """A layer with these attributes."""
    layer = CopyingNorm.__new__(CopyingNorm)
    layer.__dict__.update(attributes)
    return layer


NORMS = {"BatchNorm": nn.BatchNorm1d, "own-forward": OwnForward, "reassigning": ReassigningNorm}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)
OF_EVERY_NAME = {**NORMS, "copying": CopyingNorm}


def rows(seed: int = 0) -> Tensor:
    """Sixteen rows of three features."""
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


# Ways to clone. Each is what one library does, without what that does besides.


def sharing(module: nn.Module) -> Any:
    """As learn2learn: weights are cloned, and so part of the graph; buffers are those of the original."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: p if p is None else p.clone() for name, p in module._parameters.items()}
    clone._buffers = module._buffers.copy()
    clone._modules = {name: sharing(child) for name, child in module._modules.items() if child is not None}
    return clone


def owning(module: nn.Module) -> Any:
    """The same, with buffers of its own."""
    clone = sharing(module)
    for part in clone.modules():
        part._buffers = {name: b if b is None else b.clone() for name, b in part._buffers.items()}
    return clone


_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def functional(module: nn.Module) -> Any:
    """As higher: an object of another class, which gets the attributes one by one and runs the forward of its class."""
    cls = type(module)
    clone = type(f"Functional{cls.__name__}", (cls,), {}).__new__(cls)
    nn.Module.__init__(clone)
    for name, value in module.__dict__.items():
        if name not in _TABLES:
            setattr(clone, name, value)
    clone._parameters = {name: p if p is None else p.clone() for name, p in module._parameters.items()}
    clone._buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
    clone._modules = {name: functional(child) for name, child in module._modules.items() if child is not None}
    return clone


CLONES: dict[str, Callable[[nn.Module], Any]] = {"sharing": sharing, "owning": owning, "functional": functional}
WITH_ITS_OWN = pytest.mark.parametrize("clone", [owning, functional], ids=["owning", "functional"])


def shifted(module: nn.Module) -> nn.Module:
    """With weights and statistics unlike those of any other module."""
    with torch.no_grad():
        for part in module.modules():
            part._parameters = {name: p if p is None else p + 1.0 for name, p in part._parameters.items()}
            part._buffers = {name: b if b is None else b + 2 for name, b in part._buffers.items()}
    return module


def make_net(norm: str) -> nn.Sequential:
    """A net with one guarded layer, three levels down."""
    torch.manual_seed(3)
    return warmed(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Sequential(OF_EVERY_NAME[norm](3))), nn.Linear(3, 1)))


# MAML. A task takes a net, adapts a clone of it to some data, and returns the loss of that on other data.

Task = Callable[[nn.Module, Tensor, Tensor], Tensor]


def error(net: nn.Module, input: Tensor) -> Tensor:
    """What a net is to learn."""
    return F.mse_loss(net(input), input.prod(1, keepdim=True).tanh())


def by_hand(clone: Callable[[nn.Module], Any]) -> Task:
    """A step of gradient descent that is part of the graph, with one way to clone."""

    def task(net: nn.Module, support: Tensor, query: Tensor) -> Tensor:
        learner = clone(net)
        places = [(part, name) for part in learner.modules() for name, p in part._parameters.items() if p is not None]
        weights = [part._parameters[name] for part, name in places]
        for (part, name), p, gradient in zip(
            places, weights, torch.autograd.grad(error(learner, support), weights, create_graph=True), strict=True
        ):
            part._parameters[name] = p - 0.1 * gradient
        return error(learner, query)

    return task


def with_learn2learn(net: nn.Module, support: Tensor, query: Tensor) -> Tensor:
    """``MAML.clone`` and ``adapt``."""
    maml = pytest.importorskip("learn2learn.algorithms.maml", exc_type=ImportError)
    learner = maml.MAML(net, lr=0.1).clone()
    learner.adapt(error(learner, support))
    loss: Tensor = error(learner, query)
    return loss


def with_higher(net: nn.Module, support: Tensor, query: Tensor) -> Tensor:
    """``innerloop_ctx``, which gives a functional net and an optimizer that is part of the graph."""
    higher = pytest.importorskip("higher")
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False) as (
        learner,
        optimizer,
    ):
        optimizer.step(error(learner, support))
        return error(learner, query)


TASKS: dict[str, Task] = {
    **{name: by_hand(clone) for name, clone in CLONES.items()},
    "learn2learn": with_learn2learn,
    "higher": with_higher,
}
SHARES = ("sharing", "learn2learn")


def meta_trained(net: nn.Module, task: Task) -> list[Tensor]:
    """Three steps of MAML on two tasks each: the losses, all gradients and the weights that it came to."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        for number in range(2):
            loss = task(net, rows(10 * step + number), rows(100 + 10 * step + number))
            loss.backward()
            seen.append(loss.detach().clone())
        seen += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return [*seen, *[p.detach().clone() for p in net.parameters()]]


@EVERY_NORM
@EVERY_GUARD
@pytest.mark.parametrize("way", TASKS)
def test_maml_is_that_of_the_unguarded_twin(way: str, guard: str, norm: str) -> None:
    """Losses, gradients and weights, bit for bit; statistics that the clones share move as the policy says."""
    net, twin, task = make_net(norm), make_net(norm), TASKS[way]
    before, objects = values_of(net), dict(net.named_buffers())
    is_shared = way in SHARES
    if guard == "running" and is_shared:
        twin.eval()
    expected = meta_trained(twin, task)
    stops = guard == "raise" and is_shared
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as block:
        seen = meta_trained(net, task)
    if stops:
        assert "in train mode inside frozen()" in str(said.error) or "changed inside frozen()" in str(said.error)
    else:
        assert said.error is None
        assert_same_bits(seen, expected)
    moves = guard in ("warn", "budget") and is_shared
    assert_same_bits(values_of(net), values_of(twin) if moves else before)
    assert all(tensor is objects[name] for name, tensor in net.named_buffers()) or norm == "reassigning"
    assert bool(said.warnings) == (guard == "warn" and is_shared)
    assert bool(block.changes) == (guard in ("raise", "warn", "rollback") and is_shared)
    assert_clean(net)


def values_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers by name."""
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


# What is done with a clone that has not run yet.


@pytest.fixture(params=["inside", "after"])
def clone_of(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Makes a clone with values of its own in a block, which is still open or over when the clone is returned."""

    def make(norm: str, guard: str, way: Callable[[nn.Module], Any]) -> nn.Module:
        net = make_net(norm)
        block = bnguard.frozen(net, **GUARDS[guard]).start()
        if request.param == "inside":
            request.addfinalizer(block.stop)
        clone = shifted(way(net))
        if request.param == "after":
            block.stop()
        return clone

    return make


def twin_of(clone: nn.Module, norm: str) -> nn.Module:
    """An ordinary net with the values of a clone."""
    twin = make_net(norm)
    twin.load_state_dict(state_of(clone))
    return twin


def assert_is_twin(module: nn.Module, twin: nn.Module) -> None:
    """Both train and evaluate alike."""
    for training in (True, False):
        assert_same_bits(module.train(training)(rows(5)), twin.train(training)(rows(5)))
    assert_same_bits(module.state_dict(), twin.state_dict())


def through_pickle(module: nn.Module) -> Any:
    """Pickled and loaded."""
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle, owning, sharing], ids=lambda way: way.__name__)
@pytest.mark.parametrize("norm", OF_EVERY_NAME)
@EVERY_GUARD
def test_copy_of_a_clone_has_its_values(clone_of: Any, guard: str, norm: str, make_copy: Callable[..., Any]) -> None:
    """Those of the clone, not of the layer that it was cloned from; it runs by itself, and so does the clone."""
    clone = clone_of(norm, guard, owning)
    twin, other = twin_of(clone, norm), twin_of(clone, norm)
    copied = make_copy(clone)
    assert_is_twin(copied, twin)
    if make_copy is not sharing:
        assert_is_twin(clone, other)


@EVERY_NORM
@EVERY_GUARD
@WITH_ITS_OWN
def test_guard_of_a_clone_holds_the_clone(clone_of: Any, guard: str, norm: str, clone: Callable[..., Any]) -> None:
    """Its weights, its statistics, put back in it: as an ordinary module that never was in another block."""
    learner = clone_of(norm, guard, clone)
    twin, before = twin_of(learner, norm), values_of(learner)
    for options in (GUARDS["restore"], GUARDS["running"], GUARDS["rollback"]):
        with bnguard.frozen(learner, **options):
            assert_same_bits(learner(rows(1)), copy.deepcopy(twin).train("on_change" in options)(rows(1)))
        assert_same_bits(values_of(learner), before)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(learner):
        learner(rows(1))
    assert_same_bits(values_of(learner), before)
    assert_is_twin(learner, twin)


@EVERY_NORM
@EVERY_GUARD
@WITH_ITS_OWN
def test_forward_of_a_clone_that_is_called_directly_runs_the_clone(
    clone_of: Any, guard: str, norm: str, clone: Callable[..., Any]
) -> None:
    """As code that calls ``self.norm.forward(x)`` does."""
    learner = clone_of(norm, guard, clone)
    twin = twin_of(learner, norm)
    if clone is owning:
        layer, other = learner[1][0][0], twin[1][0][0]
        assert_same_bits(layer.forward(rows(1)), other.forward(rows(1)))
    assert_is_twin(learner, twin)


@EVERY_NORM
@EVERY_GUARD
@pytest.mark.parametrize("way", CLONES)
def test_end_of_a_block_leaves_nothing_on_clones(guard: str, norm: str, way: str) -> None:
    """Nor on a dictionary that was copied for later: it gives back the attributes of an unguarded layer."""
    net = make_net(norm)
    layer: Any = net[1][0][0]
    with bnguard.frozen(net), bnguard.frozen(net, **GUARDS[guard]):
        clone, attributes = CLONES[way](net), layer.__dict__.copy()
        again = CLONES[way](clone)
    for module in (clone, again):
        assert_clean(module)
    layer.__dict__.update(attributes)
    assert_clean(net)
    assert_is_twin(net, make_net(norm))


@pytest.mark.parametrize("way", CLONES)
@HOLDING
def test_layer_with_clones_is_held_as_without(guard: str, way: str) -> None:
    """Forwards, direct forwards, copies and programs of the original, while a clone of it waits for its turn."""
    net, twin = make_net("BatchNorm"), make_net("BatchNorm").train(guard == "restore")
    before, layer = state_of(net), net[1][0][0]
    expected = [twin(rows(1)), copy.deepcopy(twin)(rows(1)), twin[1][0][0].forward(rows(1))]

    def copied() -> nn.Module:
        return copy.deepcopy(net)

    with bnguard.frozen(net, **GUARDS[guard]):
        clones = [CLONES[way](net)]
        seen = [net(rows(1)), copied().train(guard == "restore")(rows(1)), (lambda: layer.forward(rows(1)))()]
        with ThreadPoolExecutor(1) as pool:  # on whose stack is no module
            seen.append(pool.submit(layer.forward, rows(1)).result())
        assert_same_bits(net.state_dict(), before)
        assert len(clones) == 1
    assert_same_bits(seen, [*expected, expected[-1]])
    assert_clean(net)


def test_pickle_that_may_be_of_either_is_refused_once() -> None:
    """With both in reach nothing says which one it is: an error, and the next attempt has the right one."""
    net = make_net("BatchNorm")
    with bnguard.frozen(net, "restore"):
        clone = shifted(owning(net))
        with pytest.raises(bnguard.BNGuardError, match="does not tell the clone from\nthe layer"):
            pickle.dumps(clone)
        assert_same_bits(pickle.loads(pickle.dumps(clone)).state_dict(), clone.state_dict())
        assert_same_bits(pickle.loads(pickle.dumps(net)).state_dict(), net.state_dict())


@pytest.mark.parametrize("norm", ["BatchNorm", "own-forward"])
@WITH_ITS_OWN
@HOLDING
@needs_guarded_graphs
def test_clone_that_is_compiled_runs_by_itself(guard: str, norm: str, clone: Callable[..., Any]) -> None:
    """A graph of it is one of its weights, although it is made before the clone has run."""
    torch.compiler.reset()
    net = make_net(norm)
    before = values_of(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        learner = shifted(clone(net))
        twin = twin_of(learner, norm)
        program = torch.compile(learner, backend="eager")
        for seed in range(2):
            assert_same_bits(program(rows(seed)), twin(rows(seed)))
    assert_same_bits(program(rows(3)), twin(rows(3)))
    assert_same_bits(values_of(learner), values_of(twin))
    assert_same_bits(values_of(net), before)


@pytest.mark.parametrize("user", [0, 1], ids=["without-hooks", "with-hooks"])
def test_clone_and_original_are_guarded_side_by_side(user: int) -> None:
    """They share the dictionaries of hooks, and each guard looks after its own layer, in whatever order they end."""
    net = make_net("BatchNorm")
    for part in [net[1][0][0]] * user:
        part.register_forward_hook(lambda *call: None)
    clone = owning(net)
    before = [values_of(net), values_of(clone)]
    for order in (0, 1):
        first, second = bnguard.frozen(net).start(), bnguard.frozen(clone).start()
        for model in (net, clone):
            with pytest.raises(bnguard.StatsChangedError):
                model(rows())
        for guard in (first, second)[:: -1 if order else 1]:
            with pytest.raises(bnguard.StatsChangedError, match="was caught"):
                guard.stop()
        assert_same_bits([values_of(net), values_of(clone)], before)
        assert_clean(net)
        assert_clean(clone)
