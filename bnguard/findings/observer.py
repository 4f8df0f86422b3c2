"""Delivers the events of one layer to the rules that listen to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.rules import RULES
from bnguard.torch_internals.tracing import outside_modes

Listeners: TypeAlias = tuple[Callable[..., None], ...]


class LayerObserver:
    """One instance of each of some rules for one layer.

    Each attribute below holds the bound methods of the rules that override the event of its name. They are called
    directly (``for listener in observer.on_held: listener()``), since most of the cost of a watch is calls.

    Args:
        rules: The rules.

    Attributes:
        on_update: Listeners to updates.
        on_held: Listeners to updates that a guard has prevented.
        on_evaluation: Listeners to forwards that update nothing.
        on_result: Listeners to results of eval-mode forwards.
        on_step_end: Listeners to ends of optimizer steps.
        on_eval_undone: Listeners to updates after an ``eval()`` was undone.
    """

    __slots__ = ("_rules", "on_eval_undone", "on_evaluation", "on_held", "on_result", "on_step_end", "on_update")

    def __init__(self, rules: Iterable[type[Rule]] = RULES.values()) -> None:
        self._rules = [rule() for rule in rules]
        self.on_update = self._listeners("on_update")
        self.on_held = self._listeners("on_held")
        self.on_evaluation = self._listeners("on_evaluation")
        self.on_result = self._listeners("on_result")
        self.on_step_end = self._listeners("on_step_end")
        self.on_eval_undone = self._listeners("on_eval_undone")

    @outside_modes
    def evidence(self, end: LayerEnd) -> list[Evidence]:
        """What the rules have found about the layer so far."""
        return [evidence for rule in self._rules for evidence in rule.at_end(end)]

    def _listeners(self, event: str) -> Listeners:
        overriding = [rule for rule in self._rules if getattr(type(rule), event) is not getattr(Rule, event)]
        return tuple([getattr(rule, event) for rule in overriding])
