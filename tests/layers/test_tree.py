"""A guard that is entered again: it looks at the model anew where the model is another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bnguard
from bnguard.layers.tree import Tree, any_layer, find_layers
from tests.asserts import assert_clean, assert_same_bits


class Renamed(nn.Module):
    """A layer whose statistics have names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.ema += 1
        return x


class Other(nn.BatchNorm2d):
    """Another class of the same layout, with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class AllEqual(nn.BatchNorm2d):
    """A layer that says it equals any other."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return True


def make_net() -> nn.Sequential:
    """Layers side by side, in a container, without statistics, and registered later."""
    inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    late = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(nn.BatchNorm2d(3), inner, nn.Identity(), Renamed(), nn.BatchNorm2d(3), late)


def _append(net: nn.Sequential) -> None:
    net.append(nn.BatchNorm2d(3))


def _append_deeper(net: nn.Sequential) -> None:
    net[1].append(nn.BatchNorm2d(3))


def _put_below_a_leaf(net: nn.Sequential) -> None:
    net[2].norm = nn.BatchNorm2d(3)


def _replace(net: nn.Sequential) -> None:
    net[0] = nn.BatchNorm2d(3)


def _replace_by_an_equal(net: nn.Sequential) -> None:
    net[2] = AllEqual(3)


def _rename(net: nn.Sequential) -> None:
    net._modules = {f"layer{key}": child for key, child in net._modules.items()}


def _rename_in_place(net: nn.Sequential) -> None:
    net._modules["9"] = net._modules.pop("4")


def _reorder(net: nn.Sequential) -> None:
    net._modules["0"] = net._modules.pop("0")


def _remove(net: nn.Sequential) -> None:
    del net[0]


def _share(net: nn.Sequential) -> None:
    net.again = net[0]


def _drop_a_buffer(net: nn.Sequential) -> None:
    net[0].num_batches_tracked = None


def _delete_a_buffer(net: nn.Sequential) -> None:
    del net[0].num_batches_tracked


def _add_a_buffer(net: nn.Sequential) -> None:
    net[2].register_buffer("running_mean", torch.zeros(3))


def _change_the_class(net: nn.Sequential) -> None:
    net[0].__class__ = Other


def _put_a_forward_on_the_instance(net: nn.Sequential) -> None:
    forward = net[0].forward
    net[0].forward = lambda x: forward(x) + 1


def _replace_the_buffers(net: nn.Sequential) -> None:
    net[2]._buffers = nn.BatchNorm2d(3)._buffers


def _load_a_state(net: nn.Sequential) -> None:
    net[0].__setstate__(nn.BatchNorm2d(3).__getstate__())


def _begin_to_track(net: nn.Sequential) -> None:
    net[5].running_mean, net[5].running_var, net[5].track_running_stats = torch.zeros(3), torch.ones(3), True


def _begin_to_count(net: nn.Sequential) -> None:
    net[5].num_batches_tracked = torch.tensor(0)


def _register(net: nn.Sequential) -> None:
    bnguard.register_layer(Renamed, ["ema"])


CHANGES: list[Callable[[nn.Sequential], None]] = [
    _append, _append_deeper, _put_below_a_leaf, _replace, _replace_by_an_equal, _rename, _rename_in_place, _reorder,
    _remove, _share, _drop_a_buffer, _delete_a_buffer, _add_a_buffer, _change_the_class,
    _put_a_forward_on_the_instance, _replace_the_buffers, _load_a_state, _register, _begin_to_track, _begin_to_count,
]  # fmt: skip


@pytest.fixture
def _nothing_registered() -> None:
    yield
    bnguard.register_layer(Renamed, ["ema"]).remove()


@pytest.mark.filterwarnings("ignore:also moved")
@pytest.mark.usefixtures("_nothing_registered")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("policy", ["restore", "warn"])
def test_guard_entered_again_looks_at_the_model_of_now(change: Callable[[nn.Sequential], None], policy: str) -> None:
    """Its layers are those of a new guard, and it keeps all of them."""
    net, x = make_net(), torch.randn(4, 3, 2, 2)
    guard = bnguard.frozen(net, policy)
    with guard:
        before = guard.layers
    change(net)
    fresh = bnguard.frozen(net, policy)
    with fresh:
        expected = fresh.layers
    changed = change not in (_put_a_forward_on_the_instance, _replace, _load_a_state)
    assert (expected != before) == changed
    with guard:
        assert guard.layers == expected
        names = {name for layer in guard.layers for name in layer.names}
        kept = {name: tensor.clone() for name, tensor in net.state_dict().items() if name.rpartition(".")[0] in names}
        if policy == "restore":
            net(x)
    for name, tensor in net.state_dict().items():
        if name in kept and "weight" not in name and "bias" not in name:
            assert_same_bits(tensor, kept[name])
    assert_clean(net)


def test_walk_is_kept_while_the_model_is_the_same() -> None:
    """Training changes nothing that a walk looks at."""
    net = make_net()
    tree = Tree(net)
    assert [layer.names for layer in tree.layers] == [("0",), ("1.0",), ("4",)]
    net(torch.randn(4, 3, 2, 2)).sum().backward()
    net.eval()
    net.load_state_dict(make_net().state_dict())
    assert tree.is_current()


def test_any_layer_sees_what_a_walk_finds() -> None:
    """At the root, deep down, below a module that contains itself; and nothing where there is nothing."""
    knot = nn.Sequential(nn.ReLU())
    knot.itself = knot
    for net in (nn.BatchNorm2d(3), nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))), knot, nn.ReLU()):
        assert any_layer(net) == bool(find_layers(net))
    knot.norm = nn.BatchNorm2d(3)
    assert any_layer(knot)
    assert [layer.names for layer in find_layers(knot)] == [("norm",)]
