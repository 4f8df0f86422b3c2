"""BN013: wrong gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bnguard.findings.events import LayerEnd, Result, Update
from bnguard.findings.rule import Evidence, Rule


class BN013(Rule):
    """The layer updates between a forward in eval mode and the backward pass through it."""

    code = "BN013"
    title = "wrong gradients"
    severity = "error"
    fix = (
        "call backward() on the eval-mode result before the train-mode forward, or hold the layer in between: "
        "frozen(model, 'restore')"
    )
    short_fix = "call backward() before the train-mode forward"
    in_run = (
        "{g.of} ran in eval mode at {g.detail}, then updated here, and then backward went through the eval-mode "
        "result {g.times}: its gradient was computed from the later statistics"
    )
    in_brief = "{g.where} moved {g.count} between an eval-mode forward and its backward: wrong gradients"
    meaning = (
        "A layer ran in eval mode, then updated in a forward in train mode, and then backward went through the result "
        "of the first one."
    )
    harm = (
        "In eval mode the backward pass reads the running statistics when it runs, and torch does not notice that they "
        "have changed since the forward. The gradients are those of another function, without an error, and the "
        "training goes on with them."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        model.eval()
        evaluated = model(torch.randn(16, 4))
        model.train()
        trained = model(torch.randn(16, 4))
        (evaluated.square().sum() + trained.square().sum()).backward()
    """
    remedies = (
        "Call backward() on the result of eval mode before the forward in train mode; gradients add up.",
        "Or put bnguard.frozen(model, 'restore') around the forward in train mode.",
    )
    fine = "The gradients are not used."

    def __init__(self) -> None:
        self._updates = 0
        self._last_site = ""  # of the latest update
        self._backwards = 0  # through an eval-mode forward whose layer has updated since
        self._sites = ("", "")  # of that update and of that forward

    def on_update(self, update: Update, module: nn.Module | None) -> None:
        """Counts updates."""
        self._updates += 1
        self._last_site = update.site

    def on_result(self, result: Result) -> None:
        """Checks, when the backward pass reaches the forward, whether the layer has updated since."""
        node = result.output.grad_fn if isinstance(result.output, Tensor) else None
        if node is None:
            return
        updates, site = self._updates, result.site

        def reached(_: Any) -> None:
            if self._updates > updates:
                self._backwards += 1
                self._sites = (self._last_site, site)

        node.register_prehook(reached)

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The lines of the latest such update and forward."""
        if self._backwards:
            updated, evaluated = self._sites
            yield Evidence(self.code, end.name, updated, self._backwards, evaluated)
