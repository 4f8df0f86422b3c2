"""Findings, records and drift as JSON. The schema has a version: what is there stays, more may come."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from bnguard import __version__
from bnguard.findings.diff import StatsDiff
from bnguard.findings.grouping import Finding
from bnguard.layers.drift import Drift, DriftSeries
from bnguard.recording.timeline import UpdateSeries
from bnguard.recording.watch import watch

__all__ = ["SCHEMA_VERSION", "of_diff", "of_findings", "of_watch", "write"]

SCHEMA_VERSION: Final = 1


def of_findings(findings: Iterable[Finding]) -> dict[str, Any]:
    """``{"findings": [{"code", "title", "severity", "layers", "where", "what", "fix"}]}``."""
    return {"findings": [dataclasses.asdict(finding) for finding in findings]}


def of_watch(record: watch) -> dict[str, Any]:
    """The findings, and ``updates``, ``unexplained``, ``drift`` and both series, with their classes' fields."""
    return {
        **of_findings(record.findings),
        "updates": [dataclasses.asdict(update) for update in record.updates],
        "unexplained": [dataclasses.asdict(change) for change in record.unexplained],
        "drift": [_drift(drift) for drift in record.drift],
        "series": _series(record.series),
        "update_series": _update_series(record.update_series),
    }


def of_diff(found: StatsDiff) -> dict[str, Any]:
    """The fields of ``StatsDiff``."""
    names = ("changed", "unchanged", "missing", "added", "broken_before", "broken_after")
    return {"moved": [_drift(drift) for drift in found.moved], **{name: list(getattr(found, name)) for name in names}}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file. NaN and infinity, which JSON does not know, become null."""
    document = {"schema": SCHEMA_VERSION, "bnguard": __version__, **content}
    path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _drift(drift: Drift) -> dict[str, Any]:
    """The worst channel's figures."""
    worst = drift.worst
    return {
        "names": list(drift.names),
        "type": drift.type,
        "model": drift.model,
        "worst_channel": worst,
        "mean_shift": float(drift.mean_shift[worst]),
        "variance_ratio": float(drift.variance_ratio[worst]),
        "divergence": float(drift.divergence[worst]),
    }


def _series(series: DriftSeries) -> dict[str, Any]:
    return {
        "steps": series.steps,
        "layers": series.layers,
        "mean_shift": series.mean_shift.tolist(),
        "divergence": series.divergence.tolist(),
    }


def _update_series(series: UpdateSeries) -> dict[str, Any]:
    return {
        "steps": series.steps,
        "end": series.end,
        "lines": series.lines,
        "layers": series.layers,
        "counts": series.counts.tolist(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
