"""What a watch, an audit and a comparison have to report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bnguard.findings.grouping import Finding
from bnguard.guard.messages import layer_text
from bnguard.layers.drift import Drift
from bnguard.records import Mode, StatsChange, StatsUpdates
from bnguard.report.document import Column, Document, Table
from bnguard.words import count_text, ranks_text

if TYPE_CHECKING:
    from bnguard.findings.diff import StatsDiff
    from bnguard.recording.watch import watch

__all__ = ["audit_document", "diff_document", "watch_document"]

_FEW, _MANY = 3, 20  # rows that are shown


def watch_document(record: watch) -> Document:
    """Which lines updated what, what changed by itself, and what moved most."""
    findings, updates, unexplained, drift = record.findings, record.updates, record.unexplained, record.drift
    tables = [_lines(updates), _unexplained(unexplained), _moved("moved most", drift, _FEW)]
    said = count_text(len(findings), "finding") if findings else "no finding"
    if updates:
        layers = len({(update.model, update.names) for update in updates})
        total = count_text(sum([update.count * max(1, len(update.ranks)) for update in updates]), "update")
        ranks = {rank for update in updates for rank in update.ranks}
        summary = f"{said}; {total} of {count_text(layers, 'layer')}{f' on {ranks_text(sorted(ranks))}' * bool(ranks)}"
    else:
        summary = f"{said}; no update"
    return Document(
        _verdict(findings),
        summary,
        tuple(findings),
        tuple([table for table in tables if table.rows]),
        "More: record.updates, record.drift and record.findings have it all." if updates or unexplained else "",
        _about_ranks(record),
    )


def _about_ranks(record: watch) -> tuple[str, ...]:
    if not record.speaks:
        return (f"That is what rank {record.rank} has recorded; the first rank has the report of all.",)
    if record.missing_ranks:
        return (f"{ranks_text(record.missing_ranks)} did not tell what was recorded there.".capitalize(),)
    return ()


def audit_document(findings: Sequence[Finding]) -> Document:
    """What is wrong with a model as it stands."""
    summary = count_text(len(findings), "finding") if findings else "no finding"
    return Document(_verdict(findings), summary, tuple(findings), ())


def diff_document(found: StatsDiff) -> Document:
    """What moved, what is missing, and what is broken."""
    total = len(found.changed) + len(found.unchanged)
    told = {drift.names[0] for drift in found.moved if drift.has_moved}
    others = [name for name in found.changed if name not in told]
    lists = (
        ("other statistics than mean and variance moved", others),
        ("only before", found.missing),
        ("only after", found.added),
        ("broken before (NaN, infinite or negative)", found.broken_before),
        ("broken after (NaN, infinite or negative)", found.broken_after),
    )
    tables = [_moved("moved", found.moved, _MANY)]
    tables += [
        Table(title, (Column("layer"),), tuple([(name or "(root)",) for name in names]), _MANY)
        for title, names in lists
    ]
    broken = (
        f"{count_text(len(found.broken_after), 'layer')} of the later state "
        f"{'is' if len(found.broken_after) == 1 else 'are'} broken: take an earlier checkpoint"
        if found.broken_after
        else ""
    )
    parts = [f"{len(found.changed)} of {count_text(total, 'layer')} moved"]
    parts += [f"{len(names)} {title}" for title, names in (("missing", found.missing), ("added", found.added)) if names]
    return Document(broken, ", ".join(parts), (), tuple([table for table in tables if table.rows]))


def _verdict(findings: Sequence[Finding]) -> str:
    return f"{findings[0].verdict}." if findings else ""


def _lines(updates: Sequence[StatsUpdates]) -> Table:
    """A row for each line and mode."""
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
        Column("updates", is_number=True),
        Column("layers", is_number=True),
        *[Column("ranks")] * has_ranks,
        Column("steps"),
        Column("mode"),
        Column("line"),
    )
    return Table("updates by line", columns, tuple(rows), _MANY)


def _unexplained(changes: Sequence[StatsChange]) -> Table:
    rows = [(layer_text(change.names, change.type), ", ".join(change.buffers)) for change in changes]
    title = "changed without a forward that could be seen"
    return Table(title, (Column("layer"), Column("statistics")), tuple(rows), _FEW)


def _moved(title: str, drift: Sequence[Drift], shown: int) -> Table:
    """A row for each layer that moved, the farthest first."""
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
    columns = (
        Column("layer"),
        Column("channel", is_number=True),
        Column("mean", is_number=True),
        Column("variance", is_number=True),
        Column("divergence", is_number=True),
    )
    return Table(title, columns, tuple(rows), shown)
