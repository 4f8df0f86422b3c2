"""BN003: several updates per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bnguard.findings.events import Forward, LayerEnd, StepEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.words import listing, times_text

_MOST_PATTERNS: Final = 16


@dataclass(slots=True)
class MultiUpdateSteps:
    """Optimizer steps in which certain lines updated the layer several times.

    Attributes:
        steps: How many steps there were.
        most: Most updates in one of them.
    """

    steps: int = 0
    most: int = 0


class BN003(Rule):
    """Several forwards of one optimizer step update the layer."""

    code = "BN003"
    title = "several updates per optimizer step"
    fix = (
        "run the batches through the model in one forward, or choose which forward counts: frozen(model, "
        "'restore') around the others, or frozen(model, 'restore', updates=1) around the step"
    )
    short_fix = "run the batches in one forward, or use frozen(model, 'restore', updates=1)"
    in_run = "{g.of} updated up to {g.detail[0]} in {g.steps}, from {g.detail[1]}"
    in_brief = "{g.detail[2]} moved {g.count} up to {g.detail[0]} an optimizer step"
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
    )
    fine = (
        "The batches come from one distribution, or the recipe that you reproduce does the same, as most code for GANs "
        "does."
    )

    def __init__(self) -> None:
        self._steps: dict[tuple[str, ...], MultiUpdateSteps] = {}  # by the lines of all updates of the step

    def on_step_end(self, step: StepEnd) -> None:
        """Counts a step with several updates, unless they are those of gradient accumulation or of one forward."""
        forwards = step.forwards
        if not any([_is_extra(forward, forwards[:number]) for number, forward in enumerate(forwards)]):
            return
        sites = tuple(sorted({forward.site for forward in forwards}))
        if sites in self._steps or len(self._steps) < _MOST_PATTERNS:
            steps = self._steps.setdefault(sites, MultiUpdateSteps())
            steps.steps += 1
            steps.most = max(steps.most, step.updates)

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each group of lines; two updates in a single step may be a first forward that only looks at shapes."""
        if end.has_stepped:
            for sites, steps in self._steps.items():
                if steps.steps >= 2 or steps.most >= 3:
                    lines = "that line" if len(sites) == 1 else " and ".join(sites)
                    detail = times_text(steps.most), lines, listing(sites)
                    yield Evidence(self.code, end.name, sites[0], steps.steps, detail)


def _is_extra(forward: Forward, earlier: tuple[Forward, ...]) -> bool:
    """Whether a forward is one too many after the earlier ones of its step."""
    if not earlier or any([other.call == forward.call for other in earlier]):  # one call of the model: see BN004
        return False
    same_line = [other for other in earlier if other.site == forward.site]
    # A backward pass between two forwards of a line: gradients are accumulated.
    return not same_line or any([other.backward == forward.backward for other in same_line])
