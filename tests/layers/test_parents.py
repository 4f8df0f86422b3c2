"""The largest module around a part: by a pass over all objects, and by what was seen to be registered."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from torch import nn
from torch.nn.modules import module as torch_module

from bnguard.layers import parents
from bnguard.layers.parents import Registrations, registered_root


@pytest.fixture
def registrations() -> Iterator[Registrations]:
    """That sees what is registered."""
    seen = Registrations()
    seen.begin()
    yield seen
    seen.end()


@pytest.fixture(params=["pass", "registrations"])
def root_of(request: pytest.FixtureRequest, registrations: Registrations) -> Callable[[nn.Module], nn.Module]:
    """Both ways."""
    return registered_root if request.param == "pass" else registrations.root_of


def test_root(root_of: Callable[[nn.Module], nn.Module]) -> None:
    """The largest module around a part, through several levels, shared parts and a cycle; else the part itself."""
    layer = nn.BatchNorm1d(2)
    assert root_of(layer) is layer
    small, large = nn.Sequential(layer), nn.Sequential(nn.Sequential(layer), nn.ReLU(), nn.ReLU())
    assert root_of(layer) is large
    assert root_of(small) is small
    assert root_of(large[0]) is large
    layer.parent = large  # nonsense, but possible
    assert root_of(layer) is small
    del layer.parent
    assert root_of(layer) is large
    del large[0]
    assert root_of(layer) is small
    del small
    gc.collect()
    assert root_of(layer) is layer


@pytest.mark.parametrize("is_earlier", [True, False])
def test_ways_to_register(is_earlier: bool) -> None:
    """As an attribute, by name, in lists and dictionaries, before and after somebody looks."""
    seen = Registrations()
    if not is_earlier:
        seen.begin()
        seen.root_of(nn.ReLU())
    roots, layers = [nn.Module() for _ in range(4)], [nn.BatchNorm1d(2) for _ in range(5)]
    roots[0].norm = layers[0]
    roots[1].add_module("norm", layers[1])
    roots[2].norms = nn.ModuleList([layers[2]])
    roots[2].norms.append(layers[3])
    roots[3].norms = nn.ModuleDict({"one": layers[4]})
    roots[3].add_module("none", None)
    if is_earlier:
        seen.begin()
    assert list(map(seen.root_of, layers)) == [roots[0], roots[1], roots[2], roots[2], roots[3]]
    seen.end()


def test_copy_counts_as_registered_nowhere(registrations: Registrations) -> None:
    """Nothing says that a part of it is one; only a pass does."""
    registrations.root_of(nn.ReLU())
    copied = copy.deepcopy(nn.Sequential(nn.BatchNorm1d(2)))
    assert registrations.root_of(copied[0]) is copied[0]
    assert registered_root(copied[0]) is copied


def test_one_pass_in_all(registrations: Registrations, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models are asked for."""
    passes = []
    plain = parents._all_modules
    monkeypatch.setattr(parents, "_all_modules", lambda: passes.append(1) or plain())
    for _ in range(5):
        net = nn.Sequential(nn.BatchNorm1d(2))
        assert registrations.root_of(net[0]) is net
    assert len(passes) == 1


def test_nothing_is_kept_alive(registrations: Registrations) -> None:
    """The last reference to a model frees it, and the end leaves no hook."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    registrations.root_of(net[0])
    parts = [weakref.ref(part) for part in net.modules()]
    del net
    assert [part() for part in parts] == [None, None]
    assert torch_module._global_module_registration_hooks
    registrations.end()
    registrations.end()
    assert not torch_module._global_module_registration_hooks
