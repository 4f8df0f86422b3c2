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
    in_run = "{g.of} made {g.updates} when activation checkpointing ran the forward again in backward"
    in_brief = "{g.where} moved {g.count} once more, {g.updates}, while a checkpoint was recomputed"

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line from which recomputed forwards updated the layer."""
        counts: dict[str, int] = {}
        for update in end.updates:
            if update.mode.recompute:
                counts[update.site] = counts.get(update.site, 0) + update.count
        for site, count in counts.items():
            yield Evidence(self.code, end.name, site, count)
