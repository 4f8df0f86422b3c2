"""``diff``: what moved between two models, state dicts or checkpoint files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from bnguard.findings.checkpoint_files import find_state_dict, load_checkpoint
from bnguard.findings.soundness import has_broken, statistics_of_layer
from bnguard.layers.bits import has_values, is_valueless, same_bits, what_is_unreadable
from bnguard.layers.drift import drift_between, eps_of
from bnguard.layers.kinds import is_statistic
from bnguard.layers.tree import find_layers
from bnguard.records import Drift, StatsDiff
from bnguard.report.document import Column, Document, Table, as_text
from bnguard.report.json import drift_content
from bnguard.report.tables import drift_table
from bnguard.torch_internals.compile import outside_graphs
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import unwrapped_tensor
from bnguard.words import count_text

Source: TypeAlias = "nn.Module | Mapping[str, Any] | str | os.PathLike[str]"


class _Layer(NamedTuple):
    type: str
    eps: float
    statistics: dict[str, Tensor]


_EPS: Final = 1e-5  # torch's default, for states that have only tensors
_SHOWN: Final = 20  # rows


@outside_graphs
@outside_modes
def diff(before: Source, after: Source, *, key: str | None = None) -> StatsDiff:
    """Compares the running statistics of two models, state dicts or checkpoint files.

    Files are read with ``torch.load(weights_only=True)``, or as safetensors: nothing in them is executed. A state dict
    is found at the top or under ``state_dict``, ``model``, ``ema`` and the like. Names are compared without the
    prefixes of wrappers (``module.``, ``_orig_mod.``), and without a further prefix that all names of one state have,
    as in Lightning's checkpoints.

    Args:
        before: The earlier state: a model, a state dict, a checkpoint, or the path of a file.
        after: The later state.
        key: The key of the state dict in a checkpoint, ``"ema.module"`` if nested; None tries the usual keys.

    Returns:
        What moved, what is missing, and what is broken. The drift of a channel is computed with the layer's ``eps`` if
        a model is given, else with torch's ``1e-5``.

    Raises:
        TypeError: A state is none of those.
        ValueError: A file is no checkpoint, is truncated, or holds objects that would have to be unpickled; no state
            dict is found; there are no running statistics, or some of them cannot be compared (nested).
        OSError: A file cannot be read.
        ImportError: A file is a ``.safetensors`` file, and that package is not installed.
    """
    old, new = (_layers_of(state, key, name) for state, name in ((before, "before"), (after, "after")))
    if not old.keys() & new.keys():
        old, new = _aligned(old, new)
    found = _compared(old, new)
    return replace(found, _text=as_text(diff_document(found)))


def _compared(old: Mapping[str, _Layer], new: Mapping[str, _Layer]) -> StatsDiff:
    lost, gained = _only_in(old, new), _only_in(new, old)
    common = [name for name in new if name in old and name not in (*lost, *gained)]
    unchanged = [name for name in common if _same(old[name].statistics, new[name].statistics)]
    changed = [name for name in common if name not in unchanged]
    drifts = [_drift(name, old[name], new[name]) for name in changed]
    return StatsDiff(
        tuple(filter(None, drifts)), tuple(changed), tuple(unchanged), lost, gained, _broken(old), _broken(new)
    )


def _only_in(one: Mapping[str, _Layer], other: Mapping[str, _Layer]) -> tuple[str, ...]:
    """The layers with statistics that only one of the states has."""
    return tuple(
        [
            name
            for name, layer in one.items()
            if name not in other or not layer.statistics.keys() <= other[name].statistics.keys()
        ]
    )


def _drift(name: str, earlier: _Layer, later: _Layer) -> Drift | None:
    eps = later.eps if later.eps != _EPS else earlier.eps
    return drift_between((name,), later.type or earlier.type, earlier.statistics, later.statistics, eps)


def diff_document(found: StatsDiff) -> Document:
    """The report of a comparison: what moved, what is missing, and what is broken."""
    total = len(found.changed) + len(found.unchanged)
    shown = {drift.names[0] for drift in found.moved if drift.has_moved}
    others = [name for name in found.changed if name not in shown]
    tables = (
        drift_table("moved", found.moved, _SHOWN),
        _names_table("other statistics than mean and variance moved", others),
        _names_table("only before", found.missing),
        _names_table("only after", found.added),
        _names_table("broken before (NaN, infinite or negative)", found.broken_before),
        _names_table("broken after (NaN, infinite or negative)", found.broken_after),
    )
    broken = len(found.broken_after)
    what = f"{count_text(broken, 'layer')} of the later state {'is' if broken == 1 else 'are'} broken"
    verdict = f"{what}: take an earlier checkpoint" if broken else ""
    parts = [f"{len(found.changed)} of {count_text(total, 'layer')} moved"]
    parts += [f"{len(found.missing)} missing"] * bool(found.missing) + [f"{len(found.added)} added"] * bool(found.added)
    shown_tables = tuple([table for table in tables if table.rows])
    return Document(verdict, ", ".join(parts), (), shown_tables, is_clean=found.is_clean)


def _names_table(title: str, names: Sequence[str]) -> Table:
    return Table(title, (Column("layer"),), tuple([(name or "(root)",) for name in names]), _SHOWN)


def diff_content(found: StatsDiff) -> dict[str, Any]:
    """A comparison for a JSON file, with the fields of ``StatsDiff``."""
    names = ("changed", "unchanged", "missing", "added", "broken_before", "broken_after")
    return {"moved": [drift_content(drift) for drift in found.moved], **{name: getattr(found, name) for name in names}}


def _layers_of(state: Any, key: str | None, role: str) -> dict[str, _Layer]:
    """The layers with running statistics of one state, by name."""
    if isinstance(state, nn.Module):
        layers = {}
        for layer in find_layers(state):
            module: Any = layer.module
            statistics = statistics_of_layer(module, layer.buffers)
            dense = {name: _dense(tensor) for name, tensor in statistics.items()}
            layers[layer.names[0]] = _Layer(type(module).__name__, eps_of(module, _EPS), dense)
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
    for name, its in layers.items():
        for buffer, tensor in its.statistics.items():
            if not (has_values(tensor) or is_valueless(tensor)):
                what = what_is_unreadable(tensor)
                raise ValueError(f"{source}: {buffer} of {name or '(root)'} is {what}: its bits cannot be compared")
    return layers


# No user's submodule has such a name.
_WRAPPED: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL: Final = "module."  # a submodule may: it is a wrapper only if it contains everything


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
    """The tensor in a layout and a precision that arithmetic supports, if there is one."""
    if is_valueless(tensor):
        return tensor
    tensor = unwrapped_tensor(tensor)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.layout is not torch.strided and not tensor.is_nested:
        tensor = tensor.to_dense()
    if not has_values(tensor):
        return tensor
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor).as_subclass(Tensor)


def _aligned(old: dict[str, _Layer], new: dict[str, _Layer]) -> tuple[dict[str, _Layer], dict[str, _Layer]]:
    """Both states, without the prefix of one that makes most of its names equal to names of the other."""
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
