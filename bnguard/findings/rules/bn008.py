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
    meaning = (
        "A layer had been put into eval mode by itself, a later train() of the model put it back into train mode, and "
        "it updates again."
    )
    harm = (
        "train() sets the mode of every layer below. An eval() on single layers lasts until the next train(), which "
        "may be in a trainer's loop or at the end of a validation. From there on the layers are frozen no longer, and "
        "nothing says so."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        model.train()
        model[1].eval()  # meant for the whole training
        for _ in range(2):
            model(torch.randn(16, 4)).sum().backward()
            model.train()  # the next epoch
    """
    remedies = (
        (
            "Guard the run and not the mode: bnguard.frozen(model, include='1', use_running_stats=True) around the "
            "training."
        ),
        "Or repeat the eval() of the layers after each train().",
    )
    fine = "The layers were in eval mode for a while on purpose, for a warm-up for example, and train() is to end that."

    def __init__(self) -> None:
        self._was_alone = False  # in eval mode, in a model that was being trained
        self._site: str | None = None  # of the first update after that

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Sees a layer in eval mode while its model is in train mode and learns; a frozen layer is meant to be."""
        module, model = evaluation.module, evaluation.model
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

    def on_update(self, update: Update, module: nn.Module | None) -> None:
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
