"""``strict``: ``frozen`` around every call of a function, on the models that it finds there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, TypeAlias, TypeVar, overload

from torch import nn

from bnguard.errors import hides_frame
from bnguard.guard.bystanders import Bystanders, bystanders_of
from bnguard.guard.decorate import guard_function
from bnguard.guard.frozen import frozen
from bnguard.guard.models_of_call import ModelSource, check_parameter, models_of_call
from bnguard.guard.options import Check, Frontend, OnChange, Settings, check_settings
from bnguard.guard.phrases import Phrases
from bnguard.guard.policy import POLICIES
from bnguard.layers.select import Selector
from bnguard.torch_internals.compile import outside_graphs
from bnguard.words import short_repr

__tracebackhide__ = hides_frame

F = TypeVar("F", bound=Callable[..., Any])
_FRONTEND: Final = Frontend(
    Phrases(
        "@bnguard.strict", "@bnguard.strict(updates={})", "@bnguard.strict({})", (), "bnguard.watch() lists them all"
    )
)


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
            check_parameter(function, model)

        takes_any = bool(settings.buffers)
        selects = bool(settings.include or settings.exclude)  # which is to be checked for each model

        @outside_graphs
        def opener(
            wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Callable[[], AbstractContextManager[Any]]:
            models, holder, has_layers = models_of_call(model, wrapped, instance, args, kwargs, takes_any=takes_any)
            make_guard = frozen._of if has_layers and not selects else frozen._with
            if holder is None and len(models) == 1:
                return functools.partial(make_guard, models[0], settings)
            return functools.partial(_guard_of, models, settings, holder, make_guard)

        return guard_function(function, opener, "strict")

    return decorate if function is None else decorate(function)


MakeGuard: TypeAlias = Callable[[nn.Module, Settings], frozen]


@outside_graphs
def _guard_of(
    models: list[nn.Module], settings: Settings, holder: Any, make_guard: MakeGuard
) -> AbstractContextManager[Any]:
    """The guard around one part of a call.

    Args:
        models: The models.
        settings: The options.
        holder: An object, among whose attributes further layers are looked for; None for no such object.
        make_guard: Makes the guard of one model.
    """
    bystanders = None if holder is None else bystanders_of(holder, models)
    if bystanders is None and len(models) == 1:
        return make_guard(models[0], settings)
    return _AllFrozen([make_guard(model, settings) for model in models], bystanders)


class _AllFrozen:
    """One block of several guards, or with an eye on what else an object holds.

    Args:
        guards: The guards.
        bystanders: What else it holds; None for nothing.
    """

    def __init__(self, guards: list[frozen], bystanders: Bystanders | None) -> None:
        self._guards = guards
        self._bystanders = bystanders

    @outside_graphs
    def __enter__(self) -> None:
        try:
            for guard in self._guards:
                guard.__enter__()
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
