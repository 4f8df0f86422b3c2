"""BN012: broken statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import has_broken, statistics_of_layer


class BN012(Rule):
    """The statistics are NaN, infinite, or a negative variance."""

    code = "BN012"
    title = "broken statistics"
    severity = "error"
    fix = "restore a checkpoint from before, or call reset_running_stats() and torch.optim.swa_utils.update_bn()"
    short_fix = "restore a checkpoint from before"
    in_run = "{g.of} {g.have} NaN, infinite or negative statistics, and had {g.detail} at the beginning"
    in_brief = in_audit = "{g.of} {g.have} NaN, infinite or negative statistics"
    meaning = "Running statistics are NaN or infinite, or a variance is negative."
    harm = (
        "One bad batch is enough: the running mean keeps a NaN for good, since each new value contains the old one. In "
        "train mode the layer normalises with the batch, so the loss looks healthy, and eval mode gives NaN for every "
        "input."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        images = torch.randn(16, 4)
        images[0, 0] = float("nan")
        model(images)
    """
    remedies = (
        "Restore a checkpoint from before: bnguard.diff(before, after) says which ones are broken.",
        "Or call reset_running_stats() on the layers, and torch.optim.swa_utils.update_bn(loader, model).",
        "Find the batch: check the input and the loss for finite values before the forward.",
    )
    fine = "The model is thrown away, as in a test of what a bad batch does."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Whether the statistics are broken now, and were at the beginning."""
        if has_broken(end.now):
            yield Evidence(self.code, end.name, detail="them" if has_broken(end.before) else "none")

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers with broken statistics."""
        for layer in audited.layers:
            if has_broken(statistics_of_layer(layer.module, layer.buffers)):
                yield Evidence(cls.code, layer.names[0])
