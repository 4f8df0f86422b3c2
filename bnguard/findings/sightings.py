"""What a watch's records show that is wrong: the rules of the findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from bnguard.findings.grouping import Sighting
from bnguard.findings.soundness import half_precision_of, has_broken, is_initial, is_of_another_convention
from bnguard.layers.bits import same_bits
from bnguard.recording.layer_log import Ledger
from bnguard.torch_internals.tracing import aside

__all__ = ["sightings_in"]


def sightings_in(
    ledgers: Sequence[Ledger], names: Sequence[str], nows: Sequence[dict[str, Tensor]], has_stepped: bool
) -> Iterator[Sighting]:
    """What a run shows.

    Args:
        ledgers: What was seen of each layer.
        names: What to call each.
        nows: The statistics of each at the end.
        has_stepped: Whether any optimizer has.
    """
    for ledger, name, now in zip(ledgers, names, nows, strict=True):
        yield from _seen_by_line(ledger, name)
        yield from _seen_over_steps(ledger, name, has_stepped)
        yield from _seen_at_the_end(ledger, name, now, has_stepped)


def _seen_by_line(ledger: Ledger, name: str) -> Iterator[Sighting]:
    if not ledger.trained:  # else its parameters are frozen for a while, as those of a discriminator are
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
    if "Sync" not in ledger.type and small >= 2 and 2 * small >= ledger.updates:
        line = max(ledger.lines, key=lambda line: line.small_batches)
        yield Sighting("BN006", name, line.site, small, line.fewest_values)


def _seen_over_steps(ledger: Ledger, name: str, has_stepped: bool) -> Iterator[Sighting]:
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


def _seen_at_the_end(ledger: Ledger, name: str, now: dict[str, Tensor], has_stepped: bool) -> Iterator[Sighting]:
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
    moved = []
    for name, (before, now) in ledger.frozen_before.items():
        if now.requires_grad or not ledger.is_optimized(now):
            continue
        if now.device != before.device or not same_bits(before, now):
            moved.append(name)
    return tuple(moved)
