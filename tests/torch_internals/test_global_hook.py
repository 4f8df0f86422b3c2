"""One hook sees the forwards of all modules, for as many listeners as there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bnguard.torch_internals import global_hook


class Listener(global_hook.Listener):
    """Takes down what it is told."""

    def __init__(self, *, wants_results: bool) -> None:
        self.wants_results = wants_results
        self.heard: list[tuple[Any, ...]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.heard.append(("before", module))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.heard.append(("after", module, output))

    def traced(self, key: int) -> None:
        self.heard.append(("traced", key))


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """One that wants results, and one that does not."""
    both = [Listener(wants_results=True), Listener(wants_results=False)]
    for listener in both:
        global_hook.listen(listener)
    yield both
    for listener in both:
        global_hook.unlisten(listener)
    assert not torch_module._global_forward_hooks


def test_results_are_for_those_who_want_them(listeners: list[Listener]) -> None:
    """Both are told of each forward before it runs, outermost first; one gets what came of it."""
    layer = nn.ReLU()
    net = nn.Sequential(layer)
    output = net(torch.ones(2))
    assert listeners[1].heard == [("before", net), ("before", layer)]
    assert listeners[0].heard[:2] == listeners[1].heard
    assert [(what, module) for what, module, _ in listeners[0].heard[2:]] == [("after", layer), ("after", net)]
    assert all(result is output for _, _, result in listeners[0].heard[2:])


@pytest.mark.parametrize("is_exporting", [False, True])
def test_traced_forwards_are_only_named(
    listeners: list[Listener], is_exporting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a graph is traced, listeners are told which modules are in it; of an exported program nothing."""
    net = nn.ReLU()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(global_hook, "is_exporting", lambda: is_exporting)
    net(torch.ones(2))
    for listener in listeners:
        assert listener.heard == ([] if is_exporting else [("traced", id(net))])
