"""Keep what a block on a model has found out for the next block, whichever guard that is of.

Note [Kept blocks]
~~~~~~~~~~~~~~~~~~
A block on a model that another one has been on costs less than the first: the model has been walked already. A guard
that is used again has its last block. Where there is a new guard around each step, as in ``with frozen(model):`` and in
``strict``, what a block needs is kept here by model and by options. It refers to all modules weakly, and to no model:
the last reference to a model frees it, and what was kept goes with it. A block takes it out, so that no other block has
it at the same time. Only what the next block can begin the short way with is kept.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from bnguard.guard.again import Again
from bnguard.guard.options import Settings
from bnguard.layers.by_identity import ByIdentity

_MOST: Final = 4  # guards of one model with different options, or in several threads
_kept: Final[ByIdentity[list[Again]]] = ByIdentity()


def keep(again: Again) -> None:
    """Keeps what an ended block on a model needed, as long as the model lives. The block must not use it any more."""
    model = again.tree.model
    place = _kept.get(model)
    if again.release():
        if place is None:
            _kept.put(model, place := [])
        place.append(again)
        del place[:-_MOST]


def take(model: nn.Module, settings: Settings) -> Again | None:
    """What an ended block with these settings has left; None if there is none, or a part of the model is gone.

    Nobody else gets it. Whether the model has changed otherwise, ``is_ready`` tells.
    """
    place = _kept.get(model)
    for again in tuple(place or ()):
        if again.settings is settings or (settings.selects_by_name and again.settings == settings):
            try:
                place.remove(again)  # type: ignore[union-attr]  # it has items
            except ValueError:  # another thread has taken it
                continue
            return again if again.recover() else None
    return None
