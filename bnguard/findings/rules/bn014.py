"""BN014: statistics never learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule, Variant
from bnguard.findings.soundness import are_learned, is_initial, statistics_of_layer


class BN014(Rule):
    """The layer is evaluated with the statistics of a new layer."""

    code = "BN014"
    title = "statistics never learned"
    fix = "call bnguard.recalibrate(model, loader) before the evaluation"
    short_fix = "call bnguard.recalibrate() first"
    in_run = "{g.of} was trained while a guard held it and evaluated with mean 0 and variance 1, which it never left"
    in_brief = "{g.of} was evaluated with mean 0 and variance 1, which it never left"
    in_audit = "{g.of} {g.be} in eval mode with mean 0 and variance 1: no batch was ever counted"
    meaning = (
        "A guard has kept a layer from learning statistics, and the layer is evaluated with those of a new layer: mean "
        "0 and variance 1."
    )
    harm = (
        "Under 'restore' the model trains with the statistics of the batch, and eval mode then normalises with numbers "
        "that no batch has ever had. The training looks well, and the evaluation is close to chance."
    )
    example = """
        import torch
        from torch import nn

        import bnguard

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))  # from scratch
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with bnguard.frozen(model, "restore"):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(16, 4)).square().sum().backward()
                optimizer.step()
        model.eval()
        model(torch.randn(16, 4))
    """
    remedies = (
        "Call bnguard.recalibrate(model, loader) before the evaluation.",
        "Or load pretrained statistics before the guard begins.",
    )
    fine = "The data are known to have mean 0 and variance 1 at this layer."

    variants: ClassVar[Mapping[str, Variant]] = {
        "left behind": Variant(
            "{g.of} {g.have} learned parameters and ran in eval mode with mean 0 and variance 1, those of a new layer",
            "look whether the statistics were lost: other names in a checkpoint that was loaded with strict=False, or "
            "an average of the parameters alone. Load or copy them, or call bnguard.recalibrate(model, loader)",
            "load the statistics, or call bnguard.recalibrate(model, loader) first",
            "{g.of} ran in eval mode with mean 0 and variance 1, although with learned parameters",
        )
    }

    def __init__(self) -> None:
        self._held = 0

    def on_held(self) -> None:
        """Counts updates that a guard has prevented."""
        self._held += 1

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A layer that a guard has kept from learning, and that was evaluated all the same."""
        if not end.evaluations or end.updates or not is_initial(end.now):
            return
        if end.steps and self._held:
            yield Evidence(self.code, end.name, None, self._held)
        elif end.is_loaded or (not end.is_trained and are_learned(end.parameters_now)):
            yield Evidence(self.code, end.name, None, end.evaluations, None, "left behind")

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers in eval mode with initial statistics."""
        for layer in audited.layers:
            if not layer.module.training and is_initial(statistics_of_layer(layer.module, layer.buffers)):
                yield Evidence(cls.code, layer.names[0])
