"""The picture of what a forward does under each policy, as HTML with SVG in it: the theme's colours are its own."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

__all__ = ["policies", "write"]

FILE: Final = Path(__file__).parent / "generated" / "policies.html"
_FORWARDS: Final = (90, 130, 170, 210)
_LEFT, _RIGHT, _BEGIN, _END = 16, 304, 60, 250
_BASE, _STEP = 84, 15


@dataclass(frozen=True, slots=True)
class Panel:
    """One policy.

    Attributes:
        title: How it is written; empty for no guard.
        mean: Whether forwards change the running mean, and whether the end of the block puts it back.
        forwards: What forwards normalise with, or that the first one is stopped.
        normalises: The same in words.
        says: What the guard reports, in words.
    """

    title: str
    mean: Literal["stays", "changes", "returns"]
    forwards: Literal["batch", "running", "stop"]
    normalises: str
    says: str


_PANELS: Final = (
    Panel("", "changes", "batch", "the batch", "nothing"),
    Panel("frozen(model)", "stays", "stop", "nothing, it is stopped", "StatsChangedError at the first forward"),
    Panel('frozen(model, "restore")', "stays", "batch", "the batch", "nothing"),
    Panel("frozen(model, use_running_stats=True)", "stays", "running", "the running statistics", "nothing"),
    Panel('frozen(model, "rollback")', "returns", "batch", "the batch", "nothing"),
    Panel('frozen(model, "warn")', "changes", "batch", "the batch", "one warning, and guard.changes"),
)
_CURVES: Final = {
    "stays": "The running mean stays as it is.",
    "changes": "The running mean changes with each forward, and stays changed.",
    "returns": "The running mean changes with each forward, and returns at the end of the block.",
}


def policies() -> str:
    """All panels, and what the signs mean."""
    key = (
        '<p class="policies-key"><span class="batch">●</span> a forward that normalises with the batch '
        '<span class="running">○</span> with the running statistics '
        '<span class="stop">✕</span> is stopped '
        '<span class="mean">▬</span> the running mean</p>'
    )
    return "\n".join(['<div class="policies">', *map(_panel, _PANELS), "</div>", key, ""])


def write() -> None:
    """Writes the file that the page includes."""
    FILE.parent.mkdir(exist_ok=True)
    text = policies()
    if not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
        FILE.write_text(text, encoding="utf-8")


def _panel(panel: Panel) -> str:
    forwards = _FORWARDS[:1] if panel.forwards == "stop" else _FORWARDS
    end = forwards[0] + 18 if panel.forwards == "stop" else _END
    level, path, signs = _BASE, [f"M{_LEFT} {_BASE}"], []
    for x in forwards:
        path.append(f"H{x}")
        if panel.mean != "stays":
            level -= _STEP
            path.append(f"V{level}")
        signs.append(_sign(panel.forwards, x))
    if panel.mean == "returns":
        path += [f"H{end}", f"V{_BASE}"]
    path.append(f"H{_RIGHT}")
    shade = (
        f'<rect class="block" x="{_BEGIN}" y="8" width="{end - _BEGIN}" height="112" rx="4"/>' if panel.title else ""
    )
    title = f"<code>{html.escape(panel.title)}</code>" if panel.title else "no guard"
    return "\n".join(
        [
            "<figure>",
            f'<svg viewBox="0 0 320 128" role="img" aria-label="{_CURVES[panel.mean]}">',
            shade,
            f'<path class="mean" d="{" ".join(path)}"/>',
            *signs,
            "</svg>",
            f"<figcaption><strong>{title}</strong>",
            f"<br>normalises with: {panel.normalises}",
            f"<br>reports: {panel.says}</figcaption>",
            "</figure>",
        ]
    )


def _sign(kind: str, x: int) -> str:
    if kind == "stop":
        return f'<path class="stop" d="M{x - 6} 98 l12 12 M{x + 6} 98 l-12 12"/>'
    return f'<circle class="{kind}" cx="{x}" cy="104" r="5"/>'
