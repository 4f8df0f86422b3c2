"""What is wrong with how a model's running statistics are treated: findings BN001 to BN014."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from bnguard._aside import aside
from bnguard._bits import has_values, same_bits
from bnguard._ledger import FEW_VALUES, Ledger
from bnguard._report import count_text, times_text

__all__ = ["CODES", "STATIC", "Finding", "Severity", "Sighting", "findings_of", "sightings_in"]

Severity = Literal["error", "warning", "note"]

# What each code is about, how bad it is, and what to do about it.
CODES: Final[dict[str, tuple[str, Severity, str]]] = {
    "BN001": (
        "frozen parameters, moving statistics",
        "warning",
        (
            "requires_grad_(False) does not stop running statistics: put frozen(model, use_running_stats=True) around "
            "the training, or call eval() on these layers after each train()"
        ),
    ),
    "BN002": (
        "train-mode forward without gradients",
        "warning",
        "call model.eval() before it; for a teacher that is to stay in train mode, frozen(teacher, 'restore')",
    ),
    "BN003": (
        "several updates per optimizer step",
        "warning",
        (
            "run the batches through the model in one forward, or choose which forward counts: "
            "frozen(model, 'restore') around the others, or frozen(model, 'restore', updates=1) around the step"
        ),
    ),
    "BN004": (
        "one layer, several places",
        "warning",
        "give each place a layer of its own: one running mean cannot describe two distributions",
    ),
    "BN005": (
        "recomputed forward",
        "warning",
        "pass context_fn=bnguard.recompute_frozen(model) to torch.utils.checkpoint.checkpoint",
    ),
    "BN006": (
        "too few values per channel",
        "warning",
        (
            "use larger batches, SyncBatchNorm over several devices, or statistics that stay: "
            "frozen(model, use_running_stats=True)"
        ),
    ),
    "BN007": (
        "momentum by another convention",
        "warning",
        "in torch new = (1 - momentum) * old + momentum * batch: write 0.1 for Keras' 0.9, 0.01 for 0.99",
    ),
    "BN008": (
        "eval mode undone",
        "warning",
        "model.train() reaches every layer: guard the run instead of the mode, frozen(model, use_running_stats=True)",
    ),
    "BN009": (
        "statistics in half precision",
        "warning",
        "keep the statistics in float32 (layer.float()) and use torch.autocast: small updates are rounded away",
    ),
    "BN010": (
        "a frozen parameter that still moves",
        "warning",
        "leave it out of the optimizer, set its gradient to None, or hold it: frozen(model, affine=True)",
    ),
    "BN011": (
        "track_running_stats off on a layer that has statistics",
        "warning",
        (
            "for a freeze, use frozen(model, use_running_stats=True): train mode now normalises with the batch, and "
            "eval mode with the old statistics"
        ),
    ),
    "BN012": (
        "broken statistics",
        "error",
        "restore a checkpoint from before, or call reset_running_stats() and torch.optim.swa_utils.update_bn()",
    ),
    "BN013": (
        "wrong gradients",
        "error",
        (
            "call backward() on the eval-mode result before the train-mode forward, or hold the layer in between: "
            "frozen(model, 'restore')"
        ),
    ),
    "BN014": (
        "statistics never learned",
        "warning",
        "call torch.optim.swa_utils.update_bn(loader, model) before the evaluation",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with how running statistics are treated.

    Attributes:
        code: ``"BN001"`` to ``"BN014"``.
        title: What the code is about.
        severity: ``"error"``: results are wrong; ``"warning"``: they very likely are not what was meant; ``"note"``:
            worth knowing.
        layers: First names of the layers concerned, in the order of ``state_dict()``.
        where: The user's line, ``"train.py:42 in train_epoch"``; None where it is not about one.
        what: What happened, in one sentence with the numbers.
        fix: What to do, in one sentence.
    """

    code: str
    title: str
    severity: Severity
    layers: tuple[str, ...]
    where: str | None
    what: str
    fix: str

    def __str__(self) -> str:
        place = "" if self.where is None else f" at {self.where}"
        return f"{self.code} {self.title}{place}\n  {self.what}.\n  {self.fix[0].upper()}{self.fix[1:]}."


@dataclass(frozen=True, slots=True)
class Sighting:
    """One layer's share in a finding.

    Attributes:
        code: As in ``Finding``.
        layer: The layer's first name.
        where: As in ``Finding``.
        number: How often; what that means depends on the code.
        detail: What the sentence needs besides; sightings with different details are different findings.
    """

    code: str
    layer: str
    where: str | None
    number: float = 0
    detail: Any = None


