"""Put the claims of guards on layers and take them off, one thread at a time."""

from __future__ import annotations

import threading
from typing import Final

from torch import nn

from bnguard._batch_norm import BatchNormSentry
from bnguard._claims import Claim
from bnguard._fork import renew_after_fork
from bnguard._layers import BATCH_NORM, StatsLayer
from bnguard._sentry import HOLDING, Sentry, sentries

__all__ = ["attach", "detach", "is_held"]

# Reentrant: a signal handler may enter or leave a guard while the main thread does.
_lock: Final = threading.RLock()
renew_after_fork(_lock)


def attach(layer: StatsLayer, claim: Claim) -> None:
    """Puts ``claim`` innermost on the layer. Where it fails, ``detach`` takes back what was done."""
    with _lock:
        sentry = sentries.get(id(layer.module))
        if sentry is None:
            cls = BatchNormSentry if _is_batch_norm(layer) else Sentry
            sentry = sentries[id(layer.module)] = cls(layer)
        sentry.set_claims((claim, *sentry.claims))


def detach(module: nn.Module, claim: Claim, model: nn.Module) -> None:
    """Takes ``claim`` off a layer of ``model``; the last one takes everything else along. Twice does nothing."""
    with _lock:
        sentry = sentries.get(id(module))
        if sentry is None:
            return
        claims = tuple(other for other in sentry.claims if other is not claim)
        sentry.set_claims(claims)
        if sentry.hooks_out and not claims:  # not on the layer any more
            for part in model.modules():
                sentry.unhook(part)
        if not claims:  # only now: what was interrupted above can be done again
            del sentries[id(module)]


def is_held(module: nn.Module) -> bool:
    """Whether some guard still keeps forwards of the layer from updating."""
    with _lock:
        sentry = sentries.get(id(module))
        return sentry is not None and any([claim.stance in HOLDING for claim in sentry.claims])


def _is_batch_norm(layer: StatsLayer) -> bool:
    return layer.kind is BATCH_NORM and "forward" not in layer.module.__dict__
