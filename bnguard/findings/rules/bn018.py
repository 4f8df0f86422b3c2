"""BN018: changed without a forward."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN018(Rule):
    """Something other than a forward writes into the statistics between two evaluations."""

    code = "BN018"
    title = "changed without a forward"
    fix = (
        "look for assignments to running_mean or running_var, and for other processes or threads that share them; "
        "frozen(model) around the evaluation says at its end what was written"
    )
    short_fix = "put frozen(model) around the evaluation"
    in_run = (
        "something other than a forward, a load_state_dict() or a reset wrote {g.times} into the statistics of {g.of}, "
        "between two evaluations"
    )
    in_brief = "something other than a forward changed {g.of} between two evaluations"

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A trained layer that was written to."""
        if end.rewritten:
            yield Evidence(self.code, end.name, None, end.rewritten)
