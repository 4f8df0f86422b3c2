"""Tables that several reports share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bnguard.records import Drift, Finding
from bnguard.report.document import Column, Table
from bnguard.words import layer_text, name_text


def verdict_text(findings: Sequence[Finding]) -> str:
    """The verdict of the most severe finding, as a sentence; empty if there is none."""
    return f"{findings[0].verdict}." if findings else ""


_MEANINGS: Final = {
    "channel": "The channel that moved most: the one with the largest divergence.",
    "mean": "How far the running mean of that channel moved, in standard deviations (sd) at the beginning.",
    "variance": "The running variance of that channel divided by that at the beginning; x 1 has not changed.",
    "divergence": "Kullback-Leibler divergence of that channel from the beginning, as a normal distribution with its "
    "running mean and variance, in nats: 0 has not moved, 0.5 is a mean that moved by one standard deviation.",
}


def codes_by_layer(findings: Sequence[Finding]) -> dict[str, str]:
    """By name of a layer, the codes of the findings about it; notes are left out."""
    codes: dict[str, list[str]] = {}
    for finding in findings:
        for layer in finding.layers if finding.severity != "note" else ():
            codes.setdefault(layer, []).append(finding.code)
    return {layer: ", ".join(dict.fromkeys(own)) for layer, own in codes.items()}


def drift_table(title: str, drift: Sequence[Drift], shown: int, findings: Sequence[Finding] = ()) -> Table:
    """One row for each layer that moved, the largest divergence first.

    Args:
        title: The heading.
        drift: The layers; those that have not moved are left out.
        shown: How many rows are printed where space is limited.
        findings: Findings with which layers are marked.
    """
    codes = codes_by_layer(findings)
    moved = sorted([one for one in drift if one.has_moved], key=lambda one: one.largest, reverse=True)
    rows = [
        (
            layer_text(one.names, one.type, one.model),
            str(one.worst),
            f"{one.mean_shift[one.worst]:.3g} sd",
            f"x {one.variance_ratio[one.worst]:.3g}",
            f"{one.divergence[one.worst]:.3g} nats",
        )
        for one in moved
    ]
    marks = tuple([codes.get(name_text(one.names[0], one.model), "") for one in moved])
    numbers = [Column(title, is_number=True, meaning=meaning) for title, meaning in _MEANINGS.items()]
    return Table(title, (Column("layer"), *numbers), tuple(rows), shown, marks if any(marks) else ())
