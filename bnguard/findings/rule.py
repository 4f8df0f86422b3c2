"""What every finding consists of: its words, and the events from which it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import nn

from bnguard.findings.events import AuditedModel, Evaluation, LayerEnd, Result, StepEnd, Update
from bnguard.records import Mode, Severity
from bnguard.words import count_text, first_of, times_text


class Evidence(NamedTuple):
    """One layer's share in a finding.

    Attributes:
        code: The code of the finding.
        layer: The layer's first name.
        where: The user's line; None if the finding has no line.
        number: How often it happened; what is counted depends on the rule.
        detail: What else the sentence needs. Evidence with different details makes different findings.
        variant: Which of the rule's ``variants`` it is; empty for the usual case.
    """

    code: str
    layer: str
    where: str | None = None
    number: int = 0
    detail: Any = None
    variant: str = ""


class Variant(NamedTuple):
    """Words for one case of a finding, in place of the rule's own. For fields see ``Rule``."""

    in_run: str
    fix: str
    short_fix: str
    in_brief: str = ""
    severity: Severity | None = None
    fix_in_library: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EvidenceGroup:
    """The evidence of one finding, and words for it.

    Attributes:
        layers: First names of the layers.
        numbers: For each piece of evidence, how often it happened.
        detail: What else the sentence needs.
        where: The user's line.
    """

    layers: tuple[str, ...]
    numbers: tuple[int, ...]
    detail: Any
    where: str | None

    @property
    def count(self) -> str:
        """``1 layer``, ``2 layers``."""
        return count_text(len(self.layers), "layer")

    @property
    def of(self) -> str:
        """``2 layers (stem.bn, head.bn)``."""
        return f"{self.count} ({self.names})"

    @property
    def names(self) -> str:
        """The first three names, and how many more there are."""
        return first_of([name or "(root)" for name in self.layers])

    @property
    def be(self) -> str:
        """``is`` or ``are``."""
        return "are" if len(self.layers) > 1 else "is"

    @property
    def have(self) -> str:
        """``has`` or ``have``."""
        return "have" if len(self.layers) > 1 else "has"

    @property
    def updates(self) -> str:
        """The largest of the numbers as updates: ``1 update``, ``3 updates each``."""
        each = " each" if len(self.layers) > 1 else ""
        return f"{count_text(max(self.numbers), 'update')}{each}"

    @property
    def number(self) -> int:
        """The largest of the numbers."""
        return max(self.numbers)

    @property
    def steps(self) -> str:
        """The largest of the numbers as ``3 optimizer steps``."""
        return count_text(max(self.numbers), "optimizer step")

    @property
    def times(self) -> str:
        """The largest of the numbers as ``once``, ``3 times``."""
        return times_text(max(self.numbers))

    @property
    def parameters(self) -> str:
        """``2 parameters (1.weight, 1.bias)``, if the layers are parameters."""
        return f"{count_text(len(self.layers), 'parameter')} ({self.names})"


class Rule:
    """One kind of finding. An instance observes one layer during one run, and holds the counters that it needs.

    A subclass overrides the events that it needs; only those are delivered. No event may read a tensor's values or
    change anything, except ``at_end``, ``audit`` and ``across_ranks``, which are called outside of every mode.

    Attributes:
        code: ``"BN001"``, as in ``codes.py``.
        title: What the finding is about, as in ``codes.py``.
        severity: Its severity in a run, as in ``codes.py``.
        audit_severity: Its severity in an audit; None if it is the same.
        fix: What to do, with reasons and alternatives.
        short_fix: What to do, in as few words as possible.
        fix_in_library: What to do where an installed package calls the model; empty if it is the same.
        in_run: What happened in a run: a sentence without a full stop, with fields of an ``EvidenceGroup`` called
            ``g``, as in ``"{g.of} {g.have} momentum {g.detail}"``.
        in_brief: What happened in a run, in a few words; ``short_fix`` is appended. Empty if it is ``in_run``.
        in_audit: What is wrong with a model as it is. Empty if it is ``in_run``.
        variants: Other words for some cases in a run, by name.
        meaning: As in an ``Explanation``. This and the next four are literals: ``explanations.py`` reads them.
        harm: See there.
        example: See there; indented.
        remedies: See there.
        fine: See there.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    severity: ClassVar[Severity] = "warning"
    audit_severity: ClassVar[Severity | None] = None
    fix: ClassVar[str]
    short_fix: ClassVar[str]
    fix_in_library: ClassVar[str] = ""
    in_run: ClassVar[str]
    in_brief: ClassVar[str] = ""
    in_audit: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, Variant]] = {}
    meaning: ClassVar[str]
    harm: ClassVar[str]
    example: ClassVar[str]
    remedies: ClassVar[tuple[str, ...]]
    fine: ClassVar[str]

    def on_update(self, update: Update, module: nn.Module | None) -> None:
        """The layer, ``module``, has updated; None if it has been deleted.

        It may be called later: its attributes are those of the update if this is the first one from its line, or the
        first one since ``is_frozen`` has changed.
        """

    def on_eval_undone(self, site: str) -> None:
        """The update from this line was the first after a ``train()`` that reached a layer in eval mode."""

    def on_held(self) -> None:
        """A guard has prevented an update of the layer."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """A forward of the layer updates nothing."""

    def on_result(self, result: Result) -> None:
        """A forward of the layer in eval mode has returned, while autograd was recording."""

    def on_step_end(self, step: StepEnd) -> None:
        """The next step of any optimizer has come, or the end of the run, after updates of the layer."""

    def at_end(self, end: LayerEnd) -> Iterable[Evidence]:
        """The evidence that the layer has given so far. May be called several times."""
        return ()

    def by_line(self, end: LayerEnd, concerns: Callable[[Mode], bool]) -> Iterator[Evidence]:
        """Evidence for each line that has updated in a mode that the rule concerns, with the number of updates."""
        counts: dict[str, int] = {}
        for site in end.updates:
            if concerns(site.mode):
                counts[site.site] = counts.get(site.site, 0) + site.count
        for where, count in counts.items():
            yield Evidence(self.code, end.name, where, count)

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterable[Evidence]:
        """The evidence in a model as it is."""
        return ()

    @classmethod
    def across_ranks(cls, digests: Mapping[int, Mapping[str, str]]) -> Iterable[Evidence]:
        """The evidence in a distributed run, when all ranks have ended.

        Args:
            digests: By rank and layer name, digests of the final statistics, for layers that nothing keeps equal
                across ranks.
        """
        return ()
