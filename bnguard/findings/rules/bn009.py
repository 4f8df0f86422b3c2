"""BN009: statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import half_precision_of, statistics_of_layer


class BN009(Rule):
    """The layer's statistics are kept in float16, bfloat16 or less."""

    code = "BN009"
    title = "statistics in half precision"
    fix = "keep the statistics in float32 (layer.float()) and use torch.autocast: small updates are rounded away"
    short_fix = "keep them in float32"
    in_run = "{g.of} {g.have} statistics in {g.detail}"
    meaning = "The running statistics of a layer are kept in float16, bfloat16 or less."
    harm = (
        "An update adds a tenth of the difference to the old value. bfloat16 has 8 bits of precision: what is smaller "
        "than 1/256 of the value is rounded away, so the statistics stop short of the values that they should have. In "
        "float16 a variance above 65504 is infinite."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).bfloat16()
        model(torch.randn(16, 4, dtype=torch.bfloat16)).sum().backward()
    """
    remedies = (
        "Keep the model in float32, and use torch.autocast for the forward: it leaves the statistics in float32.",
        (
            "Or call layer.float() on these layers after model.half(); torch's BatchNorm takes input in half precision "
            "all the same."
        ),
    )
    fine = "The model only evaluates: then nothing is rounded away, and only the values themselves are coarse."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The dtype of a layer that has updated."""
        half = half_precision_of(end.now)
        if end.updates and half is not None:
            yield Evidence(self.code, end.name, detail=half)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """The dtype of each layer."""
        for layer in audited.layers:
            half = half_precision_of(statistics_of_layer(layer.module, layer.buffers))
            if half is not None:
                yield Evidence(cls.code, layer.names[0], detail=half)
