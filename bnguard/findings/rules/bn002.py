"""BN002: train-mode forward without gradients."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN002(Rule):
    """The layer updates in train mode while autograd does not record."""

    code = "BN002"
    title = "train-mode forward without gradients"
    fix = "call model.eval() before it; for a teacher that is to stay in train mode, frozen(teacher, 'restore')"
    short_fix = "call model.eval() before it"
    in_run = "{g.of} made {g.updates} in train mode where autograd did not record"
    in_brief = "{g.where} moved {g.count}, {g.updates}, without gradients"

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that did so; calibration, and the first forward of a reentrant checkpoint, are meant."""
        counts: dict[str | None, int] = {}
        for update in end.updates:
            mode = update.mode
            if mode.training and not (mode.grad or mode.calibration or mode.recompute):
                counts[update.where] = counts.get(update.where, 0) + update.count
        for site, count in counts.items():
            yield Evidence(self.code, end.name, site, count)
