"""``torch.compile``: keep it out of what bnguard does around a model, and see which layers a graph has taken in."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from torch import nn
from torch._C._dynamo import eval_frame

__all__ = ["at_compile_time", "compiled_parts", "is_taken_in", "object_at", "outside_graphs", "take_in"]

F = TypeVar("F", bound=Callable[..., Any])

_SKIP: Final = eval_frame._FrameAction.SKIP
# torch prints it where fullgraph=True forbids the graph break.
_REASON: Final = "a block of bnguard cannot begin or end inside a graph: open it around the compiled function"


def outside_graphs(function: F) -> F:
    """Has ``function``, and all that it calls, run as plain Python where a compiled function calls it.

    As ``torch.compiler.disable``, but that imports the compiler, which takes seconds, and most programs never need it.
    """
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return function


def at_compile_time(function: F) -> F:
    """Has ``function`` run while a graph that calls it is traced, and leave nothing in the graph.

    As ``torch.compiler.assume_constant_result``, which imports the compiler. Arguments must be constants.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_taken_in: Final[dict[int, weakref.ref[nn.Module]]] = {}


def take_in(module: nn.Module) -> None:
    """Notes that a graph has been traced through a layer. The graph may serve many blocks."""
    key = id(module)
    if key not in _taken_in:
        _taken_in[key] = weakref.ref(module, lambda _: _taken_in.pop(key, None))


def is_taken_in(module: nn.Module) -> bool:
    """Whether a graph has been traced through a layer while a guard was around it."""
    return id(module) in _taken_in


def compiled_parts(model: nn.Module) -> set[int]:
    """The ids of the modules in ``model`` that ``torch.compile(module)`` or ``module.compile()`` covers."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return set()
    return {
        id(part)
        for module in model.modules()
        if isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for part in module.modules()
    }


def object_at(key: int) -> Any:
    """The object of this id: a graph is traced with constants, and no object is one."""
    return next((item for item in gc.get_objects() if id(item) == key), None)
