"""Copies, pickles and state dicts taken inside a block are those of an unguarded model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import bnguard
from tests.asserts import WITHOUT_BNGUARD, assert_clean, assert_same_bits, outcome, state_of, statistics, values, warns
from tests.nets import OwnForward, ReassigningNorm, conv_net, images, warmed
from tests.policies import POLICIES

ROOT = Path(__file__).parents[2]
GUARDS = {name: options for name, options in POLICIES.items() if name != "affine"}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)


def through_pickle(net: nn.Module) -> Any:
    """Pickled and loaded again."""
    return pickle.loads(pickle.dumps(net))


def through_torch(net: nn.Module) -> Any:
    """Saved whole and loaded again."""
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "save": through_torch,
    "averaged": lambda net: AveragedModel(net).module,
}
EVERY_COPY = pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES.keys())


def make_net() -> nn.Sequential:
    """Stock layers, and some with a forward of their own."""
    return nn.Sequential(
        conv_net().stem, warmed(OwnForward(3)), warmed(ReassigningNorm(3)), warmed(nn.SyncBatchNorm(3))
    )


@EVERY_COPY
@EVERY_GUARD
def test_copy_inside_is_an_unguarded_model(clone: Any, guard: str) -> None:
    """A copy taken inside has nothing of bnguard on it, has the true statistics, and trains as an unguarded twin."""
    net = make_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        other = clone(net)
        assert_clean(other)
        assert_same_bits(other.state_dict(), twin.state_dict())
        assert_same_bits(outcome(other.train(), images()), outcome(twin, images()))
        assert_same_bits(other.state_dict(), twin.state_dict())
    assert_same_bits(outcome(other, images(seed=2)), outcome(twin, images(seed=2)))
    assert_clean(net)


@EVERY_COPY
@EVERY_GUARD
def test_copy_after_the_block_is_an_unguarded_model(clone: Any, guard: str) -> None:
    """So is one taken afterwards."""
    net = make_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        pass
    other = clone(net)
    assert_clean(other)
    assert_same_bits(outcome(other, images()), outcome(twin, images()))
    assert_same_bits(other.state_dict(), twin.state_dict())


@EVERY_COPY
def test_copy_inside_nested_guards_is_an_unguarded_model(clone: Any) -> None:
    """Two guards leave as little on a copy as one."""
    net = make_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"), bnguard.frozen(net[0], use_running_stats=True), bnguard.frozen(net):
        other = clone(net)
    assert_clean(other)
    assert_same_bits(outcome(other, images()), outcome(twin, images()))
    assert_same_bits(other.state_dict(), twin.state_dict())


@EVERY_GUARD
def test_shallow_copy_of_a_layer_has_nothing_on_it(guard: str) -> None:
    """``copy.copy`` of a layer has hooks of its own kind, none of ours; it shares the statistics, as always."""
    net = make_net()
    with bnguard.frozen(net, **GUARDS[guard]):
        others = [copy.copy(layer) for layer in net.modules() if layer._buffers]
        for other in others:
            assert not {"forward", "__getstate__", "_replicate_for_data_parallel"} & other.__dict__.keys()
            assert not other._forward_pre_hooks
    assert all(other._buffers["running_mean"] is not None for other in others)


def test_shallow_copy_that_runs_inside_is_found_at_the_end() -> None:
    """A shallow copy writes the shared statistics unseen: the end of the block undoes it and says so."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2)))
    before = values(statistics(net))
    with warns(), bnguard.frozen(net, "restore"):
        copy.copy(net[0])(images())
    assert_same_bits(statistics(net), before)


def test_copy_keeps_the_users_hooks() -> None:
    """Only what is ours is left out of a copy: the user's hooks are there."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    net[0].register_forward_pre_hook(print)
    with bnguard.frozen(net):
        net[0].register_forward_hook(print)
        other = copy.deepcopy(net)
    assert list(other[0]._forward_pre_hooks.values()) == [print]
    assert list(other[0]._forward_hooks.values()) == [print]


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
@EVERY_GUARD
def test_copy_keeps_the_handles_of_hooks(clone: Any, guard: str) -> None:
    """A handle that the model keeps goes with the copy: it belongs to the copy's hooks, and removes the one there."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    net.handle = net[0].register_forward_pre_hook(print)
    with bnguard.frozen(net, **GUARDS[guard]):
        other = clone(net)
    assert list(other[0]._forward_pre_hooks.values()) == [print]
    other.handle.remove()
    assert not other[0]._forward_pre_hooks
    assert list(net[0]._forward_pre_hooks.values()) == [print]


