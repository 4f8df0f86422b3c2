"""Read the comparison at the end of a block later: ``check="deferred"``.

Note [Deferred checks]
~~~~~~~~~~~~~~~~~~~~~~
To read the result of a comparison, the host waits until the device has done all that came before. Under
``check="deferred"`` the end of a block has the device compare, and write the original statistics back whether they
differ or not, and reads nothing. What is left is a ``Verdict``: the result, and both copies of the values.

1. A verdict refers to no module. It belongs to the model, not to the guard: a loop that makes a guard at each step, as
   ``strict`` does, reads at each step what the previous one found. It goes with the model.
2. Each verdict is read once, oldest first: when a block with ``check="deferred"`` begins on the same model, by
   ``check()`` and by ``stop()``. What nobody has read when the model or the process ends is printed.
3. What the host itself can tell, and what takes more than one comparison, is not deferred: a statistic was replaced or
   converted, or has been given other memory; an exception leads out of the block.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from torch import nn

from bnguard.errors import hides_frame
from bnguard.guard.changes import cause_of, change_of, joined, overwritten, updates_told
from bnguard.guard.options import Settings
from bnguard.guard.outcome import Outcome
from bnguard.guard.policy import Counts
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.comparison import Comparison, Moved, any_differ
from bnguard.layers.drift import eps_of
from bnguard.layers.kinds import LayerKind, StatsLayer
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock

if TYPE_CHECKING:
    from bnguard.records import StatsChange

__tracebackhide__ = hides_frame

_LATE: Final = 'It was found when the block ended, and is read only now: check="deferred".'
_UNREAD: Final = (
    'Nothing has read this result of check="deferred" before: call guard.check() after the last block, or '
    'frozen(model, check="deferred").check().'
)

_unread: Final[ByIdentity[deque[Verdict]]] = ByIdentity()  # by model, oldest first
_lock: Final = RLock()
renew_after_fork(_lock)


class Receiver(Protocol):
    """The block that a verdict is about, as long as it lives."""

    def take_late(self, found: Mapping[int, StatsChange]) -> None:
        """Adds what a comparison has found, by owner, to the changes of the block."""


class _Layer(NamedTuple):
    """What a report says of a layer that may be gone by then."""

    names: tuple[str, ...]
    type: str
    buffers: tuple[str, ...]
    kind: LayerKind
    eps: float
    id: int
    module: weakref.ref[nn.Module]

    def alive(self) -> StatsLayer | None:
        """The layer; None if it is gone."""
        module = self.module()
        return None if module is None else StatsLayer(module, self.names, self.buffers, self.kind)


class Verdict:
    """The comparison at the end of a block, whose result has not been read. See Note [Deferred checks].

    Args:
        block: The block.
        model: Its model.
        layers: Its layers.
        comparisons: The comparisons of their statistics and, with ``affine=True``, of their weights and biases.
        counts: The updates that the block has seen.
        outcome: What the block has said.
        settings: Its options.
    """

    __slots__ = ("_block", "_comparisons", "_counts", "_layers", "_model", "_outcome", "_policy", "_process")

    def __init__(
        self,
        block: Receiver,
        model: nn.Module,
        layers: Sequence[StatsLayer],
        comparisons: Sequence[Comparison],
        counts: Counts,
        outcome: Outcome,
        settings: Settings,
    ) -> None:
        self._block = weakref.ref(block)
        self._model = weakref.ref(model)
        self._layers = [
            _Layer(
                layer.names,
                type(layer.module).__name__,
                layer.buffers,
                layer.kind,
                eps_of(layer.module),
                id(layer.module),
                weakref.ref(layer.module),
            )
            for layer in layers
        ]
        self._comparisons = comparisons
        self._counts = counts
        if settings.include or settings.exclude:  # modules, or functions that may know some
            settings = settings._replace(include=(), exclude=())
            outcome = outcome.with_settings(settings)
        self._outcome = outcome
        self._policy = settings.policy
        self._process = os.getpid()

    @property
    def is_silent(self) -> bool:
        """Whether nothing would be said, whatever the result."""
        policy = self._policy
        return policy.tells_others == "nothing" or (self._outcome.has_spoken and not policy.puts_back)

    def read(self) -> None:
        """Waits for the result, and acts as the end of the block would have.

        Raises:
            StatsChangedError: As the policy says.
        """
        changes = self._changes()
        block = self._block()
        if block is not None:
            block.take_late(changes)
        found = tuple([changes[owner] for owner in sorted(changes)])
        if found:
            layers, model = self._alive(), self._model()
            broadcast = overwritten(changes, layers)
            cause = "unknown" if model is None else cause_of(found, list(layers.values()), model)
            self._outcome.act(found, broadcast, found, cause, None, note=_LATE)

    def text(self) -> str:
        """Waits for the result, and returns what there is to say about it; empty for nothing."""
        changes = {} if self.is_silent else self._changes()
        found = [changes[owner] for owner in sorted(changes)]
        text = self._outcome.text(found) if found else ""
        kind = "error" if self._policy.tells_others == "error" else "warning"
        return f"{kind}: {text}\n{_UNREAD}" if text else ""

    def _changes(self) -> dict[int, StatsChange]:
        """What differs, by owner."""
        comparisons, self._comparisons = self._comparisons, ()
        changes: dict[int, StatsChange] = {}
        if os.getpid() != self._process:
            return changes  # a forked child: what the shared statistics are to be is up to the parent
        for number, (comparison, differs) in enumerate(zip(comparisons, any_differ(comparisons), strict=True)):
            for moved in comparison.moved() if differs else ():
                change = self._change(moved, is_of_statistics=number == 0)
                earlier = changes.get(moved.owner)
                changes[moved.owner] = joined(earlier, change) if earlier else change
        return changes

    def _change(self, moved: Moved, *, is_of_statistics: bool) -> StatsChange:
        layer = self._layers[moved.owner]
        count = self._counts[layer.id]
        about = layer.names, layer.type, layer.eps if is_of_statistics else None
        return change_of(moved, about, updates_told(count, self._policy), count)

    def _alive(self) -> dict[int, StatsLayer]:
        """The layers that there still are, by owner."""
        layers = {owner: layer.alive() for owner, layer in enumerate(self._layers)}
        return {owner: layer for owner, layer in layers.items() if layer is not None}


def keep_verdict(model: nn.Module, verdict: Verdict) -> None:
    """Keeps a verdict until it is read."""
    with _lock:
        waiting = _unread.get(model)
        if waiting is None:
            waiting = deque()
            _unread.put(model, waiting)
            weakref.finalize(model, _print_unread, waiting)  # at the end of the process at the latest
        waiting.append(verdict)


def read_verdicts(model: nn.Module, *, at_entry: bool = False) -> None:
    """Reads the verdicts about a model; what is left after an error, next time.

    Args:
        model: The model.
        at_entry: Whether to drop those of which nothing would be said.

    Raises:
        StatsChangedError: As the policy of the block says.
    """
    waiting = _unread.get(model)
    while waiting:
        try:
            verdict = waiting.popleft()
        except IndexError:  # another thread was faster
            return
        if not (at_entry and verdict.is_silent):
            verdict.read()


def _print_unread(waiting: deque[Verdict]) -> None:
    """Prints what nobody has read about a model that is gone, or when the process ends."""
    while waiting:
        verdict = waiting.popleft()
        try:
            text = verdict.text()
        except Exception as error:  # the device has failed, or is gone
            text = f'error: the result of a comparison with check="deferred" could not be read: {error}'
        if text and sys.stderr is not None:
            print(f"bnguard: {text}", file=sys.stderr)
