"""Run a function inside a guard: plain functions, coroutines, generators and asynchronous generators."""

from __future__ import annotations

import inspect
import types
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import wrapt

from bnguard.errors import StatsChangedError, hides_frame
from bnguard.torch_internals.compile import OutsideGraphs, skip_frame

if TYPE_CHECKING:
    _Wrapper: TypeAlias = wrapt.FunctionWrapper[..., Any]
    _BoundWrapper: TypeAlias = wrapt.BoundFunctionWrapper[..., Any]
else:  # no generic classes before wrapt 2
    _Wrapper, _BoundWrapper = wrapt.FunctionWrapper, wrapt.BoundFunctionWrapper

__tracebackhide__ = hides_frame


# Given the function, the instance it is bound to (or None) and its arguments: makes the guard around one part of the
# call.
Opener: TypeAlias = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Callable[[], AbstractContextManager[Any]]]
MakeGuard: TypeAlias = Callable[[], AbstractContextManager[Any]]


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
        run: Callable[..., Any] | None = _run_async_generator
    elif any(map(inspect.iscoroutinefunction, codes)):
        run = _run_coroutine
    elif any(map(inspect.isgeneratorfunction, codes)):
        run = _run_generator
    else:
        run = None

    @skip_frame
    def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        make_guard = opener(wrapped, instance, args, kwargs)
        if run is not None:
            return run(make_guard, wrapped, args, kwargs)
        with make_guard():
            return wrapped(*args, **kwargs)

    return _GuardedFunction(function, wrapper)


class _BoundGuardedFunction(OutsideGraphs, _BoundWrapper):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._self_instance, self.__wrapped__.__name__)


class _GuardedFunction(OutsideGraphs, _Wrapper):
    """A function wrapper that pickles as functions do: by name."""

    __bound_function_wrapper__ = _BoundGuardedFunction

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__qualname__


def _run_generator(
    make_guard: MakeGuard, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    return (yield from _legs(make_guard, function(*args, **kwargs)))


async def _run_coroutine(make_guard: MakeGuard, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await _awaitable_legs(make_guard, function(*args, **kwargs))


async def _run_async_generator(
    make_guard: MakeGuard, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, Any]:
    generator = function(*args, **kwargs)
    step = generator.asend(None)
    while True:
        try:
            item = await _awaitable_legs(make_guard, step)
        except StopAsyncIteration:
            return
        except Exception:
            # A finding at the end of a step leaves the generator open. The first error is the one to raise.
            with suppress(StatsChangedError, RuntimeError):
                await _awaitable_legs(make_guard, generator.aclose())
            raise
        try:
            step = generator.asend((yield item))
        except GeneratorExit:
            await _awaitable_legs(make_guard, generator.aclose())
            raise
        except BaseException as error:
            step = generator.athrow(error)


def _legs(make_guard: MakeGuard, inner: Any) -> Generator[Any, Any, Any]:
    """Drives ``inner`` (``send``, ``throw``, ``close``), each resumption in a block. See PEP 380.

    Args:
        make_guard: Makes the guard around a resumption.
        inner: A generator, or what a coroutine or an asynchronous generator gives.
    """
    resume, value = inner.send, None
    while True:
        is_done, ended = False, None
        try:
            with make_guard():
                try:
                    item = resume(value)
                except StopIteration as stop:
                    # The end of a generator is no error: the block must not see one.
                    is_done, item = True, stop.value
                except StopAsyncIteration as stop:
                    is_done, ended = True, stop
                finally:
                    value = None
        except BaseException:
            with suppress(StatsChangedError), make_guard():
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
            with make_guard():
                inner.close()
            raise
        except BaseException as error:
            resume, value = inner.throw, error


@types.coroutine
def _awaitable_legs(make_guard: MakeGuard, inner: Any) -> Generator[Any, Any, Any]:
    return (yield from _legs(make_guard, inner))
