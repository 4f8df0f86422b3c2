"""BN011: track_running_stats off on a layer that has statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

from torch import nn

from bnguard.findings.events import AuditedModel, Evaluation, LayerEnd, Update
from bnguard.findings.rule import Evidence, Rule, Variant
from bnguard.layers.kinds import INSTANCE_NORM

_MOST_BETWEEN: Final = 8  # forwards with the flag off between two updates


class BN011(Rule):
    """track_running_stats was switched off, which is no freeze."""

    code = "BN011"
    title = "track_running_stats off on a layer that has statistics"
    fix = (
        "for a freeze, use frozen(model, use_running_stats=True): train mode now normalises with the batch, and "
        "eval mode with the old statistics; to go on like this, use frozen(model, 'restore')"
    )
    short_fix = "use frozen(model, use_running_stats=True)"
    in_run = "{g.of} ran {g.times} in train mode with track_running_stats=False"
    in_audit = "{g.of} {g.have} statistics, and track_running_stats=False"
    variants: ClassVar[Mapping[str, Variant]] = {
        "single forwards": Variant(
            "{g.of} ran {g.times} in train mode with track_running_stats=False, in turn with forwards that update",
            "put frozen(model, 'restore') around the forwards that should not count, as those of VAT: unlike the flag, "
            "it ends after an exception, too",
            "put frozen(model, 'restore') around these forwards",
            severity="note",
        ),
        "instance": Variant(
            "{g.of}, of InstanceNorm, {g.have} statistics, and track_running_stats=False: eval mode normalises with "
            "each instance, and updates the statistics, too",
            "leave the flag on and use frozen(model, use_running_stats=True), or set running_mean and running_var to "
            "None",
            "leave track_running_stats on, or remove the statistics",
        ),
    }
    meaning = "A layer has running statistics, and track_running_stats is False while it runs in train mode."
    harm = (
        "The flag stops the updates, and it does not freeze the layer: in train mode it still normalises with the "
        "batch, and in eval mode with the old statistics, which do not belong to the weights that are trained now."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.track_running_stats = False
        model(torch.randn(16, 4)).sum().backward()
    """
    remedies = (
        "For a freeze, use bnguard.frozen(model, use_running_stats=True).",
        (
            "For a forward that normalises with the batch and updates nothing, use bnguard.frozen(model, 'restore'), "
            "which is undone after an exception too."
        ),
    )
    fine = (
        "The flag is off for single forwards, as in virtual adversarial training, and is put back after each of them, "
        "also after an exception."
    )

    def __init__(self) -> None:
        self._forwards = 0
        self._is_off = False  # at the last forward
        self._turns = 0  # back to updates

    def on_update(self, update: Update, module: nn.Module | None) -> None:
        """Counts how often the layer updates again."""
        self._turns += self._is_off
        self._is_off = False

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Counts forwards in train mode that do not track, although eval mode will use what was tracked before."""
        module = evaluation.module
        if module.training and not evaluation.is_held and _is_off(module):
            self._forwards += 1
            self._is_off = True

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """How often the layer ran so."""
        if self._forwards:
            takes_turns = self._turns > 1 and _MOST_BETWEEN * self._turns >= self._forwards
            yield Evidence(self.code, end.name, None, self._forwards, None, "single forwards" if takes_turns else "")

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers with the flag off."""
        for layer in audited.layers:
            if _is_off(layer.module):
                variant = "instance" if layer.kind is INSTANCE_NORM else ""
                yield Evidence(cls.code, layer.names[0], variant=variant)


def _is_off(module: nn.Module) -> bool:
    """Whether the flag is off on a layer that has a mean or a variance."""
    if getattr(module, "track_running_stats", True) is not False:
        return False
    return any([getattr(module, name, None) is not None for name in ("running_mean", "running_var")])
