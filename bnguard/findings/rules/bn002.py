"""BN002: train-mode forward that nothing learns from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import torch

from bnguard.findings.events import Evaluation, LayerEnd, StepEnd, UpdateSite
from bnguard.findings.line_counts import LineCounts
from bnguard.findings.rule import Evidence, Rule, Variant
from bnguard.findings.soundness import have_moved

_RECALIBRATION: Final = re.compile(
    r"(?=.*(bn|norm|stat))(?=.*(updat|calib|precise|estimat|refresh|recomput|adapt))", re.I
)
_FEW: Final = 0.05  # of the forwards of a line: those may be a batch that was skipped


class BN002(Rule):
    """The layer updates in train mode, and no gradient comes of the forward."""

    code = "BN002"
    title = "train-mode forward that nothing learns from"
    fix = "call model.eval() before it; for a teacher that is to stay in train mode, frozen(teacher, 'restore')"
    short_fix = "call model.eval() before it"
    fix_in_library = (
        "override the method in which the library calls the model, and call model.eval() there; if nothing is to be "
        "learned in your call, put frozen(model, 'restore') around it"
    )
    in_run = "{g.of} made {g.updates} in train mode where autograd did not record"
    in_brief = "{g.where} moved {g.count}, {g.updates}, without gradients"
    variants: ClassVar[Mapping[str, Variant]] = {
        "unused": Variant(
            "{g.of} made {g.updates} in train mode, and no backward pass went through the results",
            "call model.eval() before it, and torch.no_grad() around it; where the batch is to normalise, "
            "frozen(model, 'restore')",
            short_fix,
            "{g.where} moved {g.count}, {g.updates}, in forwards that nothing learned from",
            fix_in_library=fix_in_library,
        ),
        "teacher": Variant(
            "{g.of}, which {g.be} not trained, made {g.updates} in train mode without gradients{g.detail}",
            "call eval() on the teacher, also after each train() of the model that contains it, or put "
            "frozen(teacher, 'restore') around it: its statistics then stay those that it was trained with",
            "put frozen(teacher, 'restore') around it, or call its eval()",
            "{g.where} moved {g.count} of a part that is not trained, {g.updates}",
        ),
    }
    meaning = (
        "A forward in train mode updates running statistics, and no gradient comes of it: it runs without gradients, "
        "as in a validation loop, or no backward pass goes through its result."
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
        "The pass is there to estimate the statistics. Known are torch.optim.swa_utils.update_bn(), a loop after "
        "reset_running_stats(), one with another momentum than the training has, and a function with a name such as "
        "update_bn_stats()."
    )

    def __init__(self) -> None:
        self._evaluations = 0
        self._held = 0
        self._for_rivals = LineCounts()  # forwards for a step of another model's optimizer

    def on_step_end(self, step: StepEnd) -> None:
        """Counts forwards whose results another model learns from, as a critic does from what a generator makes."""
        if step.is_of_rival:
            for update in step.updates:
                if not update.has_learned:
                    self._for_rivals.add(update.site)

    def on_held(self) -> None:
        """Counts forwards that a guard holds: which ones count has been chosen then."""
        self._held += 1

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Counts forwards in eval mode with gradients, in which normalisers of reinforcement learning are trained."""
        self._evaluations += not evaluation.module.training and torch.is_grad_enabled()

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that did so, unless it was meant."""
        learning = [site for site in end.updates if site.learned]
        if self._evaluations and end.is_trained and not learning:
            return
        momenta = {momentum for site in learning for momentum in site.momenta}
        counts: dict[tuple[str, str, str], int] = {}
        for site in end.updates:
            number = _wasted(site, end.learned.get(site.site, 0), is_alone=end.steps > 0 or not end.is_loaded)
            if learning:
                number -= min(number, self._for_rivals.get(site.part or site.site, 0))
            is_chosen = site.mode.grad and self._held >= number
            if number and not is_chosen and not _recalibrates(site, momenta):
                kind = "" if not site.mode.grad else "unused"
                detail = ""
                if not site.mode.grad and (site.part or (end.steps and not end.is_trained)):
                    if not end.is_trained and have_moved(end.parameters_before, end.parameters_now):
                        continue  # an average of the model that is trained
                    if not end.is_trained:
                        kind = "teacher"
                        detail = f", inside the model that was called at {site.site}" if site.part else ""
                key = site.part or site.site, kind, detail
                counts[key] = counts.get(key, 0) + number
        for (where, kind, detail), count in counts.items():
            yield Evidence(self.code, end.name, where, count, detail or None if kind != "teacher" else detail, kind)


def _wasted(site: UpdateSite, learned: int, *, is_alone: bool) -> int:
    """How many of the updates nothing learned from.

    Args:
        site: The updates of one line.
        learned: How many of its forwards other layers learned from: this one may be at a dead end of the model.
        is_alone: Whether a single forward with gradients is no sign: it may look at shapes, or have been skipped.
    """
    mode = site.mode
    if not mode.training or mode.calibration or mode.recompute:
        return 0
    if not mode.grad:
        return site.count - site.recalibrating
    wasted = site.results - max(site.learned, learned) - site.recalibrating
    return wasted if wasted >= max(1 + is_alone, _FEW * site.results) else 0


def _recalibrates(site: UpdateSite, momenta: set[object]) -> bool:
    """Whether the statistics are learned anew on purpose: by another momentum than in training, or by name."""
    if momenta and site.momenta.isdisjoint(momenta):
        return True
    return any([_RECALIBRATION.search(function) for function in re.findall(r" in (\w+)", site.site)])
