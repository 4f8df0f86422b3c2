"""Layers that a model runs without having them among its modules are named once, if they move."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.guard import bystanders
from tests.asserts import assert_clean, told


@dataclasses.dataclass(slots=True)
class Slots:
    model: nn.Module


class Holding(nn.Module):
    """Has a layer of its own in eval mode, and runs another one that is in what it holds."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(3).eval()
        layer = nn.BatchNorm1d(3)
        self.held = hold(layer)
        self.run = layer.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.stem(x))


HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "list": (lambda layer: [layer], "held.0"),
    "tuple in dict": (lambda layer: {"norms": (None, layer)}, "held.norms.1"),
    "namespace": (lambda layer: SimpleNamespace(model=layer), "held.model"),
    "list in object": (lambda layer: SimpleNamespace(rate=0.1, parts=[layer]), "held.parts.0"),
    "dataclass": (Slots, "held.model"),
    "model in list": (lambda layer: [nn.Sequential(nn.Linear(3, 3), layer)], "held.0.1"),
}
EVERY_HOLDER = pytest.mark.parametrize(("hold", "name"), HOLDERS.values(), ids=HOLDERS)


def rows() -> Tensor:
    """A batch of four."""
    return torch.randn(4, 3)


@EVERY_HOLDER
def test_layer_outside_of_the_tree_is_named_once(hold: Callable[[nn.Module], Any], name: str) -> None:
    """At the end of the first block in which it moves."""
    net = nn.Sequential(Holding(hold))
    with told() as said:
        for _ in range(2):
            with bnguard.frozen(net):
                net(rows())
    assert said.error is None
    (text,) = said.warnings
    assert text.startswith(f"also moved inside frozen(), not guarded: 0.{name} (BatchNorm1d).\n")
    assert_clean(net)


@EVERY_HOLDER
def test_layer_that_does_not_move_is_not_named(hold: Callable[[nn.Module], Any], name: str) -> None:
    """Not that of a teacher, which is kept in a list so that nobody trains it, and is in eval mode."""
    net = Holding(hold)
    net.run.__self__.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net):
            net(rows())


def test_average_of_the_model_is_not_named() -> None:
    """It moves as the user wants, by copying."""
    net = Holding(lambda layer: [layer])
    net.run = nn.Identity()
    average = net.held[0].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net):
            net(rows())
            average.running_mean.lerp_(torch.ones(3), 0.1)


def test_model_around_the_guarded_part_is_not_named() -> None:
    """A part may know the model that it belongs to; the rest of it trains."""
    net = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3))
    net[0].parents = [net]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net[0]):
            net(rows())
    assert net[1].num_batches_tracked == 1


def test_own_layers_in_a_list_as_well_are_guarded() -> None:
    """Registered, and listed for convenience."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    net.norms = list(net)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(rows())


def test_layer_with_a_guard_of_its_own_is_not_named() -> None:
    """What the user lets move there is known already."""
    net = Holding(lambda layer: [layer])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net.held[0], updates=1), bnguard.frozen(net):
            net(rows())


def test_other_module_with_the_same_statistics_is_not_named() -> None:
    """What stands in for a layer shares its tensors, and the block compares those."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    other = nn.BatchNorm1d(3)
    other.__dict__["_buffers"] = {name: tensor.view_as(tensor) for name, tensor in net[0].named_buffers()}
    net.stand_ins = [other]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net, updates=1):
            net(rows())


class Trainer:
    """Holds a model in its options, where strict does not look."""

    def __init__(self) -> None:
        self.options = SimpleNamespace(model=nn.Sequential(nn.BatchNorm1d(3)), rate=0.1)
        self.head = nn.BatchNorm1d(3).eval()

    @bnguard.strict
    def step(self) -> Tensor:
        return self.head(self.options.model(rows()))

    @bnguard.strict
    def step_of(self, head: nn.Module) -> Tensor:
        return head(self.options.model(rows()))


def test_model_in_an_object_of_self_is_named_by_strict() -> None:
    """The place is that among the attributes of self."""
    trainer = Trainer()
    with told() as said:
        trainer.step()
        trainer.step()
    assert said.error is None
    (text,) = said.warnings
    assert text.startswith("also moved inside @bnguard.strict, not guarded: options.model.0 (BatchNorm1d).\n")


def test_model_that_self_gets_between_two_items_is_named_by_strict() -> None:
    """Each resumption of a generator is a block, which looks at what self has by then."""

    class Epochs:
        def __init__(self) -> None:
            self.options = SimpleNamespace()
            self.head = nn.BatchNorm1d(3).eval()

        @bnguard.strict
        def run(self) -> Iterator[Tensor]:
            yield self.head(rows())
            yield self.loss.net(rows())  # type: ignore[attr-defined]

    epochs = Epochs()
    with told() as said:
        items = epochs.run()
        next(items)
        epochs.loss = SimpleNamespace(net=nn.BatchNorm1d(3))  # type: ignore[attr-defined]
        list(items)
    assert said.error is None
    (text,) = said.warnings
    assert text.startswith("also moved inside @bnguard.strict, not guarded: loss.net (BatchNorm1d).\n")