def findings_of(
    sightings: Iterable[Sighting], sentences: Mapping[str, Callable[[Any], str]] | None = None
) -> tuple[Finding, ...]:
    """Puts together what several layers have in common; errors first, then by code, in the order of the sightings.

    Args:
        sightings: What was seen.
        sentences: What to say of each code; by default what is said of a run.
    """
    sentences = RUN if sentences is None else sentences
    groups: dict[tuple[str, str | None, Any], list[Sighting]] = {}
    for sighting in sightings:
        groups.setdefault((sighting.code, sighting.where, sighting.detail), []).append(sighting)
    findings = []
    for (code, where, detail), group in groups.items():
        title, severity, fix = CODES[code]
        layers = tuple(dict.fromkeys(sighting.layer for sighting in group))
        numbers = [sighting.number for sighting in group]
        what = sentences[code](_Group(layers, numbers, detail))
        findings.append(Finding(code, title, severity, layers, where, what, fix))
    rank = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(findings, key=lambda finding: (rank[finding.severity], finding.code)))


def sightings_in(ledgers: Sequence[Ledger], nows: Sequence[dict[str, Tensor]], has_stepped: bool) -> Iterator[Sighting]:
    """What a run shows.

    Args:
        ledgers: What was seen of each layer.
        nows: The statistics of each at the end.
        has_stepped: Whether any optimizer has.
    """
    for ledger, now in zip(ledgers, nows, strict=True):
        yield from _seen_by_line(ledger)
        yield from _seen_over_steps(ledger, has_stepped)
        yield from _seen_at_the_end(ledger, now, has_stepped)


def _seen_by_line(ledger: Ledger) -> Iterator[Sighting]:
    name = ledger.names[0]
    for site, number in ledger.frozen.items():
        yield Sighting("BN001", name, site, number)
    without_grad: dict[str, int] = {}
    recomputed: dict[str, int] = {}
    for line in ledger.lines:
        site, mode = line.site, line.mode
        if mode.training and not mode.grad and not mode.calibration and not mode.recompute:
            without_grad[site] = without_grad.get(site, 0) + line.count
        if mode.recompute:
            recomputed[site] = recomputed.get(site, 0) + line.count
    for site, number in without_grad.items():
        yield Sighting("BN002", name, site, number)
    for site, number in recomputed.items():
        yield Sighting("BN005", name, site, number)
    small = sum([line.small_batches for line in ledger.lines])
    if small >= 2 and 2 * small >= ledger.updates:
        line = max(ledger.lines, key=lambda line: line.small_batches)
        yield Sighting("BN006", name, line.site, small, line.fewest_values)


def _seen_over_steps(ledger: Ledger, has_stepped: bool) -> Iterator[Sighting]:
    name = ledger.names[0]
    if has_stepped:
        for sites, several in ledger.several.items():
            if several.steps >= 2 or several.most >= 3:  # once twice: a first forward that only looks at shapes
                yield Sighting("BN003", name, sites[0], several.steps, (several.most, sites))
    if ledger.places:
        yield Sighting("BN004", name, ledger.lines[0].site, ledger.places)
    if ledger.undone is not None:
        yield Sighting("BN008", name, ledger.undone, ledger.updates)
    if ledger.wrong is not None:
        yield Sighting("BN013", name, ledger.wrong.train_site, ledger.wrong.count, ledger.wrong.eval_site)
    if ledger.updates and is_of_another_convention(ledger.momentum):
        yield Sighting("BN007", name, None, 0, ledger.momentum)
    if ledger.untracked:
        yield Sighting("BN011", name, None, ledger.untracked)


def _seen_at_the_end(ledger: Ledger, now: dict[str, Tensor], has_stepped: bool) -> Iterator[Sighting]:
    name = ledger.names[0]
    half = half_precision_of(now)
    if ledger.updates and half is not None:
        yield Sighting("BN009", name, None, 0, half)
    if has_broken(now):
        yield Sighting("BN012", name, None, 0, has_broken(ledger.before))
    if has_stepped and ledger.held and ledger.evaluations and not ledger.updates and is_initial(now):
        yield Sighting("BN014", name, None, ledger.held)
    moved = _moved_parameters(ledger) if has_stepped else ()
    if moved:
        yield Sighting("BN010", name, None, 0, moved)


@aside()
def _moved_parameters(ledger: Ledger) -> tuple[str, ...]:
    """Parameters of an optimizer that were not trained, and have other bits now."""
    module = ledger.module
    if module is None:
        return ()
    moved = []
    for name, before in ledger.frozen_before.items():
        now = module._parameters.get(name)
        if now is None or now.requires_grad or not ledger.is_optimized(now):
            continue
        if now.device != before.device or not same_bits(before, now):
            moved.append(name)
    return tuple(moved)


def is_of_another_convention(momentum: Any) -> bool:
    """Whether a momentum is one of Keras', say, where most of the old statistics is kept."""
    return isinstance(momentum, float) and 0.5 < momentum < 1


def half_precision_of(statistics: Mapping[str, Tensor]) -> str | None:
    """The dtype of statistics in half precision; None where none are."""
    dtypes = {tensor.dtype for tensor in statistics.values()} & {torch.float16, torch.bfloat16}
    return str(dtypes.pop()) if dtypes else None


