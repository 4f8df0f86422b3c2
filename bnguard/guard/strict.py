"""``strict``: ``frozen`` around every call of a function, on the models that it finds there."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from types import CodeType, FunctionType, TracebackType
from typing import Any, Final, TypeVar, overload

from torch import nn

from bnguard.errors import hides_frame
from bnguard.guard.bystanders import bystanders_of
from bnguard.guard.decorate import guard_function
from bnguard.guard.frozen import frozen
from bnguard.guard.options import Check, Frontend, OnChange, Settings, check_settings
from bnguard.guard.phrases import Phrases
from bnguard.guard.policy import POLICIES
from bnguard.layers.search import LARGEST, modules_in, roots_of
from bnguard.layers.select import Selector
from bnguard.layers.tree import any_layer
from bnguard.torch_internals.compile import outside_graphs
from bnguard.words import short_repr

__tracebackhide__ = hides_frame

F = TypeVar("F", bound=Callable[..., Any])
_FRONTEND: Final = Frontend(
    Phrases(
        "@bnguard.strict", "@bnguard.strict(updates={})", "@bnguard.strict({})", (), "bnguard.watch() lists them all"
    )
)
ModelSource = nn.Module | str | Callable[..., Any]


@overload
def strict(function: F, /) -> F: ...


@overload
def strict(
    *,
    model: ModelSource | None = None,
    on_change: OnChange = "raise",
    use_running_stats: bool = False,
    affine: bool = False,
    updates: int = 0,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    buffers: str | Iterable[str] | None = None,
    check: Check = "exit",
) -> Callable[[F], F]: ...


def strict(
    function: Any = None,
    /,
    *,
    model: ModelSource | None = None,
    on_change: OnChange = "raise",
    use_running_stats: bool = False,
    affine: bool = False,
    updates: int = 0,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    buffers: str | Iterable[str] | None = None,
    check: Check = "exit",
) -> Any:
    """Runs each call of a function inside ``frozen``, on the models that the call is about.

    ::

        @bnguard.strict
        def validate(model, loader): ...

        @bnguard.strict(model="teacher", on_change="restore")
        def distill(student, teacher, batch): ...

    Which models: those that ``model`` names; else modules among the arguments (inside lists, tuples, sets and dicts of
    at most 256 entries too); else ``self``; else modules that are attributes of ``self``; else modules that the
    function reads from its closure or its globals. The first of these places that has a model with running statistics
    decides. Layers in objects that ``self`` holds, such as ``self.options.model``, are not guarded; if one moves, a
    warning names it once.

    Works on functions, methods, class and static methods (above or below those decorators), coroutines and generators
    (each resumption is a block). Signature, docstring, name and pickling of the function stay as they are.

    Args:
        function: The function, where the decorator is used without parentheses.
        model: The model itself; the name of a parameter (``"teacher"``, ``"self.encoder"``); or a callable that is
            given the arguments of the call (``self`` first) and returns a model or several.
        on_change: See ``frozen``, as for the options that follow.
        use_running_stats: See ``frozen``.
        affine: See ``frozen``.
        updates: See ``frozen``.
        include: See ``frozen``.
        exclude: See ``frozen``.
        buffers: See ``frozen``.
        check: See ``frozen``: ``"deferred"`` reads at each call what the previous one found, and
            ``frozen(model, check="deferred").check()`` what the last one did.

    Raises:
        TypeError: At decoration: what is decorated is no function, or an option has the wrong type. At the call: no
            model was found.
        ValueError: As ``frozen``; and a ``model`` that is the name of no parameter.
    """
    if isinstance(function, nn.Module):
        raise TypeError("strict decorates functions; to guard a model use frozen(model), or strict(model=model)")
    if isinstance(function, str):
        option = "on_change" if function in POLICIES else "model"
        raise TypeError(f"strict decorates functions, got {function!r}: write @strict({option}={function!r})")
    settings = check_settings(
        on_change, use_running_stats, affine, updates, include, exclude, buffers, check, frontend=_FRONTEND
    )
    if not (model is None or isinstance(model, (nn.Module, str)) or callable(model)):
        raise TypeError(f"model must be a module, the name of a parameter or a callable, got {short_repr(model)}")

    def decorate(function: Any) -> Any:
        if isinstance(model, str):
            _check_parameter(function, model)

        @outside_graphs
        def opener(
            wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Callable[[], AbstractContextManager[Any]]:
            models, holder, has_layers = _models(model, settings, wrapped, instance, args, kwargs)
            # Models with layers, which have been looked for: a choice among them is what is left to check.
            is_checked = has_layers and not (settings.include or settings.exclude or settings.buffers)
            make_guard = frozen._of if is_checked else frozen._with
            if holder is None and len(models) == 1:
                return functools.partial(make_guard, models[0], settings)
            return functools.partial(_AllFrozen, models, settings, holder, make_guard)

        return guard_function(function, opener, "strict")

    return decorate if function is None else decorate(function)


class _AllFrozen:
    """One block around several models, or with an eye on what else an object holds.

    Args:
        models: The models.
        settings: The options.
        holder: An object, among whose attributes further layers are looked for; None for no such object.
        make_guard: Makes the guard of a model.
    """

    @outside_graphs
    def __init__(
        self,
        models: list[nn.Module],
        settings: Settings,
        holder: Any,
        make_guard: Callable[[nn.Module, Settings], frozen],
    ) -> None:
        self._models = models
        self._holder = holder
        self._guards = [make_guard(model, settings) for model in models]

    @outside_graphs
    def __enter__(self) -> None:
        try:
            for guard in self._guards:
                guard.__enter__()
            self._bystanders = None if self._holder is None else bystanders_of(self._holder, self._models)
        except BaseException:
            self._abandon()
            raise

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not ExitStack.__exit__, whose frame the error would keep alive.
        failure: BaseException | None = None
        try:
            for guard in reversed(self._guards):
                try:
                    guard.__exit__(kind, failure or error, None)
                except BaseException as found:
                    failure = found
            if failure is not None:
                raise failure
            if error is None and self._bystanders is not None:
                self._bystanders.tell(_FRONTEND.phrases)
            for guard in self._guards:
                guard._hand_on()
        except BaseException:
            self._abandon()
            raise
        finally:
            failure = None  # which knows this frame

    def _abandon(self) -> None:
        """Completes what an interrupt has kept from being done."""
        for guard in reversed(self._guards):
            guard._abandon()


_PLACES: Final = "its arguments, self, the attributes of self, and what it reads from its closure and globals"


def _models(
    source: ModelSource | None,
    settings: Settings,
    wrapped: Any,
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[list[nn.Module], Any, bool]:
    """What a call is about: models, none a part of another; ``self``, if it may hold more; whether all have layers."""
    if source is not None:
        named = modules_in(_named(source, wrapped, instance, args, kwargs))
        if not named:
            what = f"{source!r}" if isinstance(source, str) else "the callable"
            raise TypeError(f"strict: model={what} gave no torch.nn.Module at the call of {_name_of(wrapped)}()")
        return roots_of(named), None, False
    bare: list[nn.Module] = []
    for number, place in enumerate(chain(([*args, *kwargs.values()],), _other_places(wrapped, instance))):
        found = modules_in(place)
        guarded = found if settings.buffers else list(filter(any_layer, found))
        if guarded:
            return (
                guarded if len(guarded) == 1 else roots_of(guarded),
                instance if number > 1 else None,
                not settings.buffers,
            )
        bare = bare or found
    if not bare:
        raise TypeError(
            f"strict: {_name_of(wrapped)}() has no model: looked in {_PLACES}; "
            "say which with strict(model=...), a module, the name of a parameter, or a callable. "
            f"Containers of more than {LARGEST} entries are data, and are not searched."
        )
    return bare[:1], instance, False


def _named(source: ModelSource, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, str):
        name, *path = source.split(".")
        arguments = inspect.signature(wrapped).bind(*args, **kwargs)
        arguments.apply_defaults()
        value = arguments.arguments.get(name, instance)
        for attribute in path:
            value = getattr(value, attribute)
        return value
    return source(*args, **kwargs) if instance is None else source(instance, *args, **kwargs)


def _other_places(wrapped: Any, instance: Any) -> Iterator[Any]:
    """Where to look for models, after the arguments."""
    yield instance
    if instance is not None and not isinstance(instance, type):
        yield list(getattr(instance, "__dict__", {}).values())
    elif isinstance(instance, type):
        yield list(vars(instance).values())
    yield list(_read_by(wrapped))


def _read_by(function: Any) -> Iterator[Any]:
    """What a function reads from its closure and its globals, functions defined inside it included."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(plain, FunctionType):
        return
    for cell in plain.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    for name in _global_names(plain.__code__):
        if name in plain.__globals__:
            yield plain.__globals__[name]


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[str, ...]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return tuple(sorted(names.union(inner)))


def _name_of(function: Any) -> str:
    """Its qualified name; for a partial or another object that can be called, its type's."""
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name


def _check_parameter(function: Any, path: str) -> None:
    inner = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
    name = path.split(".")[0]
    parameters = inspect.signature(inner).parameters if callable(inner) else {}
    if callable(inner) and name not in parameters:
        raise ValueError(
            f"strict(model={path!r}): {_name_of(inner)}() has no parameter {name!r}; "
            f"it has {', '.join(parameters) or 'none'}"
        )
