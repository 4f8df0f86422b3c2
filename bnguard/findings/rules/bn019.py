"""BN019: a cumulative average that starts again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import is_initial, statistics_of_layer
from bnguard.layers.bits import count_of


class BN019(Rule):
    """The layer has learned statistics, momentum None and a counter of 0: the next batch replaces them."""

    code = "BN019"
    title = "a cumulative average that starts again"
    fix = (
        "momentum=None averages over num_batches_tracked batches: load or keep the counter with the statistics, or "
        "give the layer a momentum"
    )
    short_fix = "keep num_batches_tracked with the statistics"
    in_run = "{g.of} had learned statistics and num_batches_tracked 0: with momentum None the first batch replaced them"
    in_audit = (
        "{g.of} {g.have} learned statistics and num_batches_tracked 0: with momentum None the next batch replaces them"
    )

    meaning = (
        "With momentum None a layer averages over all batches that it has counted. This one has learned statistics, "
        "and a counter of 0."
    )
    harm = "The first batch in train mode replaces the statistics as a whole: what was learned before is gone."
    example = """
        import torch
        from torch import nn

        layer = nn.BatchNorm1d(4, momentum=None)
        layer.running_mean.fill_(3.0)
        layer(torch.randn(16, 4))
    """
    remedies = ("Load and save num_batches_tracked with the statistics.", "Or give the layer a momentum, as 0.1.")
    fine = "The statistics are to be learned anew from here on."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A layer that began so, and has updated."""
        sites = [site for site in end.updates if not site.mode.calibration]
        if end.momentum is None and sites and _starts_again(end.before):
            yield Evidence(self.code, end.name, sites[0].site)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers that would begin so."""
        for layer in audited.layers:
            if _averages(layer.module) and _starts_again(statistics_of_layer(layer.module, layer.buffers)):
                yield Evidence(cls.code, layer.names[0])


def _averages(module: nn.Module) -> bool:
    return getattr(module, "momentum", 0) is None


def _starts_again(statistics: Mapping[str, Tensor]) -> bool:
    return count_of(statistics) == 0 and "running_mean" in statistics and not is_initial(statistics)
