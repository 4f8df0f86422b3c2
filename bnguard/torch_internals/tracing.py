"""Detect tracing (``torch.jit.trace``, ``make_fx``, ``torch.fx``), and run tensor operations outside of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Final, TypeVar

import torch
from torch import is_grad_enabled, is_inference_mode_enabled
from torch._C import (
    _functorch,
    _get_dispatch_mode,
    _get_function_stack_at,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
    _set_grad_enabled,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _disable_current_modes

from bnguard.torch_internals.compile import is_exporting
from bnguard.torch_internals.functional_call import is_below

F = TypeVar("F", bound=Callable[..., Any])

# linearize() uses make_fx, but only to differentiate this one call of the guarded model: no program is left over.
_LINEARIZE: Final = torch.func.linearize.__code__
_FX_TRACE: Final = _symbolic_trace.Tracer.trace.__code__
_PROXY: Final = torch._C._TorchDispatchModeKey.PROXY
_OWN_MODES: Final = (_PROXY, torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def _flag_of_all_threads() -> bool:
    return bool(_symbolic_trace._is_fx_tracing_flag)


# Whether a function mode, such as a logger, sees the operations of this thread. Not a function of ours: forwards ask.
has_function_mode: Final[Callable[[], int]] = _len_torch_function_stack

# The same for dispatch modes, and what ``torch.jit.trace`` records into.
has_dispatch_mode: Final[Callable[[], int]] = _len_torch_dispatch_stack
tracing_state: Final[Callable[[], Any]] = _get_tracing_state

# Up to torch 2.13 all threads share one flag; from 2.14 on, each thread has its own.
_HAS_FLAGS: Final = not hasattr(_symbolic_trace, "_get_is_fx_tracing") and hasattr(torch.compiler, "_is_exporting_flag")
_is_fx_tracing: Final[Callable[[], bool]] = getattr(_symbolic_trace, "_get_is_fx_tracing", _flag_of_all_threads)


def is_recorded(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward with these arguments is being traced by ``torch.jit.trace``, ``make_fx`` or ``torch.fx``.

    Does not cover ``torch.compile``, whose graphs are only run with the objects they were traced with, and
    ``torch.export``.
    """
    return is_traced() or is_symbolic(args, kwargs)


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` or ``make_fx`` records what is done to tensors."""
    return _get_tracing_state() is not None or (
        _len_torch_dispatch_stack() > 0 and _get_dispatch_mode(_PROXY) is not None and not is_below(_LINEARIZE)
    )


def is_symbolic(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``torch.fx.symbolic_trace`` is running a forward with proxies instead of tensors."""
    is_tracing = _symbolic_trace._is_fx_tracing_flag if _HAS_FLAGS else _is_fx_tracing()
    return is_tracing and any(  # the flag may be shared by all threads
        isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())
    )


def is_calm() -> bool:
    """Whether nobody but autograd would see or change an operation: no mode, no tracer and no transform is around."""
    return (
        _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and not is_inference_mode_enabled()
        and _functorch.peek_interpreter_stack() is None
        and not (
            _symbolic_trace._is_fx_tracing_flag or torch.compiler._is_exporting_flag
            if _HAS_FLAGS
            else _is_fx_tracing() or is_exporting()
        )
    )


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def are_on_cuda(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether any of the tensors is on a GPU. A build without CUDA has fake CUDA tensors, which do not count."""
    return torch.cuda.is_initialized() and any(tensor is not None and tensor.is_cuda for tensor in tensors)


def is_being_recorded() -> bool:
    """Whether code outside of any forward is being traced, including by ``torch.export``."""
    if is_exporting() or is_traced():
        return True
    return _is_fx_tracing() and not is_below(_LINEARIZE) and is_below(_FX_TRACE)


def outside_modes(function: F) -> F:
    """Makes ``function`` run without autograd, and outside of every mode in which the user's code runs.

    These modes are inference mode, tracing, dispatch modes (``FakeTensorMode``, ``make_fx``, a logger), function modes
    (``torch.device``, a logger) and transforms of ``torch.func``. They do not record the operations inside, and tensors
    created inside are ordinary tensors.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        grad, undo = is_grad_enabled(), None
        try:  # no context manager: see rule 2 of Note [Ctrl-C]
            trace = _get_tracing_state()
            if (
                trace is not None
                or _len_torch_dispatch_stack()
                or _len_torch_function_stack()
                or is_inference_mode_enabled()
                or _functorch.peek_interpreter_stack() is not None
            ):
                undo = _disable_modes(trace)
            _set_grad_enabled(False)  # noqa: FBT003  # takes no keyword
            return function(*args, **kwargs)
        finally:
            try:
                try:
                    _set_grad_enabled(grad)
                except BaseException:
                    _set_grad_enabled(grad)
                    raise
            finally:
                if undo is not None:
                    undo.close()

    return outside  # type: ignore[return-value]  # of the same signature


def without_autograd(function: F) -> F:
    """Makes ``function`` run without autograd and outside of modes, but for those that change what a tensor is.

    What it makes is fake under ``FakeTensorMode``, traced by ``make_fx``, and batched under ``vmap``. A logger does not
    see it.
    """

    @functools.wraps(function)
    def without(*args: Any) -> Any:
        grad, functions = is_grad_enabled(), _function_modes()
        try:
            _pop(functions)
            with (
                torch.inference_mode(mode=False) if is_inference_mode_enabled() else nullcontext(),
                _disable_current_modes() if _len_torch_dispatch_stack() and not _changes_tensors() else nullcontext(),
            ):
                _set_grad_enabled(False)  # noqa: FBT003  # takes no keyword
                return function(*args)
        finally:
            try:
                try:
                    _set_grad_enabled(grad)
                except BaseException:
                    _set_grad_enabled(grad)
                    raise
            finally:
                _push(functions)

    return without  # type: ignore[return-value]  # of the same signature


def unseen(function: F) -> F:
    """Makes ``function`` run outside of function modes, which see each attribute of a tensor that is read."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        functions = _function_modes()
        if not functions:
            return function(*args, **kwargs)
        try:
            _pop(functions)
            return function(*args, **kwargs)
        finally:
            _push(functions)

    return outside  # type: ignore[return-value]  # of the same signature


def _changes_tensors() -> bool:
    """Whether one of torch's own dispatch modes is on, for which each tensor must be made inside it."""
    return any([_get_dispatch_mode(key) is not None for key in _OWN_MODES])


def _function_modes() -> Sequence[Any]:
    """The function modes of this thread, the outermost first."""
    number = _len_torch_function_stack()
    return [_get_function_stack_at(place) for place in range(number)] if number else ()


def _pop(modes: Sequence[Any]) -> None:
    for _ in modes:
        _pop_torch_function_stack()


def _push(modes: Sequence[Any]) -> None:
    """Puts those back that are missing. May be done again."""
    for mode in modes[_len_torch_function_stack() :]:
        _push_on_torch_function_stack(mode)


def _disable_modes(trace: Any) -> ExitStack:
    with ExitStack() as undo:
        functions = _function_modes()
        undo.callback(_push, functions)
        _pop(functions)
        undo.enter_context(torch.inference_mode(mode=False))
        if trace is not None:
            set_trace = torch._C._set_tracing_state  # type: ignore[attr-defined]  # missing in the stub
            undo.callback(set_trace, trace)
            set_trace(None)
        undo.enter_context(_disable_current_modes())
        undo.enter_context(temporarily_clear_interpreter_stack())
        return undo.pop_all()
