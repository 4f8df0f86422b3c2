"""BN003: several updates per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from bnguard.findings.events import LayerEnd, StepEnd, Update
from bnguard.findings.rule import Evidence, Rule, Variant
from bnguard.words import listing, times_text

_MOST_PATTERNS: Final = 16
_OFTEN: Final = 20  # steps of a critic for one of its rival


@dataclass(slots=True, eq=False, repr=False)
class MultiUpdateSteps:
    """Optimizer steps in which certain lines updated the layer several times.

    Attributes:
        steps: How many steps there were.
        most: Most updates in one of them.
        inside: In how many of them the updates were those of one call of the model.
    """

    steps: int = 0
    most: int = 0
    inside: int = 0


class BN003(Rule):
    """Several forwards of one optimizer step update the layer."""

    code = "BN003"
    title = "several updates per optimizer step"
    fix = (
        "choose which forward counts: frozen(model, 'restore') around the others, or frozen(model, 'restore', "
        "updates=1) around the step, and each batch is normalised as now; or run the batches through the model in one "
        "forward, which normalises them together. recalibrate(model, loader) learns the statistics anew"
    )
    short_fix = "use frozen(model, 'restore', updates=1) around the step"
    fix_in_library = (
        "override the method in which the library makes a step, and put frozen(model, 'restore', updates=1) around it; "
        "or call bnguard.recalibrate(model, loader) when the training is over"
    )
    in_run = (
        "{g.of} updated up to {g.detail[0]} before one optimizer step, and several times before {g.number} of the "
        "run's {g.detail[3]} optimizer steps, from {g.detail[1]}"
    )
    in_brief = "{g.detail[2]} moved {g.count} up to {g.detail[0]} an optimizer step"
    variants: ClassVar[Mapping[str, Variant]] = {
        "shared": Variant(
            "one forward of the model ran {g.of} up to {g.detail[0]}, with the part around it, in {g.steps}",
            "nothing, if all inputs are of one kind: the statistics are those of all of them. Else hold them in some "
            "of the calls with frozen(part, 'restore'), or run the inputs through the part in one batch",
            "nothing, if all inputs are of one kind",
            "{g.where} runs {g.count} up to {g.detail[0]} in one forward of the model",
            "note",
        ),
        "rival": Variant(
            "{g.of} updated up to {g.detail[0]} for each step of its own optimizer, from {g.detail[1]}",
            "nothing, if the model is to learn the statistics of both. Else use "
            "frozen(model, 'restore') around the forwards that should not count",
            "nothing, if the model is to learn the statistics of both",
            "{g.detail[2]} moved {g.count} up to {g.detail[0]} for each step of its own optimizer",
            "note",
        ),
    }
    meaning = (
        "Several forwards of one optimizer step update the same layer: anchor, positive and negative, real and fake "
        "images, or both passes of SAM."
    )
    harm = (
        "The running statistics become a mixture of the distributions of these batches, in which the last forward "
        "counts most. In eval mode every input is normalised with that mixture, which is none of the distributions "
        "that the model was trained with."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            real, fake = torch.randn(16, 4), torch.randn(16, 4) + 3
            optimizer.zero_grad()
            score_of_real = model(real)
            score_of_fake = model(fake)
            (score_of_fake.mean() - score_of_real.mean()).backward()
            optimizer.step()
    """
    remedies = (
        "Run the batches through the model in one forward: model(torch.cat([real, fake])).chunk(2).",
        (
            "Or choose the forward that counts: bnguard.frozen(model, 'restore') around the others, or "
            "bnguard.frozen(model, 'restore', updates=1) around the step."
        ),
        "After a training that has mixed them, bnguard.recalibrate(model, loader) learns the statistics anew.",
    )
    fine = (
        "The batches come from one distribution, or the recipe that you reproduce does the same, as most code for GANs "
        "does."
    )

    def __init__(self) -> None:
        self._steps: dict[tuple[str, ...], MultiUpdateSteps] = {}  # by the lines of all updates of the step
        self._of_rivals = 0  # steps of an optimizer of another model, in which the layer updated
        self._rival_sites: set[str] = set()
        self._trained = 0
        self._round = 0  # updates since the last step of its own optimizer
        self._most = 0  # of a round

    def on_step_end(self, step: StepEnd) -> None:
        """Counts a step with several updates, unless they are those of gradient accumulation or of one forward."""
        self._of_rivals += step.is_of_rival
        self._trained += bool(step.is_trained)
        updates = [one for one in step.updates if _counts(one)]
        self._round += len(updates)
        if step.is_of_rival and len(self._rival_sites) < _MOST_PATTERNS:
            self._rival_sites.update([one.site for one in updates])
        if step.is_trained:
            self._most, self._round = max(self._most, self._round), 0
        if len(updates) < 2:
            return
        shared = _is_shared(updates)
        if not shared and not any([_is_extra(update, updates[:number]) for number, update in enumerate(updates)]):
            return
        sites = tuple(sorted({update.site for update in updates}))
        if sites in self._steps or len(self._steps) < _MOST_PATTERNS:
            steps = self._steps.setdefault(sites, MultiUpdateSteps())
            steps.steps += 1
            most = len(updates) if len(updates) < len(step.updates) else step.total
            steps.most = max(steps.most, most)
            steps.inside += shared

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each group of lines; two updates in a single step may be a first forward that only looks at shapes."""
        is_rival = self._of_rivals >= 2 and _OFTEN * self._of_rivals >= self._trained
        for sites, steps in self._steps.items() if end.steps else ():
            if steps.steps < 2 and steps.most < 3:
                continue
            variant = "shared" if steps.inside == steps.steps else "rival" if is_rival else ""
            lines, most = list(sites), steps.most
            if variant == "rival":
                lines += sorted(self._rival_sites.difference(sites))
                most = max(most, self._most)
            called = "that line" if len(lines) == 1 else listing(lines)
            detail = times_text(most), called, listing(lines), end.steps
            yield Evidence(self.code, end.name, sites[0], steps.steps, detail, variant)


def _counts(update: Update) -> bool:
    """Whether it is one of a forward that is learned from; what nothing learns from is BN002."""
    mode = update.mode
    return mode.grad and mode.training and not mode.recompute and update.has_learned is not False


def _is_shared(updates: Sequence[Update]) -> bool:
    """Whether all are of one call of the model, in which the part around the layer ran several times."""
    return len({one.call for one in updates}) == 1 and len({one.parent for one in updates}) > 1


def _is_extra(update: Update, earlier: Sequence[Update]) -> bool:
    """Whether an update is one too many after the earlier ones of its step."""
    if not earlier or any([other.call == update.call for other in earlier]):  # one call of the model: see BN004
        return False
    same_line = [other for other in earlier if other.site == update.site]
    # A backward pass between two forwards of a line: gradients are accumulated.
    return not same_line or any([other.backward == update.backward for other in same_line])
