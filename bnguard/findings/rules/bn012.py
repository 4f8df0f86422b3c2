"""BN012: broken statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import has_broken, statistics_of_layer
from bnguard.words import listing


class BN012(Rule):
    """The statistics are NaN, infinite, or a negative variance."""

    code = "BN012"
    title = "broken statistics"
    severity = "error"
    fix = "restore a checkpoint from before, or call reset_running_stats() and torch.optim.swa_utils.update_bn()"
    short_fix = "restore a checkpoint from before"
    in_run = "{g.of} {g.have} NaN, infinite or negative statistics, {g.detail}"
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
        """Whether the statistics are broken now, since when, and which lines updated them at that time."""
        if not has_broken(end.now):
            return
        were_broken = has_broken(end.before)
        if end.broken is None or were_broken:
            yield Evidence(self.code, end.name, detail=f"and had {'them' if were_broken else 'none'} at the beginning")
            return
        sound, broken = end.broken
        between = [one.site for one in end.updates if one.first_step < max(broken, 1) and one.last_step >= sound]
        lines = list(dict.fromkeys(between))
        by = listing(lines) if lines else "no forward that was seen"
        detail = f"which were sound at optimizer step {sound} and broken at step {broken}: {by} updated them in between"
        yield Evidence(self.code, end.name, lines[0] if len(lines) == 1 else None, detail=detail)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers with broken statistics."""
        for layer in audited.layers:
            if has_broken(statistics_of_layer(layer.module, layer.buffers)):
                yield Evidence(cls.code, layer.names[0])
