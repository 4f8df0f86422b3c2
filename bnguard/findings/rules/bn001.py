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
    meaning = (
        "The parameters of a layer are frozen with requires_grad_(False), and forwards in train mode update its "
        "running statistics all the same."
    )
    harm = (
        "Running statistics are buffers. requires_grad_(False) is about parameters only, and model.train() reaches "
        "every layer. The frozen part changes with each batch: in eval mode it computes other features than those that "
        "it was trained for, and heads that were trained on it earlier no longer fit."
    )
    example = """
        import torch
        from torch import nn

        backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        backbone.requires_grad_(False)  # frozen, one would think
        head = nn.Linear(8, 2)
        model = nn.Sequential(backbone, head)
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
    """
    remedies = (
        (
            "Put bnguard.frozen(backbone, use_running_stats=True) around the training: the layers normalise with their "
            "running statistics, whatever train() says."
        ),
        "Or call backbone.eval() after each model.train().",
    )
    fine = (
        "The statistics are to adapt to new data while the weights stay, as in AdaBN and other methods of domain "
        "adaptation."
    )

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