class Patched:
    """A forward for one instance that can be copied."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return type(self.layer).forward(self.layer, input) + 1


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_torch])
@EVERY_GUARD
def test_copy_keeps_a_forward_on_the_instance(clone: Any, guard: str) -> None:
    """A forward that somebody had put on a layer is on the copy, around the copy, as without a guard."""
    net = warmed(nn.BatchNorm2d(2))
    twin = copy.deepcopy(net)
    net.forward = Patched(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        other = clone(net)
    assert_clean(other)
    assert isinstance(other.__dict__["forward"], Patched)
    assert other.__dict__["forward"].layer is other
    assert_same_bits(other(images()), twin(images()) + 1)
    assert_same_bits(other.state_dict(), twin.state_dict())


class Selective(nn.BatchNorm2d):
    """A layer that decides itself what goes into its copies."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.cache = [1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = []


@EVERY_GUARD
def test_copy_respects_the_layers_own_getstate(guard: str) -> None:
    """A class with a ``__getstate__`` of its own goes on deciding."""
    net = Selective(2)
    with bnguard.frozen(net, **GUARDS[guard]):
        other = copy.deepcopy(net)
    assert other.cache == []
    assert net.cache == [1]
    assert_clean(other)


class SelfCopying(nn.BatchNorm2d):
    """A layer that copies itself in its own way."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfCopying:
        other = SelfCopying(self.num_features)
        other.load_state_dict(self.state_dict())
        return other


def test_copy_respects_the_layers_own_deepcopy() -> None:
    """A class with a ``__deepcopy__`` of its own goes on deciding."""
    net = warmed(SelfCopying(2))
    with bnguard.frozen(net, "restore"):
        other = copy.deepcopy(net)
    assert_clean(other)
    assert_same_bits(other.state_dict(), net.state_dict())


@EVERY_GUARD
def test_state_dict_inside_holds_the_true_statistics(guard: str) -> None:
    """Keys and values are those of the model, and the tensors are its own."""
    net = make_net()
    before = state_of(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        state = net.state_dict()
        assert_same_bits(state, before)
        assert state["0.bn.running_mean"].data_ptr() == net[0].bn.running_mean.data_ptr()


@pytest.mark.parametrize("guard", ["restore", "running"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, OwnForward])
def test_state_dict_in_a_hook_holds_the_true_statistics(guard: str, norm: Any) -> None:
    """In the middle of a held forward, in a user's hook before or after a layer, the statistics are the true ones."""
    net = nn.Sequential(warmed(norm(2)))
    before, seen = state_of(net), []
    with bnguard.frozen(net, **GUARDS[guard]):
        net[0].register_forward_pre_hook(lambda *call: seen.append(state_of(net)))
        net[0].register_forward_hook(lambda *call: seen.append(state_of(net)))
        net(images())
    assert len(seen) == 2
    for state in seen:
        assert_same_bits(state, before)


LOAD = (
    WITHOUT_BNGUARD
    + """
import torch
net = torch.load(sys.argv[1], weights_only=False)
torch.manual_seed(11)
output = net.train()(torch.load(sys.argv[2], weights_only=True))
output.square().sum().backward()
torch.save({"output": output.detach(), **net.state_dict()}, sys.argv[3])
assert not any(name.partition(".")[0] == "bnguard" for name in sys.modules)
"""
)


