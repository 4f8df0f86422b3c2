"""BN001: frozen parameters, moving statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bnguard.findings.events import AuditedModel, LayerEnd, Update
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import is_frozen

_MOST_LINES: Final = 16


class BN001(Rule):
    """The layer updates although its parameters are frozen."""

    code = "BN001"
    title = "frozen parameters, moving statistics"
    fix = (
        "requires_grad_(False) does not stop running statistics: put frozen(model, use_running_stats=True) around"
        " the training, or call eval() on these layers after each train()"
    )
    short_fix = "use frozen(model, use_running_stats=True)"
    in_run = "{g.of} made {g.updates} although no parameter of theirs is trained"
    in_brief = "{g.where} moved {g.count}, {g.updates}, whose parameters are frozen"
    in_audit = "{g.of} {g.be} in train mode although no parameter of theirs is trained: statistics will move"

    def __init__(self) -> None:
        self._updates: dict[str, int] = {}  # by line
        # Parameters may be frozen for a while, as those of a discriminator are in the step of the generator.
        self._was_trained = False

    def on_update(self, update: Update) -> None:
        """Counts updates of a frozen layer."""
        if not update.is_frozen:
            self._was_trained = True
        elif not (update.mode.grad and update.mode.training):
            return
        elif update.site in self._updates or len(self._updates) < _MOST_LINES:
            self._updates[update.site] = self._updates.get(update.site, 0) + 1

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that updated the layer, unless its parameters were trained at some time."""
        if not self._was_trained:
            for site, count in self._updates.items():
                yield Evidence(self.code, end.name, site, count)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers whose parameters are frozen, and whose next forward would update."""
        for layer in audited.layers:
            predict = layer.kind.predict
            if predict is not None and is_frozen(layer.module) and predict(layer.module):
                yield Evidence(cls.code, layer.names[0])
