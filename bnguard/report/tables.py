"""Tables that several reports share."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard.records import Drift, Finding
from bnguard.report.document import Column, Table
from bnguard.words import layer_text


def verdict_text(findings: Sequence[Finding]) -> str:
    """The verdict of the most severe finding, as a sentence; empty if there is none."""
    return f"{findings[0].verdict}." if findings else ""


def drift_table(title: str, drift: Sequence[Drift], shown: int) -> Table:
    """One row for each layer that moved, the largest divergence first.

    Args:
        title: The heading.
        drift: The layers; those that have not moved are left out.
        shown: How many rows are printed where space is limited.
    """
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
    numbers = [Column(title, is_number=True) for title in ("channel", "mean", "variance", "divergence")]
    return Table(title, (Column("layer"), *numbers), tuple(rows), shown)
