"""``torch.compile``: exclude bnguard's own code from graphs, and detect which layers are compiled into a graph.

Note [Graphs before torch 2.12]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Before torch 2.12 a guard cannot rely on what dynamo traces of it; for example, dynamo takes
``torch.compiler.is_exporting()`` for true in any graph. So nothing of a guard is traced there:

1. The ``forward`` that a guard puts on a layer is one that dynamo does not trace. The graph breaks in front of it, and
   it runs as plain Python, where it raises. Raised while dynamo traces, the error would come out as another one.
2. With ``fullgraph=True`` no graph may break. Torch's own error has our sentence in it, or, before torch 2.7, a note.
3. A graph that was compiled before is traced again once a layer has such a ``forward``. In torch 2.4 it is not, for
   torch's own layers, which a graph calls as they are; so graphs are forgotten when a block begins.
4. Under ``"raise"`` and ``"warn"`` layers have hooks, which earlier graphs do not run. The comparison at the end of the
   block finds what these have changed.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from bnguard.errors import BNGuardError, hides_frame
from bnguard.torch_internals.release import RELEASE

__tracebackhide__ = hides_frame

F = TypeVar("F", bound=Callable[..., Any])

# From the number, not from a feature: it is the sum of many repairs.
GUARDS_GRAPHS: Final = RELEASE >= (2, 12)
GRAPHS_REFUSED: Final = (
    "guards inside torch.compile need torch 2.12 or later; this is {}: open the block around eager code, or upgrade"
).format(torch.__version__.partition("+")[0])

_HAS_STANCES: Final = hasattr(torch.compiler, "set_stance")  # from torch 2.6 on
_HAS_STRATEGIES: Final = hasattr(eval_frame, "_FrameAction")  # from torch 2.7 on
# Part of torch's error message if fullgraph=True forbids the graph break; before torch 2.7 it has no such part.
_REASON: Final = "a block of bnguard cannot begin or end inside a graph: open it around the compiled function"


def outside_graphs(function: F) -> F:
    """Makes ``function``, and all that it calls, run as plain Python if a compiled function calls it.

    Works like ``torch.compiler.disable``, which would import the compiler: that takes seconds, and most programs do not
    need it.
    """
    if not _HAS_STRATEGIES:
        return _outside_graphs_by_wrapper(function)  # type: ignore[no-any-return]
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    outside: F = _disabled(function, _REASON)
    return outside


def run_as_python(function: F) -> F:
    """From torch 2.12 on, keeps dynamo from compiling ``function`` after a graph break; before, no graph gets there."""
    return outside_graphs(function) if GUARDS_GRAPHS else function


def _outside_graphs_by_wrapper(function: Any) -> Any:
    """``outside_graphs`` for a torch that can skip the frame of one function, but not of those that it calls."""

    def outside(*args: Any, **kwargs: Any) -> Any:
        callback = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(callback)

    functools.update_wrapper(outside, function)
    outside._torchdynamo_orig_callable = function  # type: ignore[attr-defined]
    return skip_frame(outside, _REASON)


def skip_frame(function: Any, reason: str = _REASON) -> Any:
    """Makes dynamo run the frame of ``function`` as it is; it may still trace what ``function`` calls."""
    if _HAS_STRATEGIES:
        action = eval_frame._FrameAction
        strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    else:
        eval_frame.skip_code(function.__code__)  # type: ignore[attr-defined]  # removed in torch 2.7
    return _disabled(function, reason)


def _disabled(function: Any, reason: str) -> Any:
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason
    return function


class OutsideGraphs:
    """Base of callable objects around which a graph breaks.

    Dynamo takes a wrapper of wrapt for the function that it wraps, and would trace that one.
    """

    # Its __dict__ would come before that of older wrappers of wrapt, whose objects it does not fit: dynamo asks for it.
    __slots__ = ()

    _torchdynamo_disable = True
    _torchdynamo_disable_msg = _REASON

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the next class. Dynamo gives the reason if it gets here, with a bound method."""
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of the other base

    skip_frame(__call__)


def refused_in_graphs(function: F) -> F:
    """Before torch 2.12, makes a graph break in front of ``function``; ``is_called_by_graph()`` is then true in it."""
    refused: F = function if GUARDS_GRAPHS else skip_frame(function, GRAPHS_REFUSED)
    return refused


@refused_in_graphs
def is_called_by_graph() -> bool:
    """Before torch 2.12: whether compiled code has called the function that asks. Else False."""
    if GUARDS_GRAPHS:
        return False
    callback = eval_frame.set_eval_frame(None)
    eval_frame.set_eval_frame(callback)
    return callback is not None


def forget_graphs() -> None:
    """Makes dynamo trace all functions again at their next call, in a torch where rule 3 of the note asks for it."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not GUARDS_GRAPHS and not getattr(dynamo.config, "inline_inbuilt_nn_modules", False):
        dynamo.reset_code_caches()


def explain_break(error: BaseException) -> None:
    """Before torch 2.7, adds the reason to dynamo's error about a graph that would break in front of a guard."""
    is_break = not _HAS_STRATEGIES and type(error).__module__ == "torch._dynamo.exc"
    if is_break and GRAPHS_REFUSED not in getattr(error, "__notes__", ()):
        error.add_note(GRAPHS_REFUSED)


def _is_exporting_by_flag() -> bool:
    return torch.compiler._is_exporting_flag


def _is_exporting_unless_traced() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _find_is_exporting() -> Callable[[], bool]:
    if GUARDS_GRAPHS:
        return torch.compiler.is_exporting
    # From 2.8 to 2.11 dynamo takes the function for true in every graph, but not the flag; before 2.7 there is neither.
    return _is_exporting_by_flag if hasattr(torch.compiler, "_is_exporting_flag") else _is_exporting_unless_traced


is_exporting: Final = _find_is_exporting()


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


_in_graphs: Final[dict[int, weakref.ref[nn.Module]]] = {}


def record_in_graph(model: nn.Module) -> None:
    """Records that a compiled graph runs a model: no hook will tell."""
    key = id(model)
    _in_graphs[key] = weakref.ref(model, lambda _: _in_graphs.pop(key, None))


def is_in_graphs(key: int) -> bool:
    """Whether the module with this id belongs to a model that has been recorded."""
    return any([id(part) == key for model in models_in_graphs() for part in model.modules()])


def models_in_graphs() -> list[nn.Module]:
    """The models that have been recorded."""
    return [model for reference in list(_in_graphs.values()) if (model := reference()) is not None]


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


def refuse_compiled(model: nn.Module) -> None:
    """Refuses a model with compiled parts in a torch that cannot run them eagerly.

    Raises:
        BNGuardError: It has some, and torch is older than 2.6.
    """
    if not _HAS_STANCES and compiled_parts(model):
        raise BNGuardError(
            "parts of the model are compiled, which takes torch 2.6 or later: pass one that is not compiled"
        )


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Runs a block in which compiled functions and modules run as plain Python. Imports no compiler."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or not _HAS_STANCES:
        yield
        return
    before = dynamo._stance
    try:
        torch.compiler.set_stance("force_eager")
        yield
    finally:
        dynamo._stance = before  # not a call, which Ctrl-C may interrupt in its first line


def has_compiled() -> bool:
    """Whether dynamo has compiled a graph in this process since the last reset."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(utils.counters["stats"])


def object_at(key: int) -> Any:
    """Finds an object by its id, for a function called at compile time, whose arguments must be constants."""
    return next((item for item in gc.get_objects() if id(item) == key), None)
