"""Read the tensors of a checkpoint file, and execute nothing of it."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.layers.kinds import is_statistic

__all__ = ["find_state_dict", "load_checkpoint"]

# Where training code keeps the state dict in a checkpoint; the first that is there.
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
        ValueError: The file is no checkpoint, is truncated, or holds objects that only unpickling could bring back,
            which could run any code.
        ImportError: A ``.safetensors`` file, and that package is not installed.
        OSError: The file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb"):  # so that what fails later is not about reading
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
        checkpoint: A state dict, or what holds one.
        key: Under which key to look, dots between nested ones; None looks at the usual places, also below each other.
        source: What to call the checkpoint in an error.

    Raises:
        ValueError: There is none, or none under ``key``.
    """
    if key is not None:
        candidates = [_under(checkpoint, key, source)]
    else:
        candidates = [checkpoint]
        for parent in (checkpoint, *[checkpoint[name] for name in _KEYS if name in checkpoint]):
            if isinstance(parent, Mapping):
                candidates += [parent[name] for name in _KEYS if name in parent]
    found = [
        {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
        for candidate in candidates
        if isinstance(candidate, Mapping)
    ]
    with_statistics = [tensors for tensors in found if any([is_statistic(name.rpartition(".")[2]) for name in tensors])]
    for tensors in (*with_statistics, *found):
        if tensors:
            return tensors
    keys = ", ".join([repr(name) for name in list(checkpoint)[:8]])
    raise ValueError(
        f"{source} holds no state dict that bnguard can find: it has {keys or 'nothing'}; name one with key="
    )


def _under(checkpoint: Mapping[str, Any], key: str, source: str) -> Any:
    """What a checkpoint has under a key, or under several with dots between them: ``"ema.module"``."""
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
            warnings.simplefilter("ignore")  # of another protocol of pickle: it is read, or refused below
            return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "WeightsUnpickler" in str(error) or "weights_only" in str(error):
            raise ValueError(
                f"{name} holds Python objects, not only tensors: loading them could run any code, and bnguard does "
                "not. Save model.state_dict() instead"
            ) from None
        raise ValueError(_foreign(name)) from error
    except Exception as error:  # whatever broken bytes make of it
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
    return f"{name} is no checkpoint, or it is truncated"
