"""What the guards around one layer say about one forward, the innermost first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from bnguard.errors import StatsChangedError
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.fork import renew_after_fork

__all__ = [
    "Claim",
    "Stance",
    "Verdict",
    "count",
    "decide",
    "graph_order",
    "is_in_backward",
    "pay",
    "settle",
    "standing_order",
]

Stance = Literal["raise", "warn", "restore", "running", "recompute"]


class Judge(Protocol):
    """The block behind a claim, as far as a forward needs it.

    Attributes:
        only_watches: Whether the model is guarded without anybody having named it.
    """

    @property
    def only_watches(self) -> bool: ...  # see above

    def stopped(self, claim: Claim) -> StatsChangedError:
        """Records an update that was stopped; returns the error to raise."""

    def stood(self, claim: Claim) -> None:
        """Records an update that stands, and warns about the first one of the block."""

    def allowing(self, claim: Claim) -> Tensor | None:
        """Prepares for an update within the budget; the result is for ``allowed``."""

    def allowed(self, claim: Claim, deviation: Tensor | None) -> None:
        """Takes over what an update within the budget has written."""

    def recorded(self, claim: Claim) -> None:
        """Warns, once a block, that a program is taken off a layer in train mode that is held in eval mode."""

    def checkpointed(self, region: Region) -> None:
        """Records that a forward was held in a checkpointed region."""


class Claim:
    """One block's say about one layer.

    Attributes:
        judge: The block; None for a claim that holds or lets stand, and has nothing to say about it.
        owner: The layer's index in the block.
        stance: What becomes of an update beyond the budget. ``"running"`` is ``use_running_stats=True``;
            ``"recompute"`` holds what runs inside a backward pass and lets everything else stand.
        budget: Updates that the block allows the layer.
        spent: Updates within the budget so far.
        updates: Updates beyond the budget so far: those that stood, or were stopped.
        where: The user's line of the first one of those.
    """

    __slots__ = ("budget", "judge", "owner", "spent", "stance", "updates", "where")

    def __init__(self, judge: Judge | None, owner: int, stance: Stance, budget: int) -> None:
        self.judge = judge
        self.owner = owner
        self.stance: Stance = stance
        self.budget = budget
        self.spent = 0
        self.updates = 0
        self.where: str | None = None

    @property
    def court(self) -> Judge:
        """The block of a claim that raises, warns or counts."""
        assert self.judge is not None
        return self.judge


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to one forward that would update.

    Attributes:
        stance: ``"stand"``: it updates; ``"raise"``, ``"restore"``, ``"running"``: as the deciding claim says.
        decider: The claim that decided; None for ``"stand"``.
        warned: Claims under ``"warn"`` that see an update of theirs stand.
        within: Claims whose budget pays for it.
    """

    stance: Literal["stand", "raise", "restore", "running"]
    decider: Claim | None = None
    warned: tuple[Claim, ...] = ()
    within: tuple[Claim, ...] = ()


def standing_order(claims: Sequence[Claim]) -> Stance | None:
    """What happens to every update as long as ``claims`` stay; None where that depends on the forward."""
    for claim in claims:
        stance = claim.stance
        if claim.budget or stance == "recompute":
            return None
        if stance != "warn":
            return stance
    return "warn" if claims else None


def graph_order(claims: Sequence[Claim]) -> Stance | None:
    """The same in a compiled graph, where a recomputed forward is no forward of its own."""
    return standing_order([claim for claim in claims if claim.stance != "recompute"])


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass: what runs there is a recomputed forward."""
    return torch._C._current_graph_task_id() != -1


def decide(claims: Sequence[Claim]) -> Verdict:
    """Asks the innermost claim first; what it lets stand is up to the next one.

    A claim under ``"warn"``, and one with budget left, let the update stand. An update that a claim further out
    prevents never happens: nothing is recorded or spent for it.
    """
    warned: list[Claim] = []
    within: list[Claim] = []
    for claim in claims:
        if claim.spent < claim.budget:
            within.append(claim)
        elif claim.stance == "warn":
            warned.append(claim)
        elif claim.stance == "recompute":
            if is_in_backward():
                return Verdict("restore", claim)
        else:
            return Verdict(claim.stance, claim)
    return Verdict("stand", None, tuple(warned), tuple(within))


_lock: Final = threading.RLock()
renew_after_fork(_lock)


def settle(claims: Sequence[Claim]) -> Verdict:
    """Decides, and pays from the budgets in the same breath, so that two threads never share one update."""
    with _lock:
        verdict = decide(claims)
        for claim in verdict.within:
            claim.spent += 1
        return verdict


def pay(claim: Claim, updates: int) -> bool:
    """Pays for updates that were made unseen; False where the budget does not reach, or there were none."""
    with _lock:
        if not 0 < updates <= claim.budget - claim.spent:
            return False
        claim.spent += updates
        return True


def count(claim: Claim, where: str) -> bool:
    """Adds one update to a claim; True for the first."""
    with _lock:
        claim.updates += 1
        if claim.where is None:
            claim.where = where
        return claim.updates == 1
