"""BN008: eval mode undone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bnguard.findings.events import AuditedModel, Evaluation, LayerEnd, Update
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import is_frozen


class BN008(Rule):
    """The layer was put into eval mode by itself, and a train() of the model undid that."""

    code = "BN008"
    title = "eval mode undone"
    fix = "model.train() reaches every layer: guard the run instead of the mode, frozen(model, use_running_stats=True)"
    short_fix = "use frozen(model, use_running_stats=True)"
    in_run = "{g.of} had been put into eval mode, came back into train mode and updated from here on"
    in_brief = "{g.where} moved {g.count} that had been put into eval mode, before a train() undid it"
    in_audit = "{g.of} {g.be} in eval mode in a model in train mode: the next train() reaches them"

    def __init__(self) -> None:
        self._was_alone = False  # in eval mode, in a model that was being trained
        self._site: str | None = None  # of the first update after that

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Sees a layer in eval mode while its model is in train mode and learns; a frozen layer is meant to be."""
        module, model = evaluation
        if not self._was_alone and not module.training:
            self._was_alone = (
                model is not None
                and model is not module
                and model.training
                and torch.is_grad_enabled()
                and any([parameter.requires_grad for parameter in module.parameters(recurse=False)])
            )

    def on_eval_undone(self, site: str) -> None:
        """Sees that eval() was undone before any forward of the layer."""
        self._site = self._site or site

    def on_update(self, update: Update, module: nn.Module) -> None:
        """Sees the first update after that."""
        if self._was_alone and self._site is None and update.mode.training and not update.mode.calibration:
            self._site = update.site

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The line of that update."""
        if self._site is not None:
            yield Evidence(self.code, end.name, self._site, sum([update.count for update in end.updates]))

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers in eval mode in a model in train mode."""
        for layer in audited.layers if audited.model.training else ():
            module = layer.module
            if not module.training and module is not audited.model and not is_frozen(module):
                yield Evidence(cls.code, layer.names[0])
