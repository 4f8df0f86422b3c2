"""``diff``: what moved between two models, state dicts or checkpoint files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from bnguard.findings.checkpoint_files import find_state_dict, load_checkpoint
from bnguard.findings.soundness import has_broken
from bnguard.layers.bits import has_values, same_bits
from bnguard.layers.drift import Drift, drift_between, eps_of
from bnguard.layers.kinds import is_statistic
from bnguard.layers.tree import find_layers
from bnguard.report.document import as_text
from bnguard.report.documents import diff_document
from bnguard.torch_internals.compile import outside_graphs
from bnguard.torch_internals.tracing import aside

__all__ = ["StatsDiff", "diff"]

Source: TypeAlias = "nn.Module | Mapping[str, Any] | str | os.PathLike[str]"


@dataclass(frozen=True, slots=True, eq=False)
class StatsDiff:
    """What moved between two states of a model.

    Attributes:
        moved: Layers with other statistics, in the order of the later state; how far, for those with a mean and a
            variance of one shape.
        changed: Names of all layers with other statistics.
        unchanged: Names of layers with the same bits.
        missing: Names of layers that only the earlier state has.
        added: Names of layers that only the later state has.
        broken_before: Names of layers with NaN, infinity or a negative variance in the earlier state.
        broken_after: The same in the later state.
    """

    moved: tuple[Drift, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    broken_before: tuple[str, ...]
    broken_after: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs and nothing is broken."""
        return not (self.changed or self.missing or self.added or self.broken_before or self.broken_after)

    def report(self) -> str:
        """All of it, as text: what moved most first."""
        return as_text(diff_document(self))


@dataclass(frozen=True, slots=True)
class _Layer:
    type: str
    eps: float
    statistics: dict[str, Tensor]


_EPS: Final = 1e-5  # torch's own, where only tensors are known


@outside_graphs
@aside()
def diff(before: Source, after: Source, *, key: str | None = None) -> StatsDiff:
    """Compares the running statistics of two models, state dicts or checkpoint files.

    Files are read with ``torch.load(weights_only=True)``, or as safetensors: nothing in them is executed. A state dict
    is found at the top or under ``state_dict``, ``model``, ``ema`` and the like. Names are compared without the
    prefixes of wrappers (``module.``, ``_orig_mod.``); where one state has all names under one more prefix, as
    Lightning's checkpoints have, without that.

    Args:
        before: The earlier state: a model, a state dict, a checkpoint, or the path of a file.
        after: The later one.
        key: Where the state dict is in a checkpoint, ``"ema.module"`` for nested ones; None looks at the usual places.

    Returns:
        What moved, what is missing, and what is broken. For a channel's drift ``eps`` is the layer's own where a model
        is given, else torch's ``1e-5``.

    Raises:
        TypeError: A state is none of those.
        ValueError: A file is no checkpoint, is truncated, or holds objects that would have to be unpickled; no state
            dict is found; or there are no running statistics.
        OSError: A file cannot be read.
        ImportError: A ``.safetensors`` file, and that package is not installed.
    """
    old, new = (_layers_of(state, key, name) for state, name in ((before, "before"), (after, "after")))
    if not old.keys() & new.keys():
        old, new = _aligned(old, new)
    moved, changed, unchanged = [], [], []
    for name, layer in new.items():
        earlier = old.get(name)
        if earlier is None:
            continue
        if _same(earlier.statistics, layer.statistics):
            unchanged.append(name)
            continue
        changed.append(name)
        eps = layer.eps if layer.eps != _EPS else earlier.eps
        drift = drift_between((name,), layer.type or earlier.type, earlier.statistics, layer.statistics, eps)
        if drift is not None:
            moved.append(drift)
    return StatsDiff(
        tuple(moved),
        tuple(changed),
        tuple(unchanged),
        tuple([name for name in old if name not in new]),
        tuple([name for name in new if name not in old]),
        _broken(old),
        _broken(new),
    )


def _layers_of(state: Any, key: str | None, role: str) -> dict[str, _Layer]:
    """The layers with running statistics of one state, by name."""
    if isinstance(state, nn.Module):
        layers = {}
        for layer in find_layers(state):
            module: Any = layer.module
            buffers = dict(module.named_buffers(recurse=False))
            statistics = {name: buffers[name] for name in layer.buffers if name in buffers}
            layers[layer.names[0]] = _Layer(type(module).__name__, eps_of(module, _EPS), statistics)
        source = f"{role}, a {type(state).__name__},"
    else:
        if isinstance(state, (str, os.PathLike)):
            source, checkpoint = str(Path(state)), load_checkpoint(state)
        elif isinstance(state, Mapping):
            source, checkpoint = role, state
        else:
            raise TypeError(
                f"{role} must be a model, a state dict or the path of a checkpoint, got {type(state).__name__}"
            )
        layers = _layers_in(find_state_dict(checkpoint, key, source))
    if not layers:
        raise ValueError(f"{source} has no running statistics")
    return layers


# Nobody calls a submodule of his own so.
_WRAPPED: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL: Final = "module."  # but so: it counts where everything is in it


def _layers_in(state_dict: Mapping[str, Tensor]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in state_dict.items()}
    while plain and all([name.startswith(_PARALLEL) for name in plain]):
        plain = {name.removeprefix(_PARALLEL): tensor for name, tensor in plain.items()}
    for full_name, tensor in plain.items():
        prefix, _, name = full_name.rpartition(".")
        if is_statistic(name):
            layers.setdefault(prefix, _Layer("layer", _EPS, {})).statistics[name] = _dense(tensor)
    return layers


def _dense(tensor: Tensor) -> Tensor:
    """A tensor in a form and a precision that can be computed with."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor


def _aligned(old: dict[str, _Layer], new: dict[str, _Layer]) -> tuple[dict[str, _Layer], dict[str, _Layer]]:
    """The same without the prefix that names of one of them have before those of the other; that of most."""
    best: tuple[int, str, bool] = (0, "", False)
    for one, other, swap in ((old, new, False), (new, old, True)):
        prefixes = {name[: end + 1] for name in one for end, char in enumerate(name) if char == "."}
        for prefix in prefixes:
            common = sum([name.startswith(prefix) and name.removeprefix(prefix) in other for name in one])
            best = max(best, (common, prefix, swap), key=lambda item: (item[0], -len(item[1])))
    common, prefix, swap = best
    if not common:
        return old, new
    longer, other = (new, old) if swap else (old, new)
    shorter = {name.removeprefix(prefix): layer for name, layer in longer.items()}
    return (other, shorter) if swap else (shorter, other)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one if has_values(one[name]) and has_values(other[name])]
    return all([same_bits(left, right.to(left.device)) for left, right in pairs])


def _broken(layers: Mapping[str, _Layer]) -> tuple[str, ...]:
    return tuple([name for name, layer in layers.items() if has_broken(layer.statistics)])