def test_model_that_was_beside_another_one_is_not_named_once_it_is_guarded() -> None:
    """Two models change their places: what the search of self has found is a model of the call by then."""

    class Averaging:
        def __init__(self) -> None:
            self.model = nn.BatchNorm1d(3)
            self.average = SimpleNamespace(net=nn.BatchNorm1d(3))

        @bnguard.strict(updates=1)
        def step(self) -> None:
            self.model(rows())

    averaging = Averaging()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            averaging.step()
            averaging.model, averaging.average.net = averaging.average.net, averaging.model


class Slotted:
    """Can be held by no weak reference, and has no dictionary of attributes."""

    __slots__ = ()

    @bnguard.strict
    def step(self) -> Tensor:
        return READ_BY_SLOTTED(rows())


READ_BY_SLOTTED = nn.BatchNorm1d(3).eval()


def test_object_with_slots_is_no_hindrance() -> None:
    """What it holds is not looked at."""
    assert Slotted().step().shape == (4, 3)


def test_layer_that_tracks_no_longer_is_not_compared() -> None:
    """It has been found, and has lost its statistics since."""
    net = Holding(lambda layer: [layer])
    with bnguard.frozen(net):
        pass
    layer = net.held[0]
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    layer.track_running_stats = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bnguard.frozen(net):
            net(rows())


def test_strict_with_a_model_among_its_arguments_names_no_other() -> None:
    """The user has said which one is meant: another one may train."""
    trainer = Trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step_of(trainer.head)


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    """Neither the model nor its layer lives on, nor is a new one at the same address taken for it."""
    net = Holding(lambda layer: [layer])
    with told(), bnguard.frozen(net):
        net(rows())
    ids, references = (id(net), id(net.held[0])), (weakref.ref(net), weakref.ref(net.held[0]))
    del net
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert not bystanders._known._entries.keys() & set(ids)
    assert not bystanders._told._entries.keys() & set(ids)


def test_data_is_not_searched() -> None:
    """A long list costs what it costs to measure it."""

    class Counting(list[float]):
        visits = 0

        def __iter__(self) -> Any:
            Counting.visits += 1
            return super().__iter__()

    @bnguard.strict
    def step(model: nn.Module, data: list[float]) -> Tensor:
        return model(rows())

    step(nn.BatchNorm1d(3).eval(), Counting([0.5] * 1000))
    assert Counting.visits == 0
    step(nn.BatchNorm1d(3).eval(), Counting([0.5] * 100))
    assert Counting.visits == 1


def test_error_says_that_data_is_not_searched() -> None:
    """A model in a long list is not found."""

    @bnguard.strict
    def step(models: list[nn.Module]) -> None:
        pass

    with pytest.raises(TypeError, match="Containers of more than 256 entries are data, and are not searched"):
        step([nn.BatchNorm1d(3)] * 300)


def test_sparse_buffer_of_the_model_is_no_hindrance() -> None:
    """It has no memory of its own, by which layers that share statistics are recognised."""
    net = Holding(lambda layer: [layer])
    net.register_buffer("edges", torch.eye(3).to_sparse())
    with told() as said, bnguard.frozen(net):
        net(rows())
    (text,) = said.warnings
    assert text.startswith("also moved inside frozen(), not guarded: held.0 (BatchNorm1d).\n")


class Growing(nn.Module):
    """Runs whatever layers its attributes hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(3).eval()
        self.extra: list[nn.Module] = []
        self.by_name: dict[str, nn.Module] = {}
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (*self.extra, *self.by_name.values(), *self.__dict__.get("later", ())):
            x = layer(x)
        self.losses.append(float(x.sum()))
        return x


ADDITIONS: dict[str, tuple[Callable[[Growing], Any], str]] = {
    "list": (lambda net: net.extra.append(nn.BatchNorm1d(3)), "extra.0"),
    "dict": (lambda net: net.by_name.update(norm=nn.BatchNorm1d(3)), "by_name.norm"),
    "attribute": (lambda net: setattr(net, "later", [nn.BatchNorm1d(3)]), "later.0"),
}


@pytest.mark.parametrize("is_kept", [True, False], ids=["one guard", "new guards"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["in a model", "the model"])
@pytest.mark.parametrize(("add", "name"), ADDITIONS.values(), ids=ADDITIONS)
def test_layer_that_is_added_between_blocks_is_named(
    add: Callable[[Growing], Any], name: str, is_nested: bool, is_kept: bool
) -> None:
    """At the end of the first block after it, whether the guard is used again or another one."""
    holder = Growing()
    net = nn.Sequential(holder, nn.Linear(3, 3)) if is_nested else holder
    guard = bnguard.frozen(net)
    with told() as said:
        for number in range(6):
            with guard if is_kept else bnguard.frozen(net):
                net(rows())
            if number == 3:
                assert not said.warnings
                add(holder)
    (text,) = said.warnings
    assert f"not guarded: {'0.' if is_nested else ''}{name} (BatchNorm1d).\n" in text


def test_model_that_only_collects_data_is_searched_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of losses is no place for layers once it has some."""
    searches: list[Any] = []
    references = bystanders._references
    monkeypatch.setattr(bystanders, "_references", lambda *args: searches.append(args) or references(*args))
    net = Growing()
    for _ in range(20):
        with bnguard.frozen(net):
            net(rows())
    assert len(searches) == 2
    for number in range(40):
        setattr(net, f"result_{number}", number)
        with bnguard.frozen(net):
            net(rows())
    assert len(searches) == 16
