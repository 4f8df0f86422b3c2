"""BN002: train-mode forward without gradients."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN002(Rule):
    """The layer updates in train mode while autograd does not record."""

    code = "BN002"
    title = "train-mode forward without gradients"
    fix = "call model.eval() before it; for a teacher that is to stay in train mode, frozen(teacher, 'restore')"
    short_fix = "call model.eval() before it"
    in_run = "{g.of} made {g.updates} in train mode where autograd did not record"
    in_brief = "{g.where} moved {g.count}, {g.updates}, without gradients"
    meaning = (
        "A forward in train mode updates running statistics while autograd does not record, as in a validation loop."
    )
    harm = (
        "torch.no_grad() stops gradients and nothing else. The validation normalises with the batch, so its score "
        "depends on the batch size and on the order of the data, and its data leak into the statistics that the "
        "trained model uses."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        model.train()


        def validate(images):
            with torch.no_grad():
                return model(images)


        validate(torch.randn(16, 4))
    """
    remedies = (
        "Call model.eval() before the forward, and model.train() before the next step of training.",
        "For a teacher that is to stay in train mode, put bnguard.frozen(teacher, 'restore') around its forward.",
    )
    fine = (
        "The pass is there to estimate the statistics: torch.optim.swa_utils.update_bn() is known, a loop of your own "
        "is not. So is a forward that only finds out shapes, before the training begins."
    )

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that did so; calibration, and the first forward of a reentrant checkpoint, are meant."""
        counts: dict[str | None, int] = {}
        for update in end.updates:
            mode = update.mode
            if mode.training and not (mode.grad or mode.calibration or mode.recompute):
                counts[update.where] = counts.get(update.where, 0) + update.count
        for site, count in counts.items():
            yield Evidence(self.code, end.name, site, count)
