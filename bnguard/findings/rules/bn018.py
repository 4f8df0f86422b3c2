"""BN018: changed without a forward."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN018(Rule):
    """Something other than a forward writes into the statistics between two evaluations."""

    code = "BN018"
    title = "changed without a forward"
    fix = (
        "look for assignments to running_mean or running_var, and for other processes or threads that share them; "
        "frozen(model) around the evaluation says at its end what was written"
    )
    short_fix = "put frozen(model) around the evaluation"
    in_run = (
        "something other than a forward, a load_state_dict() or a reset wrote {g.times} into the statistics of {g.of}, "
        "between two evaluations"
    )
    in_brief = "something other than a forward changed {g.of} between two evaluations"

    meaning = (
        "Between two forwards in eval mode, something other than a forward, a load or a reset has written into the "
        "statistics of a layer that is trained."
    )
    harm = "The two evaluations are of different models, and nothing in the training loop says why."
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(torch.randn(16, 4))
            model[1].running_mean.add_(1.0)
            model(torch.randn(16, 4))
    """
    remedies = (
        "Look for assignments to running_mean and running_var, and for threads and processes that share the model.",
        "bnguard.frozen(model) around the evaluation says at its end which layers changed.",
    )
    fine = "You write the statistics yourself, to correct them for other data for instance."

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """A trained layer that was written to."""
        if end.rewritten:
            yield Evidence(self.code, end.name, None, end.rewritten)
