"""BN014: statistics never learned."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, Evaluation, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import is_initial, statistics_of_layer


class BN014(Rule):
    """The layer is evaluated with the statistics of a new layer."""

    code = "BN014"
    title = "statistics never learned"
    fix = "call bnguard.recalibrate(model, loader) before the evaluation"
    short_fix = "call bnguard.recalibrate() first"
    in_run = "{g.of} was trained while a guard held it and evaluated with mean 0 and variance 1, which it never left"
    in_brief = "{g.of} was evaluated with mean 0 and variance 1, which it never left"
    in_audit = "{g.of} {g.be} in eval mode with mean 0 and variance 1: no batch was ever counted"

    def __init__(self) -> None:
        self._held = 0
        self._evaluations = 0

    def on_held(self) -> None:
        """Counts updates that a guard has prevented."""
        self._held += 1

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Counts forwards in eval mode."""
        self._evaluations += not evaluation.module.training

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A layer that a guard has kept from learning, and that was evaluated all the same."""
        if end.has_stepped and self._held and self._evaluations and not end.updates and is_initial(end.now):
            yield Evidence(self.code, end.name, None, self._held)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers in eval mode with initial statistics."""
        for layer in audited.layers:
            if not layer.module.training and is_initial(statistics_of_layer(layer.module, layer.buffers)):
                yield Evidence(cls.code, layer.names[0])
