"""BN004: one layer, several places."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, LayerEnd, StepEnd
from bnguard.findings.rule import Evidence, Rule


class BN004(Rule):
    """One layer is used in several places of a model."""

    code = "BN004"
    title = "one layer, several places"
    audit_severity = "note"  # the forward may use one of the names only
    fix = "give each place a layer of its own: one running mean cannot describe two distributions"
    short_fix = "give each place a layer of its own"
    in_run = "one forward of the model called {g.of} several times, in {g.steps}"
    in_brief = "{g.where} runs {g.of} several times in one forward"
    in_audit = "{g.of} {g.be} used under several names"

    def __init__(self) -> None:
        self._steps = 0  # in which one call of the model called the layer several times

    def on_step_end(self, step: StepEnd) -> None:
        """Counts a step in which one call of the module around the layer updated it several times."""
        places = [(one.call, one.parent) for one in step.updates if one.mode.grad and not one.mode.recompute]
        self._steps += len(set(places)) < len(places)

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The line of the layer's first update."""
        if self._steps:
            yield Evidence(self.code, end.name, end.updates[0].site, self._steps)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers that are registered under several names."""
        for layer in audited.layers:
            if len(layer.names) > 1:
                yield Evidence(cls.code, " = ".join(layer.names))