@pytest.mark.parametrize(
    "guard", ["restore", *[pytest.param(name, marks=pytest.mark.slow) for name in GUARDS if name != "restore"]]
)
def test_saved_model_loads_where_bnguard_is_not_installed(guard: str, tmp_path: Path) -> None:
    """A model saved inside a block loads and trains in a process that cannot import bnguard."""
    net = conv_net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, **GUARDS[guard]):
        torch.save(net, tmp_path / "net.pt")
    torch.save(images(), tmp_path / "images.pt")
    arguments = [str(tmp_path / name) for name in ("net.pt", "images.pt", "result.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    output = outcome(twin, images())["output"]
    assert_same_bits(torch.load(tmp_path / "result.pt", weights_only=True), {"output": output, **twin.state_dict()})


class Odd(nn.BatchNorm2d):
    """Pickles in a way of its own."""

    def __getstate__(self) -> Any:
        return ("channels", self.num_features)

    def __setstate__(self, state: Any) -> None:
        self.__init__(state[1])


class Sparse(Odd):
    """Pickles as a dictionary without any of torch's tables."""

    def __getstate__(self) -> Any:
        return {"channels": self.num_features}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["channels"])


@pytest.mark.parametrize("cls", [Odd, Sparse])
def test_layer_that_pickles_in_a_way_of_its_own(cls: type[nn.BatchNorm2d]) -> None:
    """Its own way is respected, and the copy is an ordinary layer."""
    layer = cls(3)
    with bnguard.frozen(layer, "restore"):
        twin = copy.deepcopy(layer)
    assert twin.num_features == 3
    assert_clean(twin)


def rebuild(cls: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """What the layers below are pickled as."""
    layer = cls.__new__(cls)
    layer.__dict__.update(attributes)
    return layer


class Reducing(OwnForward):
    """Pickles its attributes, whatever is among them."""

    def __reduce__(self) -> Any:
        return rebuild, (type(self), self.__dict__.copy())


class ReducingEx(nn.BatchNorm2d):
    """The same, by the newer method."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (type(self), dict(vars(self)))


class Traceable(nn.Module):
    """Normalises with the batch, without a look at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, input):  # torch cannot pickle an annotation that is a string
        return F.batch_norm(input, self.running_mean, self.running_var, training=True)


def traced_by_fx() -> nn.Module:
    """Its class is made for it alone, and is pickled as source."""
    return torch.fx.symbolic_trace(Traceable())


@EVERY_COPY
@EVERY_GUARD
@pytest.mark.parametrize("make", [lambda: Reducing(2), lambda: ReducingEx(2), traced_by_fx], ids=["old", "new", "fx"])
def test_copy_of_a_layer_that_pickles_its_attributes(make: Callable[[], nn.Module], guard: str, clone: Any) -> None:
    """Nothing of the guard is among them, and the layer itself is guarded as before."""
    layer = warmed(make())
    twin, before = copy.deepcopy(layer), state_of(layer)
    with bnguard.frozen(layer, **GUARDS[guard]):
        other = clone(layer)
        assert_clean(other)
        assert_same_bits(other(images()), twin(images()))
        assert_same_bits(other.state_dict(), twin.state_dict())
    assert_same_bits(state_of(layer), before)
    assert_clean(layer)


def test_copy_under_affine_can_be_trained() -> None:
    """A copy made while weight and bias are held has the flags of entry; parameters that were one are one."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    with bnguard.frozen(net, "restore", affine=True):
        twin, again = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (twin, again):
        assert [parameter.requires_grad for parameter in other.parameters()] == [True, True, False]
        assert other[0].weight is other[1].weight
        assert_same_bits(other.state_dict(), net.state_dict())
        other(torch.randn(4, 2)).sum().backward()
        assert other[0].weight.grad is not None


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Doubles a weight."""
        return weight * 2


USES: dict[str, Callable[[nn.Module], object]] = {
    "runs": lambda net: net(images()),
    "deepcopy": copy.deepcopy,
    "loses its parametrization": lambda net: parametrize.remove_parametrizations(net[0], "weight"),
    "replica": lambda net: net[0]._replicate_for_data_parallel(),
    "pickle": pickle.dumps,
    "script": torch.jit.script,
}


def attempted(use: Callable[[nn.Module], object], net: nn.Module) -> str:
    """Uses a net; returns the error, as some uses of a parametrized layer have one."""
    try:
        use(net)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class CopyingItself(ReducingEx):
    """Makes its copies itself, as its class does once it is parametrized, and pickles itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyingItself:
        return by_attributes(self, memo)


def by_attributes(layer: Any, memo: dict[int, Any]) -> Any:
    """A deep copy as code makes it that asks nobody."""
    copied = memo[id(layer)] = type(layer).__new__(type(layer))
    copied.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return copied


# How a layer is copied: with a memo that is dropped; one that is kept, to look up what became of a layer; by hand.
WAYS: dict[str, Callable[[nn.Module, dict[int, Any]], Any]] = {
    "dropped": lambda layer, memo: copy.deepcopy(layer),
    "kept": copy.deepcopy,
    "by attributes": by_attributes,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@EVERY_GUARD
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, CopyingItself])
@pytest.mark.parametrize("way", WAYS)
def test_copy_of_a_layer_that_is_parametrized_inside(guard: str, use: str, cls: Any, way: str) -> None:
    """Its new class copies it deeply, and asks nobody: the copy works as a module of its own, whatever comes first."""
    net, twin = nn.Sequential(cls(2)).eval(), nn.Sequential(cls(2)).eval()
    memo: dict[int, Any] = {}
    with bnguard.frozen(net, **GUARDS[guard]):
        parametrize.register_parametrization(net[0], "weight", Twice())
        copied = nn.Sequential(WAYS[way](net[0], memo)).eval()
    parametrize.register_parametrization(twin[0], "weight", Twice())
    copied, twin = copied.train(use == "runs"), twin.train(use == "runs")
    assert attempted(USES[use], copied) == attempted(USES[use], twin)
    if use == "loses its parametrization":
        attempted(pickle.dumps, copied)  # a parametrized layer has no pickle
    if use == "replica":
        copy.deepcopy(copied)
    else:
        assert_same_bits(copied.train()(images()), twin.train()(images()))
    copy.deepcopy(copied)
    attempted(pickle.dumps, copied)
    assert_clean(copied)
