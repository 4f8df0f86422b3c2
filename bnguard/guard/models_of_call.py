"""Find the models that a call of a decorated function is about."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, Final, TypeAlias

from torch import nn

from bnguard.layers.search import LARGEST, modules_in, roots_of
from bnguard.layers.tree import any_layer

# The model itself, the name of a parameter, or a callable that is given the arguments of the call; None to look for it.
ModelSource: TypeAlias = nn.Module | str | Callable[..., Any]

_PLACES: Final = "its arguments, self, the attributes of self, and what it reads from its closure and globals"


def models_of_call(
    source: ModelSource | None,
    wrapped: Any,
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    takes_any: bool,
) -> tuple[list[nn.Module], Any, bool]:
    """The models that a call is about.

    Each call looks for them, so this is of few functions.

    Args:
        source: What says which; None to look for them.
        wrapped: The function.
        instance: What it is bound to; None for nothing.
        args: The arguments of the call.
        kwargs: Those given by name.
        takes_any: Whether a model without layers that own running statistics will do.

    Returns:
        Models, none a part of another; ``self``, if it may hold more; whether all were found to have layers.

    Raises:
        TypeError: There is none.
    """
    if source is not None:
        # What passes for a module, as a proxy does, is not called.
        is_module = isinstance(source, nn.Module)
        named = modules_in([source if is_module else _named(source, wrapped, instance, args, kwargs)])
        if not named:
            what = repr(source) if isinstance(source, str) else "the callable"
            raise TypeError(f"strict: model={what} gave no torch.nn.Module at the call of {name_of(wrapped)}()")
        return named if len(named) == 1 else roots_of(named), None, False
    bare: list[nn.Module] = []
    for place in ("arguments", "self", "attributes", "names"):
        if place == "arguments":
            values = [*args, *kwargs.values()]
        elif place == "names":
            values = _values_read_by(wrapped)
        elif instance is None:
            continue
        else:
            values = [instance] if place == "self" else list(getattr(instance, "__dict__", {}).values())
        found = modules_in(values)
        guarded = found if takes_any else list(filter(any_layer, found))
        if guarded:
            holder = instance if place in ("attributes", "names") else None
            return guarded if len(guarded) == 1 else roots_of(guarded), holder, not takes_any
        bare = bare or found
    if not bare:
        raise TypeError(
            f"strict: {name_of(wrapped)}() has no model: looked in {_PLACES}; "
            "say which with strict(model=...), a module, the name of a parameter, or a callable. "
            f"Containers of more than {LARGEST} entries are data, and are not searched."
        )
    return bare[:1], instance, False


def _named(
    source: str | Callable[..., Any], wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if isinstance(source, str):
        name, *path = source.split(".")
        arguments = inspect.signature(wrapped).bind(*args, **kwargs)
        arguments.apply_defaults()
        value = arguments.arguments.get(name, instance)
        for attribute in path:
            value = getattr(value, attribute)
        return value
    return source(*args, **kwargs) if instance is None else source(instance, *args, **kwargs)


def _values_read_by(function: Any) -> list[Any]:
    """What a function reads from its closure and its globals, functions defined inside it included."""
    plain = getattr(function, "__func__", function)
    if hasattr(plain, "__wrapped__"):
        plain = inspect.unwrap(plain)
    if not isinstance(plain, FunctionType):
        return []
    values = []
    for cell in plain.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not yet assigned
            continue
    names = plain.__globals__
    return values + [names[name] for name in _global_names(plain.__code__) if name in names]


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[str, ...]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return tuple(sorted(names.union(inner)))


def name_of(function: Any) -> str:
    """Its qualified name; for a partial or another object that can be called, its type's."""
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name


def check_parameter(function: Any, path: str) -> None:
    """Refuses the name of a model that is none of a parameter.

    Raises:
        ValueError: The function has no such parameter.
    """
    inner = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
    name = path.split(".")[0]
    parameters = inspect.signature(inner).parameters if callable(inner) else {}
    if callable(inner) and name not in parameters:
        raise ValueError(
            f"strict(model={path!r}): {name_of(inner)}() has no parameter {name!r}; "
            f"it has {', '.join(parameters) or 'none'}"
        )
