"""Decorated functions that compiled code calls: the graph breaks around them, and what they do is still compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.nets import rows, warmed
from tests.old_torch import guards_graphs

# Dynamo looks at gradients after a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Step = Callable[[nn.Module, Tensor], Tensor]
Decorator = Callable[[Any], Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "raise": {},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
}


def as_function(decorate: Decorator, model: nn.Module) -> Step:
    """A function."""

    @decorate
    def part(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * 2

    return part


def as_function_with_a_closure(decorate: Decorator, model: nn.Module) -> Step:
    """A function that reads a tensor from around it."""
    two = torch.tensor(2.0)

    @decorate
    def part(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * two

    return part


def as_method(decorate: Decorator, model: nn.Module) -> Step:
    """A method of an object that is no module."""

    class Trainer:
        @decorate
        def part(self, model: nn.Module, x: Tensor) -> Tensor:
            return model(x) * 2

    return Trainer().part


def as_static_method(decorate: Decorator, model: nn.Module) -> Step:
    """A static method."""

    class Trainer:
        @decorate
        @staticmethod
        def part(model: nn.Module, x: Tensor) -> Tensor:
            return model(x) * 2

    return Trainer.part


def part_of(decorate: Decorator, model: nn.Module) -> nn.Module:
    """A module with a decorated forward."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        @decorate
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * 2

    return Part()


def as_forward(decorate: Decorator, model: nn.Module) -> Step:
    """The forward of a module."""
    part = part_of(decorate, model)
    return lambda _, x: part(x)


def as_forward_of_a_child(decorate: Decorator, model: nn.Module) -> Step:
    """The forward of a module in a container."""
    net = nn.Sequential(part_of(decorate, model), nn.Identity())
    return lambda _, x: net(x)


FORMS = [
    as_function, as_function_with_a_closure, as_method, as_static_method, as_forward, as_forward_of_a_child,
]  # fmt: skip
EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
BY = pytest.mark.parametrize("by", ["strict", "frozen"])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(form: Callable[[Decorator, nn.Module], Step], by: str, options: dict[str, Any]) -> tuple[nn.Module, Step]:
    """A net, and a decorated function that runs it."""
    net = nn.Sequential(warmed(nn.BatchNorm1d(4)))
    decorate = bnguard.strict(**options) if by == "strict" else bnguard.frozen(net, **options)
    return net, form(decorate, net)


@EVERY_FORM
@BY
@EVERY_OPTION
def test_compiled_caller_runs_it_guarded(
    options: dict[str, Any], by: str, form: Callable[[Decorator, nn.Module], Step]
) -> None:
    """As without a compiler: it raises, or gives the same result; and no statistic moves."""
    net, part = make(form, by, options)
    before, x = values(statistics(net)), rows()
    counter = CompileCounter()
    step = torch.compile(lambda x: part(net, x) + 1, backend=counter)
    if not options or not guards_graphs:
        with pytest.raises(bnguard.BNGuardError if guards_graphs else Exception):
            step(x)
    else:
        assert_same_bits(step(x), part(net, x) + 1)
        assert counter.frame_count == 2, "what follows it, and what it does itself"
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_FORM
@BY
@EVERY_OPTION
def test_caller_without_graph_breaks_is_refused(
    options: dict[str, Any], by: str, form: Callable[[Decorator, nn.Module], Step]
) -> None:
    """With ``fullgraph=True`` torch's error has our reason; never does it run without the guard."""
    net, part = make(form, by, options)
    before = values(statistics(net))
    step = torch.compile(lambda x: part(net, x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(
        Exception, match="a block of bnguard cannot begin or end inside a graph" if guards_graphs else None
    ):
        step(rows())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_FORM
@BY
def test_eval_mode_is_compiled_as_it_is(by: str, form: Callable[[Decorator, nn.Module], Step]) -> None:
    """What updates nothing is no mistake, compiled or not."""
    net, part = make(form, by, {})
    net.eval()
    x = rows()
    step = torch.compile(lambda x: part(net, x) + 1, backend="eager")
    assert_same_bits(step(x), net(x) * 2 + 1)
    assert_clean(net)
