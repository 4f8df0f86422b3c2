"""BN005: recomputed forward."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN005(Rule):
    """Activation checkpointing runs the forward of the layer again in backward."""

    code = "BN005"
    title = "recomputed forward"
    fix = "pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model) to torch.utils.checkpoint.checkpoint"
    short_fix = "pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model) to checkpoint()"
    fix_in_library = "put bnguard.recompute_frozen(model) around your call, with use_reentrant=False in its options"
    in_run = "{g.of} made {g.updates} when activation checkpointing ran the forward again in backward"
    in_brief = "{g.where} moved {g.count} once more, {g.updates}, while a checkpoint was recomputed"
    meaning = (
        "Activation checkpointing runs a forward a second time in backward, and the layer updates a second time from "
        "the same batch."
    )
    harm = (
        "Each batch counts twice, which is a larger momentum than the one that you have set: 1 - (1 - momentum)**2, "
        "0.19 instead of 0.1. The layers inside the checkpoint and those outside no longer follow one schedule, and "
        "num_batches_tracked is wrong."
    )
    example = """
        import torch
        from torch import nn
        from torch.utils.checkpoint import checkpoint

        block = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        features = checkpoint(block, torch.randn(16, 4), use_reentrant=False)
        features.sum().backward()
    """
    remedies = (
        "Pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model) to torch.utils.checkpoint.checkpoint.",
        "Or choose a momentum with which two updates have the effect of one: 0.051 for 0.1.",
    )
    fine = (
        "The momentum was chosen with checkpointing on. A compiled graph updates once anyway, and has no such finding."
    )

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line from which recomputed forwards updated the layer."""
        return self.by_line(end, lambda mode: mode.recompute)
