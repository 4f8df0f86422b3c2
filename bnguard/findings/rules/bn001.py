"""BN001: frozen parameters, moving statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from bnguard.findings.events import AuditedModel, LayerEnd, StepEnd, Update
from bnguard.findings.line_counts import LineCounts
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import have_moved, is_frozen

_MOST_PHASES: Final = 16
_SHORTEST: Final = 4  # steps, of a phase in which a layer is frozen that is trained at other times
_LONG: Final = 16
_FEW: Final = 3  # phases


class BN001(Rule):
    """The layer updates although its parameters are frozen."""

    code = "BN001"
    title = "frozen parameters, moving statistics"
    fix = (
        "requires_grad_(False) does not stop running statistics: put frozen(model, use_running_stats=True) around"
        " the training, or call eval() on these layers after each train()"
    )
    short_fix = "use frozen(model, use_running_stats=True)"
    in_run = "{g.of} made {g.updates} although none of their parameters is trained"
    in_brief = "{g.where} moved {g.count}, {g.updates}, whose parameters are frozen"
    in_audit = "{g.of} {g.be} in train mode although none of their parameters is trained: statistics will move"
    meaning = (
        "The parameters of a layer are frozen with requires_grad_(False), and forwards in train mode update its "
        "running statistics all the same."
    )
    harm = (
        "Running statistics are buffers. requires_grad_(False) is about parameters only, and model.train() reaches "
        "every layer. The frozen part changes with each batch: in eval mode it computes other features than those that "
        "it was trained for, and heads that were trained on it earlier no longer fit."
    )
    example = """
        import torch
        from torch import nn

        backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        backbone.requires_grad_(False)  # frozen, one would think
        head = nn.Linear(8, 2)
        model = nn.Sequential(backbone, head)
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
    """
    remedies = (
        (
            "Put bnguard.frozen(backbone, use_running_stats=True) around the training: the layers normalise with their "
            "running statistics, whatever train() says."
        ),
        "Or call backbone.eval() after each model.train().",
    )
    fine = (
        "The statistics are to adapt to new data while the weights stay, as in AdaBN and other methods of domain "
        "adaptation."
    )

    def __init__(self) -> None:
        self._updates = LineCounts()  # of phases that are over
        self._phase = LineCounts()  # of the one that goes on
        self._steps = 0  # of that
        self._phases: list[int] = []  # how many steps each had
        self._was_trained = False
        self._has_gradients = False  # of an update: whether an optimizer has its parameters is known after the step
        self._beside = LineCounts()  # updates before steps of another model's optimizer

    def on_update(self, update: Update, module: nn.Module | None) -> None:
        """Sees whether the parameters seem to be trained."""
        if module is not None and not (update.is_frozen or self._was_trained or self._has_gradients):
            # Parameters that were computed, as those of a clone in meta-learning, are those of another module.
            self._was_trained = any([getattr(one, "grad_fn", None) is not None for one in module._parameters.values()])
            self._has_gradients = True

    def on_step_end(self, step: StepEnd) -> None:
        """Tells a step in which the layer was frozen from one in which it was trained."""
        updates = [one for one in step.updates if one.mode.grad and one.mode.training and not one.mode.recompute]
        if not updates:
            return
        is_left_out = step.is_trained is False and all([update.has_learned for update in updates])
        is_frozen = all([update.is_frozen for update in updates])
        if is_left_out and step.is_of_rival and not is_frozen:
            for update in updates:
                self._beside.add(update.site)
        elif is_left_out or is_frozen:
            self._steps += 1
            for update in updates:
                self._phase.add(update.site)
        else:
            # Parameters may be frozen for a while, as those of a discriminator are in the step of the generator.
            self._was_trained = True
            self._end_phase()

    def _end_phase(self) -> None:
        if self._steps >= _SHORTEST:
            if len(self._phases) < _MOST_PHASES:
                self._phases.append(self._steps)
            for site, count in self._phase.items():
                self._updates.add(site, count)
        self._phase, self._steps = LineCounts(), 0

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that updated the layer while it was frozen."""
        counts = dict(self._phase)
        phases = [*self._phases, self._steps]
        if self._was_trained:
            if self._steps < _SHORTEST:
                counts, phases = {}, self._phases
            for site, count in self._updates.items():
                counts[site] = counts.get(site, 0) + count
            if len(phases) > _FEW and max(phases) < _LONG:
                return
        if not (self._was_trained or end.is_trained):
            for site, count in self._beside.items():
                counts[site] = counts.get(site, 0) + count
        is_left_out = self._has_gradients and not self._was_trained
        if is_left_out and sum(counts.values()) < _SHORTEST:
            return  # the run may have ended before the first step of an optimizer of the layer
        if is_left_out and have_moved(end.parameters_before, end.parameters_now):
            return  # by other means than an optimizer
        for site, count in counts.items():
            yield Evidence(self.code, end.name, site, count)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """Layers whose parameters are frozen, and whose next forward would update."""
        for layer in audited.layers:
            predict = layer.kind.predict
            if predict is not None and is_frozen(layer.module) and predict(layer.module):
                yield Evidence(cls.code, layer.names[0])
