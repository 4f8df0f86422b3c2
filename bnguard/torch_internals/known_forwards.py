"""Recognise the forwards of torch's own layers, and of some that only read their buffers, by their syntax trees."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Final

# What bnguard predicts about torch's own layers is derived from the source of these functions. If a release of torch
# has another tree, its layers are treated as layers with a forward of their own, which is slower and just as safe.
# To add a tree, read what has changed in it.
_KNOWN: Final = frozenset(
    {
        "20dfafe31cecb686",  # _BatchNorm.forward, torch 2.4 to 2.15
        "ae9efd6aeb168fbb",  # SyncBatchNorm.forward, torch 2.4 to 2.6
        "4b9236714668dc61",  # torch 2.7 to 2.9: for XPU too
        "32fa46050227feb8",  # torch 2.10: for HPU too
        "87b9d607412c83e7",  # torch 2.11 to 2.15: raises AssertionError instead of using assert
        "4132f8696bf9fbbe",  # _InstanceNorm.forward, torch 2.4 to 2.9
        "cd06d533f40149b0",  # torch 2.10 to 2.15: a warning with a stacklevel
        "f37973f71c7d765a",  # _InstanceNorm._apply_instance_norm, torch 2.4 to 2.15
    }
)
# Forwards that compute with the values of their buffers and write to none. Each is copied into many projects.
_ONLY_READ: Final = frozenset(
    {
        "2347e4087e3c483a",  # FrozenBatchNorm2d of torchvision
        "0432443185103486",  # that of DETR
        "d108bd21af62d938",  # DetrFrozenBatchNorm2d of transformers, and its copies for other models
        "955cd3d69363332e",  # FrozenBatchNormAct2d of timm
    }
)
# Without effect on what a function does, or, for ``ctx``, implied by the position.
_LEFT_OUT: Final = {"returns", "annotation", "type_comment", "kind", "ctx"}


@functools.lru_cache(maxsize=64)  # every layer asks
def is_known(function: Callable[..., Any]) -> bool:
    """Whether bnguard has been tested against this source of ``function``, which belongs to torch."""
    return _digest(function) in _KNOWN


def only_reads(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is a forward that is known to write to none of its layer's buffers."""
    return _digest(function) in _ONLY_READ


@functools.lru_cache(maxsize=64)
def _digest(function: Callable[..., Any]) -> str:
    try:
        return digest_of(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):
        return ""


def digest_of(source: str) -> str:
    """A digest of the syntax tree of a function or method, without its docstring, comments and annotations.

    It is the same under every version of Python: ``ast.dump`` is not, and versions add fields that are empty here.
    """
    return hashlib.sha256(repr(_plain(ast.parse(textwrap.dedent(source)).body[0])).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_text(item)]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty strings
        return ["f", *[_plain(part) for part in node.values if getattr(part, "value", None) != ""]]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
    return (type(node).__name__, *[(name, value) for name, value in fields if value not in (None, [])])


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, or another string without effect."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
