"""Measure the drift of all layers again and again.

At an optimizer step the statistics are only copied, in one operation, as long as the layers are the same and have the
same tensors. What is computed from the copies, for many steps together, has the same bits as one measurement has.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from bnguard.layers.drift import DriftColumns, DriftSample, columns_of, mean_and_variance, sample_of
from bnguard.layers.swaps import swaps
from bnguard.recording.layer_listener import SeenLayer
from bnguard.torch_internals.tracing import outside_modes

_MOST_COPIED: Final = 2**18  # values that wait


class _Copied(NamedTuple):
    """Statistics at a step, of which the drift is still to be computed."""

    step: int
    values: Tensor
    columns: DriftColumns


class _Source(NamedTuple):
    """Where the statistics of all layers are that have a mean and a variance.

    Attributes:
        layers: How many layers there are.
        places: For each statistic its module, its name and its tensor; all means come before all variances.
        columns: What they are compared with.
    """

    layers: int
    places: list[tuple[weakref.ref[nn.Module], str, Tensor]]
    columns: DriftColumns

    @outside_modes
    def copy(self) -> Tensor | None:
        """Copies of all of them; None if something is not as it was."""
        for reference, name, tensor in self.places:
            module = reference()
            if module is None or module._buffers.get(name) is not tensor:
                return None
        if swaps:
            return None
        try:
            values = torch.cat([tensor for _, _, tensor in self.places])
        except RuntimeError:  # of several devices, or of none
            return None
        return values if self.columns.fit(values) else None


class DriftSamples:
    """Measurements of the drift, in the order of the steps."""

    def __init__(self) -> None:
        self._samples: list[DriftSample | _Copied] = []
        self._source: _Source | None = None
        self._waiting = 0  # values that were copied

    def __len__(self) -> int:
        return len(self._samples)

    def measure(self, step: int, logs: Sequence[SeenLayer]) -> None:
        """Measures the drift of the layers on their device, after what was measured before. Does not wait for it."""
        source = self._source
        values = None if source is None or source.layers != len(logs) else source.copy()
        if source is None or values is None:
            layers = [(number, log.before, log.now(), log.eps) for number, log in enumerate(logs)]
            self._samples.append(sample_of(step, layers))
            self._source = _source_of(logs)
            return
        self._samples.append(_Copied(step, values, source.columns))
        self._waiting += values.numel()
        if self._waiting > _MOST_COPIED:
            self.computed()

    def remove_last(self, step: int) -> None:
        """Removes the last measurement if it is of this step."""
        if self._samples and self._samples[-1].step == step:
            self._samples.pop()

    def thin_out(self, interval: int) -> None:
        """Keeps those whose steps are multiples of ``interval``."""
        self._samples = [sample for sample in self._samples if sample.step % interval == 0]

    def computed(self) -> list[DriftSample]:
        """All measurements."""
        groups: dict[int, list[_Copied]] = {}
        for sample in self._samples:
            if isinstance(sample, _Copied):
                groups.setdefault(id(sample.columns), []).append(sample)
        found: dict[int, DriftSample] = {}
        for copies in groups.values():
            computed = copies[0].columns.samples([one.step for one in copies], [one.values for one in copies])
            found.update(zip(map(id, copies), computed, strict=True))
        samples = [found[id(sample)] if isinstance(sample, _Copied) else sample for sample in self._samples]
        self._samples, self._waiting = [*samples], 0
        return samples


def _source_of(logs: Sequence[SeenLayer]) -> _Source | None:
    """Where to copy all statistics from in one operation; None if that cannot be done."""
    found = []
    for number, log in enumerate(logs):
        module = log.module
        names = mean_and_variance(log.before)
        if not names:
            continue
        if len(names) > 1 or module is None or isinstance(module, ScriptModule) or id(module) in swaps:
            return None
        own = [tensor for name in names[0] if (tensor := module._buffers.get(name)) is not None]
        if len(own) < 2 or not all([type(tensor) is Tensor and tensor.dim() == 1 for tensor in own]):
            return None
        found.append((number, weakref.ref(module), names[0], own, log))
    columns = columns_of([(number, log.before, log.now(), log.eps) for number, _, _, _, log in found])
    if columns is None or len(columns.positions) < len(found):
        return None
    places = [(reference, names[part], own[part]) for part in (0, 1) for _, reference, names, own, _ in found]
    return _Source(len(logs), places, columns)
