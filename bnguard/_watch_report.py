"""What a watch has recorded, as text: the verdict, the table, the drift."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard._changes import StatsChange
from bnguard._drift import Drift
from bnguard._findings import Finding
from bnguard._ledger import Mode, StatsUpdates
from bnguard._report import count_text, layer_text

__all__ = ["watch_text"]

_SHOWN = 3


def watch_text(
    findings: Sequence[Finding],
    updates: Sequence[StatsUpdates],
    unexplained: Sequence[StatsChange],
    drift: Sequence[Drift],
) -> str:
    """All of it, for people: what is wrong first."""
    parts = [_verdict(findings, updates)]
    parts += [str(finding) for finding in findings]
    if updates:
        parts.append("\n".join(_table(updates)))
    if unexplained:
        parts.append(_unexplained(unexplained))
    moved = sorted([one for one in drift if one.has_moved], key=lambda one: one.largest, reverse=True)
    if moved:
        parts.append("\n".join(["moved most:", *[f"  {one}" for one in moved[:_SHOWN]]]))
    return "\n\n".join(parts)


def _verdict(findings: Sequence[Finding], updates: Sequence[StatsUpdates]) -> str:
    layers = len({(update.names, update.type) for update in updates})
    total = count_text(sum([update.count for update in updates]), "update")
    said = count_text(len(findings), "finding") if findings else "no finding"
    return f"{said}; {total} of {count_text(layers, 'layer')}" if updates else f"{said}; no update"


def _table(updates: Sequence[StatsUpdates]) -> list[str]:
    """A row for each line and mode."""
    groups: dict[tuple[str | None, Mode], list[StatsUpdates]] = {}
    for update in updates:
        groups.setdefault((update.where, update.mode), []).append(update)
    rows = [("updates", "layers", "steps", "mode", "line")]
    for (where, mode), group in groups.items():
        first, last = min([one.first_step for one in group]), max([one.last_step for one in group])
        steps = "" if mode.compiled else str(first) if first == last else f"{first} to {last}"
        layers = len({one.names for one in group})
        rows.append((str(sum([one.count for one in group])), str(layers), steps, str(mode), where or "in a graph"))
    widths = [max([len(row[column]) for row in rows]) for column in range(4)]
    return [
        f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    ]


def _unexplained(changes: Sequence[StatsChange]) -> str:
    lines = [f"{count_text(len(changes), 'layer')} changed without a forward that could be seen:"]
    lines += [f"  {layer_text(change.names, change.type)}: {', '.join(change.buffers)}" for change in changes[:_SHOWN]]
    if len(changes) > _SHOWN:
        lines.append(f"  and {len(changes) - _SHOWN} more")
    return "\n".join(lines)
