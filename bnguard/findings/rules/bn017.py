"""BN017: updates in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN017(Rule):
    """The layer updates in eval mode."""

    code = "BN017"
    title = "updates in eval mode"
    fix = (
        "InstanceNorm normalises with each instance and updates in eval mode, too, once track_running_stats is False: "
        "leave the flag on and use frozen(model, use_running_stats=True), or set running_mean and running_var to None; "
        "in a layer of your own, update only where self.training is True"
    )
    short_fix = "leave track_running_stats on, or use frozen(model, use_running_stats=True)"
    in_run = "{g.of} made {g.updates} in eval mode"
    in_brief = "{g.where} moved {g.count} in eval mode, {g.updates}"

    meaning = "A forward in eval mode updates running statistics."
    harm = (
        "Each evaluation changes the model that it evaluates: the score depends on how often and on what it was "
        "evaluated before, and a checkpoint from after it is another model than one from before."
    )
    example = """
        import torch
        from torch import nn

        norm = nn.InstanceNorm1d(8, track_running_stats=True)
        model = nn.Sequential(nn.Conv1d(4, 8, 1), norm)
        norm.track_running_stats = False
        model.eval()
        with torch.no_grad():
            model(torch.randn(16, 4, 8))
    """
    remedies = (
        (
            "Leave track_running_stats as the layer was made with; to hold the statistics, use "
            "bnguard.frozen(model, use_running_stats=True)."
        ),
        "In a layer of your own, update only where self.training is True.",
    )
    fine = "The layer follows its inputs on purpose, in eval mode, too."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that did so."""
        return self.by_line(end, lambda mode: not (mode.training or mode.recompute or mode.calibration))
