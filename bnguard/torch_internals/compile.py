"""``torch.compile``: exclude bnguard's own code from graphs, and detect which layers are compiled into a graph."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from torch import nn
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])

_SKIP: Final = eval_frame._FrameAction.SKIP
# Part of torch's error message if fullgraph=True forbids the graph break.
_REASON: Final = "a block of bnguard cannot begin or end inside a graph: open it around the compiled function"


def outside_graphs(function: F) -> F:
    """Makes ``function``, and all that it calls, run as plain Python if a compiled function calls it.

    Works like ``torch.compiler.disable``, which would import the compiler: that takes seconds, and most programs do not
    need it.
    """
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return function


def at_compile_time(function: F) -> F:
    """Makes ``function`` run while a graph that calls it is traced; the graph does not contain the call.

    Works like ``torch.compiler.assume_constant_result``, which would import the compiler. Arguments must be constants.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_compiled: Final[dict[int, weakref.ref[nn.Module]]] = {}


def record_compiled(module: nn.Module) -> None:
    """Records that a layer has been compiled into a graph, which later blocks may run as well."""
    key = id(module)
    if key not in _compiled:
        _compiled[key] = weakref.ref(module, lambda _: _compiled.pop(key, None))


def was_compiled(module: nn.Module) -> bool:
    """Whether a layer has been compiled into a graph while it was guarded or watched."""
    return id(module) in _compiled


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
    """Finds an object by its id, for a function called at compile time, whose arguments must be constants."""
    return next((item for item in gc.get_objects() if id(item) == key), None)