@aside()
def has_broken(statistics: Mapping[str, Tensor]) -> bool:
    """Whether some of a layer's statistics hold NaN, infinity, or a variance below 0. Reads them."""
    return any([has_values(tensor) and _is_broken(name, tensor) for name, tensor in statistics.items()])


def _is_broken(name: str, statistic: Tensor) -> bool:
    if not statistic.is_floating_point():
        return False
    bad = ~statistic.isfinite()
    if "var" in name:
        bad = bad | (statistic < 0)
    return bool(bad.any())


@aside()
def is_initial(statistics: dict[str, Tensor]) -> bool:
    """Whether statistics are those that torch gives a new layer: mean 0, variance 1, no batch counted. Reads them."""
    mean, var, count = (statistics.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or not has_values(mean) or not has_values(var):
        return False
    return bool(mean.eq(0).all()) and bool(var.eq(1).all()) and (count is None or int(count) == 0)


@dataclass(frozen=True, slots=True)
class _Group:
    layers: tuple[str, ...]
    numbers: list[float]
    detail: Any

    @property
    def of(self) -> str:
        """The layers, in words."""
        return f"{count_text(len(self.layers), 'layer')} ({self.names})"

    @property
    def names(self) -> str:
        """The first names."""
        shown = ", ".join([name or "(root)" for name in self.layers[:3]])
        return f"{shown} and {len(self.layers) - 3} more" if len(self.layers) > 3 else shown

    @property
    def be(self) -> str:
        """What the layers are."""
        return "are" if len(self.layers) > 1 else "is"

    @property
    def have(self) -> str:
        """What the layers do."""
        return "have" if len(self.layers) > 1 else "has"

    @property
    def most(self) -> int:
        return int(max(self.numbers))

    @property
    def updates(self) -> str:
        each = " each" if len(self.layers) > 1 else ""
        return f"{count_text(self.most, 'update')}{each}"


def _several(group: _Group) -> str:
    most, sites = group.detail
    lines = "that line" if len(sites) == 1 else " and ".join(sites)
    return f"{group.of} updated up to {times_text(most)} in {count_text(group.most, 'optimizer step')}, from {lines}"


RUN: Final[Mapping[str, Callable[[_Group], str]]] = {
    "BN001": lambda g: f"{g.of} made {g.updates} although no parameter of theirs is trained",
    "BN002": lambda g: f"{g.of} made {g.updates} in train mode where autograd did not record",
    "BN003": _several,
    "BN004": lambda g: f"one forward of the model called {g.of} from several places, in {g.most} optimizer steps",
    "BN005": lambda g: f"{g.of} made {g.updates} when activation checkpointing ran the forward again in backward",
    "BN006": lambda g: f"{g.of} made {g.updates} from fewer than {FEW_VALUES} values per channel, down to {g.detail}",
    "BN007": lambda g: f"{g.of} {g.have} momentum {g.detail}: the running statistics are those of the last batches",
    "BN008": lambda g: f"{g.of} had been put into eval mode, was back in train mode and updated from here on",
    "BN009": lambda g: f"{g.of} {g.have} statistics in {g.detail.removeprefix('torch.')}",
    "BN010": lambda g: f"an optimizer moved {' and '.join(g.detail)} of {g.of}, with requires_grad=False",
    "BN011": lambda g: f"{g.of} ran {times_text(g.most)} in train mode with track_running_stats=False",
    "BN012": lambda g: (
        f"{g.of} {g.have} NaN, infinite or negative statistics"
        f"{', and had them at the beginning' if g.detail else ', and had none at the beginning'}"
    ),
    "BN013": lambda g: (
        f"{g.of} ran in eval mode at {g.detail}, then updated here, and then backward went through the eval-mode "
        f"result {times_text(g.most)}: its gradient was computed from the later statistics"
    ),
    "BN014": lambda g: (
        f"{g.of} was trained while a guard held it and evaluated with mean 0 and variance 1, which it never left"
    ),
}

STATIC: Final[Mapping[str, Callable[[_Group], str]]] = {
    "BN001": lambda g: f"{g.of} {g.be} in train mode although no parameter of theirs is trained: statistics will move",
    "BN004": lambda g: f"{g.of} {g.be} used under several names",
    "BN007": RUN["BN007"],
    "BN008": lambda g: f"{g.of} {g.be} in eval mode in a model in train mode: the next train() reaches them",
    "BN009": RUN["BN009"],
    "BN010": lambda g: (
        f"the next step of {g.detail} moves {count_text(len(g.layers), 'parameter')} ({g.names}) with "
        "requires_grad=False, which still have a gradient"
    ),
    "BN011": lambda g: f"{g.of} {g.have} statistics, and track_running_stats=False",
    "BN012": lambda g: f"{g.of} {g.have} NaN, infinite or negative statistics",
    "BN014": lambda g: f"{g.of} {g.be} in eval mode with mean 0 and variance 1: no batch was ever counted",
}
