"""What a watch reports: which lines updated what, what changed by itself, and what moved most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from bnguard.findings.audit import findings_content
from bnguard.records import Drift, DriftSeries, Finding, Mode, StatsChange, StatsUpdates, UpdateSeries
from bnguard.report.document import Column, Document, Table
from bnguard.report.json import drift_content
from bnguard.report.tables import drift_table, verdict_text
from bnguard.words import count_text, layer_text, ranks_text

_FEW, _MANY = 3, 20  # rows


class WatchSummary(NamedTuple):
    """All that a watch has recorded, computed once. The first six fields are those of ``watch``.

    Attributes:
        layers: How many layers were met in this process.
        rank: The rank of this process; 0 for a single process.
        has_all_ranks: Whether this includes the records of the other ranks; True for a single process.
        missing_ranks: Ranks whose records did not come in time.
        has_models: Whether a model with parameters was met.
        nothing: What there was if no layer was met.
        unwatched: Statistics that cannot be watched, as a note; empty if there are none.
    """

    findings: tuple[Finding, ...]
    updates: tuple[StatsUpdates, ...]
    unexplained: tuple[StatsChange, ...]
    drift: tuple[Drift, ...]
    series: DriftSeries
    update_series: UpdateSeries
    layers: int
    rank: int
    has_all_ranks: bool
    missing_ranks: tuple[int, ...]
    has_models: bool
    nothing: str
    unwatched: str


def watch_document(summary: WatchSummary) -> Document:
    """The report of a watch."""
    findings, updates = summary.findings, summary.updates
    tables = [
        _lines(updates),
        _unexplained(summary.unexplained),
        drift_table("moved most", summary.drift, _FEW, findings),
    ]
    has_more = bool(updates or summary.unexplained)
    return Document(
        verdict_text(findings),
        f"{count_text(len(findings), 'finding') if findings else 'no finding'}; {_total(summary)}",
        findings,
        tuple([table for table in tables if table.rows]),
        "More: record.updates, record.drift and record.findings have it all." if has_more else "",
        (*_about_ranks(summary), *filter(None, [summary.unwatched])),
        is_clean=not (findings or summary.missing_ranks or summary.unwatched) and summary.layers > 0,
    )


def watch_content(summary: WatchSummary) -> dict[str, Any]:
    """A watch for a JSON file: findings, updates, unexplained changes, drift and both series."""
    series, update_series = summary.series, summary.update_series
    return {
        **findings_content(summary.findings),
        "updates": [dataclasses.asdict(update) for update in summary.updates],
        "unexplained": [dataclasses.asdict(change) for change in summary.unexplained],
        "drift": [drift_content(drift) for drift in summary.drift],
        "series": {
            "steps": series.steps,
            "layers": series.layers,
            "mean_shift": series.mean_shift.tolist(),
            "divergence": series.divergence.tolist(),
        },
        "update_series": {
            "steps": update_series.steps,
            "end": update_series.end,
            "lines": update_series.lines,
            "layers": update_series.layers,
            "counts": update_series.counts.tolist(),
        },
    }


def _total(summary: WatchSummary) -> str:
    updates = summary.updates
    if not updates:
        return "no update" if summary.layers else summary.nothing
    layers = len({(update.model, update.names) for update in updates})
    total = sum([update.count * max(1, len(update.ranks)) for update in updates])
    ranks = sorted({rank for update in updates for rank in update.ranks})
    where = f" on {ranks_text(ranks)}" if ranks else ""
    return f"{count_text(total, 'update')} of {count_text(layers, 'layer')}{where}"


def _about_ranks(summary: WatchSummary) -> tuple[str, ...]:
    if not summary.has_all_ranks:
        return (f"That is what rank {summary.rank} has recorded; the first rank has the report of all.",)
    if summary.missing_ranks:
        missing = ranks_text(summary.missing_ranks)
        return (f"{missing[0].upper()}{missing[1:]} did not report in time: this is without what was recorded there.",)
    return ()


def _lines(updates: Sequence[StatsUpdates]) -> Table:
    """One row for each line, mode and group of ranks."""
    groups: dict[tuple[str | None, Mode, tuple[int, ...]], list[StatsUpdates]] = {}
    for update in updates:
        groups.setdefault((update.where, update.mode, update.ranks), []).append(update)
    rows = []
    has_ranks = any([update.ranks for update in updates])
    for (where, mode, ranks), group in groups.items():
        first, last = min([one.first_step for one in group]), max([one.last_step for one in group])
        steps = "" if mode.compiled else str(first) if first == last else f"{first} to {last}"
        layers = len({(one.model, one.names) for one in group})
        cells = [str(sum([one.count for one in group])), str(layers), steps, str(mode), where or "in a graph"]
        rows.append((*cells[:2], *[", ".join(map(str, ranks))] * has_ranks, *cells[2:]))
    columns = (
        Column("updates", is_number=True, meaning="Updates from this line in this mode, of all its layers together."),
        Column("layers", is_number=True, meaning="How many layers it has updated."),
        *[Column("ranks")] * has_ranks,
        Column("steps", meaning="How many steps the optimizer had made before the first and before the last of them."),
        Column("mode", meaning="Whether the layer was in train mode, and autograd recorded."),
        Column("line", meaning="The line of your code that called the model."),
    )
    return Table("updates by line", columns, tuple(rows), _MANY)


def _unexplained(changes: Sequence[StatsChange]) -> Table:
    rows = [(layer_text(change.names, change.type, change.model), ", ".join(change.buffers)) for change in changes]
    title = "changed without a forward that could be seen"
    return Table(title, (Column("layer"), Column("statistics")), tuple(rows), _FEW)
