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
