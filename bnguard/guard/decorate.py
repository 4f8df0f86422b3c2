"""Run a function inside a guard: plain functions, coroutines, generators and asynchronous generators."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import wrapt

from bnguard.errors import StatsChangedError
from bnguard.guard.agreement import Occasion, Parting
from bnguard.torch_internals.compile import outside_graphs

if TYPE_CHECKING:
    _Wrapper: TypeAlias = wrapt.FunctionWrapper[..., Any]
    _BoundWrapper: TypeAlias = wrapt.BoundFunctionWrapper[..., Any]
else:  # no generic classes before wrapt 2
    _Wrapper, _BoundWrapper = wrapt.FunctionWrapper, wrapt.BoundFunctionWrapper

__all__ = ["Guard", "guard_function"]


class Guard(Protocol):
    """What opens a block, again and again."""

    def _enter(self, occasion: Occasion | None) -> object:
        """Begins a block around a part of a call."""

    def _leave(
        self, error: BaseException | None, parting: Parting = "wait", leaving: BaseException | None = None
    ) -> None:
        """Ends it."""


# Given the instance a function is bound to (or None), and its arguments: what guards one call.
Opener: TypeAlias = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Callable[[], Guard]]


class _Extent:
    """A block around a part of one call. The ranks of a distributed run meet at the end of a call, not of each part.

    Attributes:
        parting: What the ranks make of the end of this one, unless an exception ends it.
    """

    def __init__(self, guard: Guard, occasion: Occasion, parting: Parting, leaving: BaseException | None) -> None:
        self.parting = parting
        self._guard = guard
        self._occasion = occasion
        self._leaving = leaving

    @outside_graphs
    def __enter__(self) -> Self:
        self._guard._enter(self._occasion)
        return self

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        leaving, self._leaving = self._leaving, None  # which knows the frame that knows this
        self._guard._leave(error, self.parting, leaving)


class _Call:
    """One call of a guarded function."""

    def __init__(self, make_guard: Callable[[], Guard], function: str) -> None:
        self._make_guard = make_guard
        self._occasion = Occasion(function)

    def block(self, parting: Parting = "wait", leaving: BaseException | None = None) -> _Extent:
        """A block around a part of it."""
        return _Extent(self._make_guard(), self._occasion, parting, leaving)


def guard_function(function: Any, opener: Opener, decorator: str) -> Any:
    """Wraps ``function`` so that its code runs inside a block.

    A coroutine, a generator and an asynchronous generator are inside only while they run: each resumption is a block of
    its own, and what the caller does in between is in none.

    Args:
        function: A function, method, class method or static method.
        opener: Says which block, once for each call.
        decorator: What to call the decorator in an error.

    Raises:
        TypeError: ``function`` is a class, or cannot be called.
    """
    inner = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
    if isinstance(inner, type) or not callable(inner):
        raise TypeError(f"{decorator} decorates functions, got {inner!r}")
    codes = (inner, type(inner).__call__)  # of a function, or of an object that can be called
    if any(map(inspect.isasyncgenfunction, codes)):
        run: Callable[..., Any] = _run_async_generator
    elif any(map(inspect.iscoroutinefunction, codes)):
        run = _run_coroutine
    elif any(map(inspect.isgeneratorfunction, codes)):
        run = _run_generator
    else:
        run = _run_function

    name = _name_in_all_ranks(inner)

    def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run(_Call(opener(wrapped, instance, args, kwargs), name), wrapped, args, kwargs)

    return _GuardedFunction(function, wrapper)


def _name_in_all_ranks(function: Any) -> str:
    """What tells a function from others in every rank of a distributed run, wherever their code lies."""
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return type(plain).__qualname__
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno} {code.co_qualname}()"


class _BoundGuardedFunction(_BoundWrapper):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._self_instance, self.__wrapped__.__name__)


class _GuardedFunction(_Wrapper):
    """A function wrapper that pickles as functions do: by name."""

    __bound_function_wrapper__ = _BoundGuardedFunction

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__qualname__


def _run_function(call: _Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with call.block():
        return function(*args, **kwargs)


def _run_generator(
    call: _Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    return (yield from _legs(call, function(*args, **kwargs)))


async def _run_coroutine(call: _Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await _awaitable_legs(call, function(*args, **kwargs))


async def _run_async_generator(
    call: _Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, Any]:
    generator = function(*args, **kwargs)
    step = generator.asend(None)
    while True:
        try:
            item = await _awaitable_legs(call, step, "skip")
        except StopAsyncIteration:
            return
        except Exception:
            # A finding at the end of a step leaves the generator open. The first error is the one to tell.
            with suppress(StatsChangedError, RuntimeError):
                await _awaitable_legs(call, generator.aclose(), "skip")
            raise
        try:
            step = generator.asend((yield item))
        except GeneratorExit:
            await _awaitable_legs(call, generator.aclose(), "tell")
            raise
        except BaseException as error:
            step = generator.athrow(error)


def _legs(call: _Call, inner: Any, last: Parting = "wait") -> Generator[Any, Any, Any]:
    """Drives ``inner`` (``send``, ``throw``, ``close``), each resumption in a block. See PEP 380.

    Args:
        call: The call.
        inner: A generator, or what a coroutine or an asynchronous generator gives.
        last: What ranks make of the end of the last one.
    """
    resume, value = inner.send, None
    while True:
        is_done, ended, block = False, None, call.block()
        try:
            with block:
                try:
                    item = resume(value)
                except StopIteration as stop:
                    # The end of a generator is no error: the block must not see one.
                    is_done, item = True, stop.value
                except StopAsyncIteration as stop:
                    is_done, ended, last = True, stop, "wait"
                finally:
                    value = None
                block.parting = last if is_done else "skip"
        except BaseException as error:
            # What was found at the end of a resumption has been kept from the other ranks so far.
            close = call.block("tell", error) if block.parting == "skip" else call.block("skip")
            with suppress(StatsChangedError), close:
                inner.close()
            raise
        if ended is not None:
            try:
                raise ended
            finally:
                ended = None  # which knows this frame
        if is_done:
            return item
        given = [item]
        del item  # nothing is kept while this waits
        try:
            resume, value = inner.send, (yield given.pop())
        except GeneratorExit:
            with call.block("tell"):
                inner.close()
            raise
        except BaseException as error:
            resume, value = inner.throw, error


@types.coroutine
def _awaitable_legs(call: _Call, inner: Any, last: Parting = "wait") -> Generator[Any, Any, Any]:
    return (yield from _legs(call, inner, last))
