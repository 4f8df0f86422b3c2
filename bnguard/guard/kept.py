"""Keep a block on a model that has ended for the next guard of the model, whichever that is.

Note [Kept blocks]
~~~~~~~~~~~~~~~~~~
A block on a model that another one has been on costs less than the first: the model has been walked already. A guard
that is used again enters its last block once more. Where there is a new guard around each step, as in ``with
frozen(model):`` and in ``strict``, the block is kept here by model and by options. It refers to all modules weakly, and
to no model: the last reference to a model frees it, and the block goes with it. A guard takes it out, so that no other
guard has it at the same time. Only a block that has ended the short way is kept, and only one that nobody can ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

from bnguard.layers.by_identity import ByIdentity

if TYPE_CHECKING:
    from bnguard.guard.block import Block
    from bnguard.guard.options import Settings

_MOST: Final = 4  # guards of one model with different options, or in several threads
_kept: Final[ByIdentity[list[Block]]] = ByIdentity()


def keep(block: Block, model: nn.Module) -> None:
    """Keeps a block on a model that has ended, as long as the model lives. Nobody else must use it any more."""
    if block.resting and block.resting[0].release():
        if block.has_news:
            block.forget(block.resting[0])
        place = _kept.get(model)
        if place is None:
            _kept.put(model, place := [])
        place.append(block)
        del place[:-_MOST]


def take(model: nn.Module, settings: Settings) -> Block | None:
    """A block that has ended, with these settings; None if there is none.

    Nobody else gets it. Whether the model is as it was, ``claim()`` tells.
    """
    place = _kept.get(model)
    # Settings without a choice of layers are made once. A choice that is no name may be equal to anything.
    can_be_equal = bool(settings.include or settings.exclude) and settings.selects_by_name
    for block in tuple(place or ()):
        if block.settings is settings or (can_be_equal and block.settings == settings):
            try:
                place.remove(block)  # type: ignore[union-attr]  # it has items
            except ValueError:  # another thread has taken it
                continue
            return block
    return None
