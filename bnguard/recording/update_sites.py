"""Add an update to those of its line and mode, and see whether anything is learned from its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from torch import Tensor

from bnguard.findings.events import Update
from bnguard.recording.run import Run
from bnguard.records import FEW_VALUES, StatsUpdates
from bnguard.torch_internals.node_hooks import goes_through

_MOST_MOMENTA: Final = 4
_MOST_COMPUTED: Final = 256  # operations between a parameter and that of a clone


def count_update(update: Update, shape: Sequence[int] | None, step: int, momentum: Any) -> None:
    """Counts one update, by a forward on a batch of this shape, of a layer with this momentum."""
    site = update.of
    site.count += 1
    site.results += update.has_learned is not None
    site.last_step = step
    if len(site.momenta) < _MOST_MOMENTA and not isinstance(momentum, Tensor):
        site.momenta.add(momentum)
    if shape is not None and len(shape) > 1:
        values = math.prod(shape) // max(1, shape[1])
        if site.fewest_values is None or values < site.fewest_values:
            site.fewest_values = values
        if values < FEW_VALUES:
            site.small_batches += 1


def watch_result(output: Any, update: Update, run: Run) -> None:
    """Notes in the journal when a backward pass goes through the result of the forward of an update."""
    if not isinstance(output, Tensor):
        return
    # An operation in place gives a view another function, and leaves that of its base in the graph.
    node = output.grad_fn if output._base is None else output._base.grad_fn
    if node is None:
        return
    update.has_learned = False
    run.node_hooks.add(node, partial(note_learned, run, update, run.steps.ticks))


def note_learned(run: Run, update: Update, tick: int, _: Any) -> None:
    """Notes that a backward pass has reached the result of the forward of an update, at this step of all optimizers.

    Whether it was learned from is asked when that step is over. Before, nobody has to wait with it.
    """
    if run.backwards.may_end_early and not goes_through():
        return
    if run.steps.ticks == tick:
        _learned(update)
    else:
        run.journal.entries.append((_learned, (update,)))


def _learned(update: Update) -> None:
    if not update.has_learned:
        update.has_learned = True
        if not update.is_undone:
            update.of.learned += 1


def joined(one: StatsUpdates, other: StatsUpdates) -> StatsUpdates:
    """Two records that differ only in what a rule asks."""
    values = [record.fewest_values for record in (one, other) if record.fewest_values is not None]
    return replace(
        one,
        count=one.count + other.count,
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        fewest_values=min(values, default=None),
        small_batches=one.small_batches + other.small_batches,
    )


def leaf_of(parameter: Tensor) -> Tensor:
    """The parameter from which another one was computed, as those of a clone in meta-learning are; else itself."""
    node: Any = parameter.grad_fn
    for _ in range(_MOST_COMPUTED):
        if node is None or hasattr(node, "variable"):
            break
        node = next((function for function, _ in node.next_functions if function is not None), None)
    leaf: Tensor = getattr(node, "variable", parameter)
    return leaf
