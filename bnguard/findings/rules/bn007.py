"""BN007: momentum by another convention."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import AuditedModel, LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import has_inverted_momentum


class BN007(Rule):
    """The layer's momentum is that of Keras, which means the opposite."""

    code = "BN007"
    title = "momentum by another convention"
    fix = "in torch new = (1 - momentum) * old + momentum * batch: write 0.1 for Keras' 0.9, 0.01 for 0.99"
    short_fix = "write 0.1 for Keras' 0.9"
    in_run = "{g.of} {g.have} momentum {g.detail}: the running statistics are those of the last batches"
    in_brief = "{g.of} {g.have} momentum {g.detail}, and remember the last batches only"
    meaning = (
        "The momentum of a layer is 0.9 or larger, which is what Keras and TensorFlow write for torch's 0.1 or less."
    )
    harm = (
        "In torch new = (1 - momentum) * old + momentum * batch. With 0.9 the running statistics are those of the last "
        "batch or two, so the score in eval mode depends on which batches came last."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.9))
        model(torch.randn(16, 4)).sum().backward()
    """
    remedies = ("Write 1 - momentum: 0.1 for Keras' 0.9, 0.01 for 0.99.",)
    fine = (
        "The statistics are to follow the latest batches, as in some kinds of test-time adaptation. momentum=1.0 and "
        "momentum=None are taken for meant."
    )

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The momentum of a layer that has updated."""
        if end.updates and has_inverted_momentum(end.momentum):
            yield Evidence(self.code, end.name, detail=end.momentum)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """The momentum of each layer."""
        for layer in audited.layers:
            momentum = getattr(layer.module, "momentum", None)
            if has_inverted_momentum(momentum):
                yield Evidence(cls.code, layer.names[0], detail=momentum)
