"""Read the tensors of a checkpoint file without executing anything in it."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.findings.file_kinds import BINARY, CHECKPOINT, PICKLE, SAFETENSORS, kind_of
from bnguard.layers.kinds import is_statistic

# Keys under which training code keeps the state dict in a checkpoint, in order of precedence.
_KEYS: Final = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "ema",
    "model_ema",
    "state_dict_ema",
)


def load_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Loads ``.pt``, ``.pth``, ``.ckpt`` (with ``weights_only=True``) and ``.safetensors``, onto the CPU.

    Raises:
        ValueError: The file is no checkpoint, is truncated, or holds objects that would have to be unpickled, which
            can run any code.
        ImportError: The file is a ``.safetensors`` file, and that package is not installed.
        OSError: The file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb"):  # a later failure is not about reading
        pass
    if os.path.getsize(name) == 0:
        raise ValueError(f"{name} is empty")
    loaded = _load_safetensors(name) if name.endswith(".safetensors") else _load_torch(name)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{name} holds a {type(loaded).__name__}, no state dict: save model.state_dict()")
    return loaded


def find_state_dict(checkpoint: Mapping[str, Any], key: str | None, source: str) -> Mapping[str, Tensor]:
    """The mapping of names to tensors in a checkpoint.

    Args:
        checkpoint: A state dict, or a mapping that holds one.
        key: The key of the state dict, with dots between nested keys; None tries the usual keys, also nested ones.
        source: What to call the checkpoint in an error.

    Raises:
        ValueError: There is no state dict, or none under ``key``.
    """
    candidates = _usual_places(checkpoint) if key is None else [_under(checkpoint, key, source)]
    found = [_tensors_of(candidate) for candidate in candidates]
    with_statistics = [tensors for tensors in found if any([is_statistic(name.rpartition(".")[2]) for name in tensors])]
    for tensors in (*with_statistics, *found):
        if tensors:
            return tensors
    keys = ", ".join([repr(name) for name in list(checkpoint)[:8]])
    raise ValueError(
        f"{source} holds no state dict that bnguard can find: it has {keys or 'nothing'}; name one with key="
    )


def _usual_places(checkpoint: Mapping[str, Any]) -> list[Any]:
    """The checkpoint, its values under the usual keys, and theirs."""
    places = [checkpoint]
    for parent in (checkpoint, *[checkpoint[name] for name in _KEYS if name in checkpoint]):
        if isinstance(parent, Mapping):
            places += [parent[name] for name in _KEYS if name in parent]
    return places


def _tensors_of(candidate: Any) -> dict[str, Tensor]:
    items = candidate.items() if isinstance(candidate, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _under(checkpoint: Mapping[str, Any], key: str, source: str) -> Any:
    """The value under a key of a checkpoint, or under nested keys with dots between them: ``"ema.module"``."""
    value: Any = checkpoint
    for part in [key] if key in checkpoint else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(repr, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(f"{source} has no {key!r}; it has {there or 'nothing'}")
        value = value[part]
    return value


def _load_torch(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: the file is read, or refused below
            return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        is_pickle = kind_of(name) in (CHECKPOINT, PICKLE)
        if is_pickle and any([word in str(error) for word in ("Unsupported", "WeightsUnpickler", "weights_only")]):
            raise ValueError(
                f"{name} holds Python objects, not only tensors: loading them could run any code, and bnguard does "
                "not. Save model.state_dict() instead"
            ) from None
        raise ValueError(_foreign(name)) from error
    except Exception as error:  # a broken file can raise anything
        raise ValueError(_foreign(name)) from error


def _load_safetensors(name: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{name} needs safetensors: pip install 'bnguard[safetensors]'") from None
    try:
        return load_file(name)
    except SafetensorError as error:
        raise ValueError(_foreign(name)) from error


def _foreign(name: str) -> str:
    kind = kind_of(name)
    if kind == CHECKPOINT:
        return f"{name} is {kind} that cannot be read: it is damaged, or of a newer torch"
    if kind == SAFETENSORS and not name.endswith(".safetensors"):
        return f"{name} is {kind}: its name must end in .safetensors"
    if kind in (BINARY, PICKLE):
        return f"{name} is no checkpoint, or it is truncated"
    return f"{name} is {kind}: expected a checkpoint that torch.save() or safetensors has written"
