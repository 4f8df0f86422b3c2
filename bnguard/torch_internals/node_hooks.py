"""Have a function called when a backward pass goes through a node of the graph.

Note [Hooks of a carrier]
~~~~~~~~~~~~~~~~~~~~~~~~~
``node.register_prehook()`` makes a handle and two dictionaries in Python, which takes longer than all else that a watch
does at the forward of a layer. A tensor that gets a gradient function shares its hooks with it, by
``_register_hook_dict``, without any of that. So the hook is put on a tensor that is nothing but its carrier.

Such a hook is also called where a backward pass only asks for the gradient of the result and ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnguard.torch_internals.tracing import has_function_mode, outside_modes


class NodeHooks:
    """Registers hooks on nodes. Keeps none of the nodes alive."""

    __slots__ = ("_carriers",)

    def __init__(self) -> None:
        self._carriers = [_make_carrier()]

    def add(self, node: Any, hook: Callable[[Any], None]) -> None:
        """Has ``hook`` called when a backward pass reaches a node, or at least its result."""
        if has_function_mode():  # which would see what is done to the carrier
            node.register_prehook(hook)
            return
        try:
            carrier = self._carriers.pop()
        except IndexError:  # another thread has it
            carrier = _make_carrier()
        carrier._backward_hooks = {0: hook}
        node._register_hook_dict(carrier)
        self._carriers.append(carrier)


@outside_modes
def _make_carrier() -> Tensor:
    return torch.empty(0)


def goes_through() -> bool:
    """Whether the backward pass that calls a hook will run the node of that, and does not end there."""
    node: Any = torch._C._current_autograd_node()
    return node is None or any([_is_run(following) for following, _ in node.next_functions if following is not None])


def _is_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is asked for
        return True
