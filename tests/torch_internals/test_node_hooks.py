"""Hooks on nodes of the graph: when they are called, and what they leave alone."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bnguard.torch_internals.node_hooks import NodeHooks, goes_through


class Logger(TorchFunctionMode):
    """Sees what is done to tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def hooked(hooks=None):
    """The result of a layer, the layer, and a list that grows with each backward pass that reaches the result."""
    layer, calls = nn.BatchNorm1d(3), []
    result = layer(torch.randn(4, 3))
    (hooks or NodeHooks()).add(result.grad_fn, lambda _: calls.append(goes_through()))
    return result, layer, calls


def test_hook_is_called_at_each_pass():
    """Also at the second pass through a graph that is kept; gradients are those without a hook."""
    result, layer, calls = hooked()
    result.square().sum().backward(retain_graph=True)
    assert calls == [True]
    assert torch.equal(layer.bias.grad, 2 * result.sum(0))
    result.square().sum().backward()
    assert calls == [True, True]


def test_hooks_of_several_nodes_are_kept_apart():
    """The same object has registered them."""
    hooks = NodeHooks()
    (one, _, of_one), (other, _, of_other) = hooked(hooks), hooked(hooks)
    other.sum().backward()
    assert (of_one, of_other) == ([], [True])
    one.sum().backward()
    assert (of_one, of_other) == ([True], [True])


@pytest.mark.parametrize("beyond", [False, True])
def test_pass_that_ends_at_the_result_is_told(beyond):
    """The gradient of the result alone does not go through the node; with that of a parameter it does."""
    result, layer, calls = hooked()
    torch.autograd.grad(result.square().sum(), [result, layer.weight] if beyond else [result])
    assert calls == [beyond]


def test_pass_through_another_result_of_the_node():
    """The gradient of the first one is undefined then."""
    one, other = torch.randn(4, requires_grad=True).chunk(2)
    calls = []
    NodeHooks().add(one.grad_fn, calls.append)
    other.sum().backward()
    assert len(calls) == 1


def test_function_mode_sees_nothing_of_the_hook():
    """It would see each attribute of a tensor that is set."""
    hooks = NodeHooks()
    result = nn.BatchNorm1d(3)(torch.randn(4, 3))
    node, calls = result.grad_fn, []
    with Logger() as logger:
        hooks.add(node, calls.append)
    assert logger.seen == []
    result.sum().backward()
    assert len(calls) == 1


def test_graph_is_freed():
    """A hook keeps neither its node nor what that has saved alive."""
    hooks = NodeHooks()
    x = torch.randn(4, 3)
    result = nn.BatchNorm1d(3)(x)
    hooks.add(result.grad_fn, lambda _: None)
    saved = weakref.ref(x)
    gc.disable()
    try:
        del x, result
        assert saved() is None
    finally:
        gc.enable()
