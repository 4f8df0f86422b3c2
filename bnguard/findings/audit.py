"""``audit``: what is wrong with a model's running statistics, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bnguard.findings.events import AuditedModel
from bnguard.findings.grouping import group_evidence
from bnguard.findings.rules import RULES
from bnguard.layers.tree import find_layers
from bnguard.records import Finding
from bnguard.report.document import Document
from bnguard.report.tables import verdict_text
from bnguard.torch_internals.compile import outside_graphs
from bnguard.torch_internals.tracing import outside_modes
from bnguard.words import count_text


@outside_graphs
@outside_modes
def audit(model: nn.Module, optimizer: Optimizer | None = None) -> tuple[Finding, ...]:
    """Looks for what is wrong with a model's running statistics, without running it.

    Finds frozen layers in train mode (BN001), a layer under several names (BN004), momentum by another convention
    (BN007), single layers in eval mode that the next ``train()`` will reach (BN008), statistics in half precision
    (BN009), ``track_running_stats`` off on a layer that has statistics (BN011), broken statistics (BN012), initial
    ones in eval mode (BN014), and with an optimizer frozen parameters that its next step would move (BN010). The other
    codes show only in a run: see ``watch``. Waits for the device.

    Args:
        model: The model, or one layer.
        optimizer: The optimizer that trains it.

    Returns:
        The findings, the most severe first; none if all is well.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` is no optimizer of torch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit() takes a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    audited = AuditedModel(model, tuple(find_layers(model)), optimizer)
    evidence = [one for rule in RULES.values() for one in rule.audit(audited)]
    return group_evidence(evidence, is_audit=True)


def audit_document(findings: Sequence[Finding], model: nn.Module) -> Document:
    """The report of an audit of a model."""
    layers = find_layers(model)
    summary = (
        f"{count_text(len(findings), 'finding') if findings else 'no finding'}; {count_text(len(layers), 'layer')}"
    )
    if not layers:
        summary = f"{type(model).__name__} has no layer with running statistics: there is nothing to find"
    return Document(verdict_text(findings), summary, tuple(findings), (), is_clean=bool(layers) and not findings)


def findings_content(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings for a JSON file: ``{"findings": [...]}``, with the fields of ``Finding``."""
    return {"findings": [dataclasses.asdict(finding) for finding in findings]}
