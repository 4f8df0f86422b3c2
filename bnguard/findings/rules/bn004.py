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
    meaning = (
        "One layer with running statistics is used in several places of a model, and updates several times in one "
        "forward."
    )
    harm = (
        "Each place sees another distribution, and one running mean cannot describe two. In train mode each call "
        "normalises with its own batch, so nothing looks wrong; in eval mode all of them use the mixture."
    )
    example = """
        import torch
        from torch import nn

        norm = nn.BatchNorm1d(4)
        model = nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 4), norm)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
    """
    remedies = ("Give each place a layer of its own. Weight and bias can still be shared: other.weight = norm.weight.",)
    fine = (
        "The places see the same distribution, as the branches of a siamese network do when they are fed from one data "
        "set."
    )

    def __init__(self) -> None:
        self._steps = 0  # in which one call of the model called the layer several times

    def on_step_end(self, step: StepEnd) -> None:
        """Counts a step in which one call of the module around the layer updated it several times."""
        if len(step.updates) < 2:
            return
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
