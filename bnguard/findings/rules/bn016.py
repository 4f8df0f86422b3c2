"""BN016: left behind."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import have_moved, is_initial


class BN016(Rule):
    """Something other than an optimizer moves the parameters, and nothing the statistics."""

    code = "BN016"
    title = "left behind"
    fix = (
        "move the statistics along: average or copy the buffers, too (AveragedModel(model, use_buffers=True)), or call "
        "bnguard.recalibrate(model, loader) before the evaluation"
    )
    short_fix = "copy the buffers, too, or call bnguard.recalibrate(model, loader) first"
    in_run = (
        "something other than an optimizer moved the parameters of {g.of}, nothing moved the statistics, and {g.times} "
        "they ran in eval mode"
    )
    in_brief = "{g.of} ran in eval mode with statistics that did not follow the parameters"

    meaning = (
        "An average, a federated round or a load moves the parameters of a model, nothing moves its statistics, and "
        "the model is evaluated."
    )
    harm = (
        "The statistics are those of other features than the parameters now compute. The evaluation is of neither "
        "model, and looks as if averaging did not work."
    )
    example = """
        import copy
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)


        def train():
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(16, 4)).square().mean().backward()
                optimizer.step()


        train()
        teacher = copy.deepcopy(model).eval()
        for _ in range(3):
            train()
            with torch.no_grad():
                for ours, theirs in zip(teacher.parameters(), model.parameters()):
                    ours.lerp_(theirs, 0.5)
                teacher(torch.randn(16, 4))
    """
    remedies = (
        "Average or copy the buffers as well: torch.optim.swa_utils.AveragedModel(model, use_buffers=True).",
        "Or call bnguard.recalibrate(model, loader) before the evaluation.",
    )
    fine = "The statistics are frozen on purpose, and so are those of the model that is averaged."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A layer of an average, a client or a target net; what was never learned is BN014."""
        if not end.steps or end.is_trained or end.updates or end.evaluations < 2:
            return
        has_followed = have_moved(end.before, end.now) or is_initial(end.now)
        if not has_followed and have_moved(end.parameters_before, end.parameters_now):
            yield Evidence(self.code, end.name, None, end.evaluations)
