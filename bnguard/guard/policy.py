"""What a guard does about an update, and what the guards around one layer decide together.

Note [Policies]
~~~~~~~~~~~~~~~
A policy is one record of five properties; no other file compares it with a name.

A forward of a layer asks the guards around it from the innermost one outwards. A guard that has budget left
(``updates=``) or that lets updates happen ("warn") passes the question on: what it allows is a change for the guard
around it. The first guard that stops the forward, or that keeps the update away from the statistics, decides. A guard
that puts everything back at its end ("rollback") hides what happens inside it, so the guards around it are not asked.

While a graph is traced nothing is counted: a graph runs many times and is traced once. ``Ruling.in_graphs`` is then
the answer.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from bnguard.errors import StatsChangedError
from bnguard.layers.usual_copy import Write
from bnguard.torch_internals.callsite import CallSite
from bnguard.torch_internals.checkpointing import Region, current_region, is_in_backward
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock

Normalisation = Literal["own", "batch", "running"]
Action = Literal["update", "stop", "hold", "running"]


class Policy:
    """What becomes of an update beyond the budget, and of the statistics at the end of the block.

    Attributes:
        stops: The forward raises before it updates.
        normalises_with: ``"own"``: the forward runs as without a guard; ``"batch"``: it normalises with its batch and
            updates nothing; ``"running"``: it normalises with the running statistics.
        puts_back: The original statistics are restored at the end of the block.
        tells_forwards: Updates made by forwards are reported.
        tells_others: What is done about changes made by anything else: an error, a warning, or nothing.
        only_in_backward: Applies to forwards inside a backward pass only, which activation checkpointing recomputes.
        only_without_grad: Applies to forwards without gradients only, such as those of a validation loop.
        action: What happens to a forward that would update; follows from the first two.
        holds: Whether forwards run otherwise than without a guard, and update nothing.
        hides: Whether what happens inside is undone at the end, so that no guard further out needs to know.
    """

    __slots__ = (
        "action", "hides", "holds", "normalises_with", "only_in_backward", "only_without_grad", "puts_back", "stops",
        "tells_forwards", "tells_others",
    )  # fmt: skip

    def __init__(
        self,
        *,
        stops: bool = False,
        normalises_with: Normalisation = "own",
        puts_back: bool = False,
        tells_forwards: bool = False,
        tells_others: Literal["error", "warning", "nothing"] = "nothing",
        only_in_backward: bool = False,
        only_without_grad: bool = False,
    ) -> None:
        self.stops = stops
        self.normalises_with = normalises_with
        self.puts_back = puts_back
        self.tells_forwards = tells_forwards
        self.tells_others = tells_others
        self.only_in_backward = only_in_backward
        self.only_without_grad = only_without_grad
        # Not properties: every layer is asked at every step.
        self.holds = normalises_with != "own"
        self.hides = puts_back and not stops and not self.holds
        self.action: Action = "stop" if stops else _ACTIONS[normalises_with]


_ACTIONS: Final[dict[Normalisation, Action]] = {"own": "update", "batch": "hold", "running": "running"}

POLICIES: Final[dict[str, Policy]] = {
    "raise": Policy(stops=True, puts_back=True, tells_forwards=True, tells_others="error"),
    "warn": Policy(tells_forwards=True, tells_others="warning"),
    "restore": Policy(normalises_with="batch", puts_back=True, tells_others="warning"),
    "rollback": Policy(puts_back=True),
}
# ``use_running_stats=True``: whichever policy it is combined with, no forward updates.
USE_RUNNING_STATS: Final = {
    name: Policy(
        normalises_with="running",
        puts_back=policy.puts_back,
        tells_forwards=policy.tells_forwards,
        tells_others=policy.tells_others,
    )
    for name, policy in POLICIES.items()
}
IN_BACKWARD: Final = Policy(normalises_with="batch", only_in_backward=True)
WITHOUT_GRAD: Final = Policy(stops=True, tells_forwards=True, only_without_grad=True)


class Reporter(Protocol):
    """The block that an entry belongs to, as far as a forward needs it.

    Attributes:
        guards_every_model: Whether the user has not named the model: the pytest plugin, or ``bnguard run``.
    """

    @property
    def guards_every_model(self) -> bool:
        """See above."""

    def stopped(self, layer: int) -> StatsChangedError:
        """Records an update that was stopped of the layer with this id; returns the error to raise."""

    def updated(self, layer: int) -> None:
        """Records an update that was let through, and warns about the first one of the block."""

    def wrote(self, write: Write) -> None:
        """Takes what an update within the budget has written as the state to protect, on the short way."""

    def allowed(self, layer: int, before: Mapping[str, Tensor] | None) -> None:
        """Takes what an update within the budget has written as the state to protect.

        ``before`` has copies of the statistics from right before the update, by buffer name; None where another update
        of the layer was under way.
        """

    def captured(self, layer: int) -> Mapping[str, Tensor]:
        """The statistics that the layer with this id had when the block began, by buffer name; not to be written to."""

    def recorded(self, layer: int) -> None:
        """Warns, once a block, that a layer in train mode is traced or exported although it is held in eval mode."""

    def checkpointed(self, region: Region) -> None:
        """Records that a forward was held in a checkpointed region."""


orders: Final = itertools.count(1)  # of entries: negative for one inside all others that there are


class UpdateCount:
    """The updates of one layer that one block has seen.

    Attributes:
        within: Updates within the budget.
        beyond: Updates beyond it, whether they were let through or stopped.
        site: The user's line of the first one beyond it.
    """

    __slots__ = ("beyond", "site", "within")

    def __init__(self) -> None:
        self.within = 0
        self.beyond = 0
        self.site: CallSite | None = None

    @property
    def lines(self) -> tuple[str | None, str | None]:
        """``where`` and ``inside`` of a ``StatsChange``."""
        site = self.site
        return (None, None) if site is None else (str(site), None if site.inside is None else str(site.inside))


class Counts(dict[int, UpdateCount]):
    """The updates that one block has seen, by the id of the layer."""

    __slots__ = ()

    def __missing__(self, layer: int) -> UpdateCount:
        return self.setdefault(layer, UpdateCount())


class PolicyEntry:
    """What one block wants of its layers.

    A block keeps its entry only while it is open, so that no cycle of references outlives it. A forward that began
    inside keeps its own.

    Attributes:
        block: The block; None where nothing is reported.
        policy: What becomes of an update beyond the budget.
        budget: Updates that the block allows each layer.
        counts: The updates so far.
        order: Of the entries of one layer the innermost has the smallest.
        manager: Ends the block when its context manager is deleted: see rule 3 of Note [Ctrl-C].
    """

    __slots__ = ("block", "budget", "counts", "manager", "order", "policy")

    def __init__(
        self,
        block: Reporter | None,
        policy: Policy,
        budget: int = 0,
        counts: Counts | None = None,
        *,
        outermost: bool = False,
    ) -> None:
        self.block = block
        self.policy = policy
        self.budget = budget
        self.counts = Counts() if counts is None else counts
        self.manager: weakref.ref[object] | None = None
        self.order = next(orders) if outermost else -next(orders)


Entries = tuple[PolicyEntry, ...]


class Decision:
    """What happens to one forward that would update.

    Attributes:
        action: ``"update"``: it updates; ``"stop"``: it raises; ``"hold"``: it normalises with the batch and updates
            nothing; ``"running"``: it normalises with the running statistics.
        decider: The entry that decided; None for ``"update"``.
        told: Entries that record the update.
        within: Entries whose budget allows it.
    """

    __slots__ = ("action", "decider", "told", "within")

    def __init__(
        self,
        action: Action,
        decider: PolicyEntry | None = None,
        told: tuple[PolicyEntry, ...] = (),
        within: tuple[PolicyEntry, ...] = (),
    ) -> None:
        self.action = action
        self.decider = decider
        self.told = told
        self.within = within


UPDATE: Final = Decision("update")


class Ruling:
    """What follows for a layer from the entries of the blocks around it.

    Attributes:
        entries: The entries, the innermost first.
        action: What happens to every update as long as these are the entries; None where it depends on the forward.
        decider: The entry that decides so; None for ``"update"``.
        in_graphs: What happens to every update in a compiled graph, where a recomputed forward is not a forward of its
            own; None where it depends on the forward.
        needs_forward: Whether forwards are held or counted, which takes a ``forward`` on the instance.
        leaves_eval: Whether a forward that only reads the statistics runs as without a guard.
        rows: Where the only entry has a budget, and its block goes the short way: by the id of the layer, its position
            among the layers of the block.
    """

    __slots__ = ("action", "decider", "entries", "in_graphs", "leaves_eval", "needs_forward", "rows")

    def __init__(self, entries: Entries, rows: Mapping[int, int] | None = None) -> None:
        self.rows = rows
        self.entries = entries if len(entries) < 2 else tuple(sorted(entries, key=_INNERMOST_FIRST))
        self.action, self.decider = _standing(self.entries)
        self.in_graphs, _ = _standing([entry for entry in self.entries if not _depends(entry.policy)])
        self.leaves_eval = not any([entry.policy.hides or entry.policy.action == "running" for entry in entries])
        self.needs_forward = any([entry.budget or entry.policy.holds or entry.policy.hides for entry in entries])


_INNERMOST_FIRST: Final = attrgetter("order")


class Rulings(dict[Entries, Ruling]):
    """The rulings for some sets of entries: the layers of a block mostly share one."""

    __slots__ = ()

    def __missing__(self, entries: Entries) -> Ruling:
        self[entries] = ruling = Ruling(entries)
        return ruling


def _standing(entries: Sequence[PolicyEntry]) -> tuple[Action | None, PolicyEntry | None]:
    for entry in entries:
        policy = entry.policy
        if entry.budget or _depends(policy):
            return None, None
        if policy.action != "update" or policy.hides:
            return policy.action, entry
    return "update", None


def _depends(policy: Policy) -> bool:
    """Whether it applies to some forwards only."""
    return policy.only_in_backward or policy.only_without_grad


NO_RULING: Final = Ruling(())


def decide(entries: Sequence[PolicyEntry], layer: int, *, only_counts: bool = False) -> Decision:
    """Decides about an update of the layer with this id, the innermost entry first. See Note [Policies].

    An update that an entry further out prevents never happens: nothing is recorded or spent for it. One that
    ``only_counts``, and moves no other statistic than the number of batches, is within every budget.
    """
    told: list[PolicyEntry] = []
    within: list[PolicyEntry] = []
    for entry in entries:
        policy = entry.policy
        if entry.budget and (only_counts or entry.counts[layer].within < entry.budget):
            within.append(entry)
        elif policy.only_in_backward:
            if is_in_backward():
                return Decision("hold", entry)
        elif policy.only_without_grad and (torch.is_grad_enabled() or current_region() is not None):
            continue  # the first forward of reentrant checkpointing is part of a step, and runs without gradients
        elif policy.action != "update":
            return Decision(policy.action, entry)
        elif policy.hides:
            break
        else:
            told.append(entry)
    return Decision("update", None, tuple(told), tuple(within)) if told or within else UPDATE


_lock: Final = RLock()
renew_after_fork(_lock)


def decide_and_count(entries: Sequence[PolicyEntry], layer: int) -> Decision:
    """Decides about an update and spends the budgets in one step, so that two threads never share one update."""
    with _lock:
        decision = decide(entries, layer)
        for entry in decision.within:
            entry.counts[layer].within += 1
        return decision


def give_back(entries: Sequence[PolicyEntry], layer: int) -> None:
    """Undoes ``decide_and_count`` for entries whose budget was spent on what has moved the number of batches alone."""
    with _lock:
        for entry in entries:
            entry.counts[layer].within -= 1


def count_within(count: UpdateCount, budget: int) -> bool:
    """Spends the budget of an entry on one update; False if nothing is left of it. See ``decide_and_count``."""
    with _lock:
        is_within = count.within < budget
        count.within += is_within
        return is_within


def spend(count: UpdateCount, budget: int, updates: int) -> bool:
    """Spends budget on updates that no hook saw; False if the budget is too small, or there were none."""
    with _lock:
        if not 0 < updates <= budget - count.within:
            return False
        count.within += updates
        return True


def count_update(count: UpdateCount, site: CallSite) -> None:
    """Adds one update beyond the budget."""
    with _lock:
        count.beyond += 1
        if count.site is None:
            count.site = site
