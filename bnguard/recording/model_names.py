"""What to call the models of a process in a report: by the user's variables, else by the lines of their first calls.

Note [The user's variable]
~~~~~~~~~~~~~~~~~~~~~~~~~~
A model is called ``ema`` where its first call is ``ema(images)``. In ``validate(ema)`` the parameter of the function is
a second candidate for a name, and what two models share names neither of them. Names are read from the source of the
calls: up to Python 3.12, reading ``f_locals`` changes the dictionary that the user has got from ``locals()``, and keeps
what he deletes alive.
"""

from __future__ import annotations

import ast
import dis
import functools
import itertools
import linecache
from collections import Counter
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Final, NamedTuple

from torch import nn

from bnguard.layers.tree import unwrapped
from bnguard.torch_internals.callsite import MODULE_CALL, origin_of, place_text

_MOST_CALLS: Final = 8  # of functions around each other that are looked at


class ModelName(NamedTuple):
    """What is known of a model when it is called for the first time.

    Attributes:
        variables: The user's variables for it, the one in the innermost function first.
        type: Its class.
        place: The user's line, ``"train.py:31"``.
    """

    variables: tuple[str, ...]
    type: str
    place: str

    @classmethod
    def at_call(cls, model: nn.Module, frame: FrameType | None) -> ModelName:
        """The name of a model whose call a frame is inside of."""
        while frame is not None and frame.f_code is not MODULE_CALL:
            frame = frame.f_back
        caller = None if frame is None else frame.f_back
        is_direct = caller is not None and origin_of(caller.f_code.co_filename) == "user"
        outer = caller
        while outer is not None and origin_of(outer.f_code.co_filename) != "user":
            outer = outer.f_back
        own = unwrapped(model)
        variables = list(_variables_around(caller)) if caller is not None and is_direct else []
        if outer is not None:
            variables += [name for name, value in list(outer.f_globals.items()) if value is model or value is own]
        place = "" if outer is None else place_text(outer.f_code.co_filename, outer.f_lineno)
        return cls(tuple(dict.fromkeys(variables)), type(own).__name__, place)


def distinct(models: Sequence[ModelName]) -> list[str]:
    """A name for each model: its first variable that no other model shares, else its class, a number and its line."""
    sharing = Counter([name for model in models for name in model.variables])
    numbers: Counter[str] = Counter()
    shown = []
    for model in models:
        own = [name for name in model.variables if sharing[name] == 1]
        if not own:
            numbers[model.type] += 1
            number = "" if numbers[model.type] == 1 else f" {numbers[model.type]}"
            own = [f"{model.type}{number}" + (f" at {model.place}" if model.place else "")]
        shown.append(own[0])
    return shown


def _variables_around(frame: FrameType) -> Iterator[str]:
    """What a frame calls, and, as long as that is a parameter of its function, what its caller passes for it."""
    current, code, wanted = frame, frame.f_code, -1  # -1: what is called
    for _ in range(_MOST_CALLS):
        call = _call_at(current.f_code, current.f_lasti)
        name = None if call is None else _dotted(call.func if wanted < 0 else _argument(call, code, wanted))
        if name is None:
            return
        yield name.removeprefix("self.")
        code = current.f_code
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if name not in parameters or _is_assigned(code, name):
            return
        wanted = parameters.index(name)
        outer = current.f_back
        while outer is not None and origin_of(outer.f_code.co_filename) == "machinery":  # no_grad() around a function
            outer = outer.f_back
        if outer is None or origin_of(outer.f_code.co_filename) != "user":
            return
        current = outer


@functools.lru_cache(maxsize=256)
def _call_at(code: CodeType, offset: int) -> ast.Call | None:
    """The call in the source that an instruction makes; None if it is no call, or there is no source."""
    position = next(itertools.islice(code.co_positions(), offset // 2, None), (None,) * 4)
    first, last, start, end = position
    if first is None or last is None or start is None or end is None:
        return None
    lines = [line.encode() for line in linecache.getlines(code.co_filename)[first - 1 : last]]
    if not lines:
        return None
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    try:
        found = ast.parse(b"(" + b"".join(lines) + b")", mode="eval").body
    except (SyntaxError, ValueError):  # the file has changed since
        return None
    return found if isinstance(found, ast.Call) else None


def _dotted(node: ast.expr | None) -> str | None:
    """``net`` or ``self.net``; None for any other expression."""
    inner = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return ast.unparse(node) if node is not None and isinstance(inner, ast.Name) else None


def _argument(call: ast.Call, code: CodeType, number: int) -> ast.expr | None:
    """What a call passes for a parameter of a function; None if that cannot be told."""
    name = code.co_varnames[number]
    named = [keyword.value for keyword in call.keywords if keyword.arg == name]
    if named:
        return named[0]
    number -= code.co_varnames[0] in ("self", "cls")
    given = call.args[: number + 1]
    return given[number] if len(given) > number and not any([isinstance(one, ast.Starred) for one in given]) else None


@functools.lru_cache(maxsize=256)
def _is_assigned(code: CodeType, name: str) -> bool:
    """Whether a function assigns to one of its parameters."""
    stores = [one.argval for one in dis.get_instructions(code) if one.opname.startswith(("STORE_FAST", "STORE_DEREF"))]
    return any([name == stored or (isinstance(stored, tuple) and name in stored) for stored in stores])
