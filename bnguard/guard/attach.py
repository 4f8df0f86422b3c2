"""Put the claims of a guard on layers and take them off, one thread at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from torch import nn

from bnguard.guard.batch_norm import BatchNormSentry
from bnguard.guard.layer_guard import HOLDING, Sentry, sentries
from bnguard.guard.policy import Claim, graph_order, standing_order
from bnguard.layers.kinds import BATCH_NORM, StatsLayer
from bnguard.torch_internals.turns import Turn

__all__ = ["attach", "detach", "is_any_held"]

_turn: Final = Turn()


def attach(
    layers: Sequence[StatsLayer], claims: Sequence[Claim], earlier: Sequence[Sentry] = (), *, outermost: bool = False
) -> list[Sentry]:
    """Puts each claim innermost on its layer. Where that fails, ``detach`` takes back what was done.

    Args:
        layers: The layers.
        claims: A claim for each, of one block.
        earlier: What an earlier call has returned: to be used again, which is cheaper than to make new ones.
        outermost: Whether the claims go around those that are there instead.

    Returns:
        What stands on each layer now.
    """
    if not claims:
        return []
    alone = claims[:1]  # all of a block say the same
    order, order_in_graphs = standing_order(alone), graph_order(alone)
    attached = []
    with _turn:
        candidates = itertools.chain(earlier, itertools.repeat(None))
        for layer, claim, candidate in zip(layers, claims, candidates, strict=False):
            module = layer.module
            sentry = sentries.get(id(module))
            if sentry is not None:
                standing = (*sentry.claims, claim) if outermost else (claim, *sentry.claims)
                sentry.set_claims(standing, standing_order(standing), graph_order(standing))
            else:
                if candidate is not None and candidate.serves_again(layer):
                    sentry = candidate
                else:
                    is_batch_norm = layer.kind is BATCH_NORM and "forward" not in module.__dict__
                    sentry = BatchNormSentry(layer) if is_batch_norm else Sentry(layer)
                sentries[sentry.key] = sentry
                sentry.set_claims((claim,), order, order_in_graphs)
            attached.append(sentry)
    return attached


def detach(layers: Sequence[StatsLayer], claims: Sequence[Claim], model: nn.Module) -> None:
    """Takes each claim off its layer of ``model``; the last one takes everything else along. Twice does nothing.

    Raises:
        BaseException: The first of what went wrong, after all that could be taken off is.
    """
    _turn.end(lambda: _detach(layers, claims, model))


def _detach(layers: Sequence[StatsLayer], claims: Sequence[Claim], model: nn.Module) -> None:
    failure: BaseException | None = None
    for layer, claim in zip(layers, claims, strict=True):
        sentry = sentries.get(id(layer.module))
        if sentry is None:
            continue
        try:
            left = sentry.claims
            if left:
                left = left[1:] if left[0] is claim else tuple([other for other in left if other is not claim])
            if left:
                sentry.set_claims(left, standing_order(left), graph_order(left))
                continue
            sentry.set_claims((), None, None)
            if sentry.hooks_out:
                _find_hooks(sentry, model)
            del sentries[sentry.key]  # only now: what was interrupted above can be done again
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _find_hooks(sentry: Sentry, model: nn.Module) -> None:
    """Removes the hook that is not on its layer any more."""
    for part in model.modules():
        sentry.unhook(part)


def is_any_held(layers: Sequence[StatsLayer]) -> bool:
    """Whether some guard still keeps forwards of one of the layers from updating."""
    with _turn:
        found = [sentry for layer in layers if (sentry := sentries.get(id(layer.module))) is not None]
        return any([claim.stance in HOLDING for sentry in found for claim in sentry.claims])
