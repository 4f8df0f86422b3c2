"""Reports as JSON. The schema has a version number: later versions only add keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bnguard import __version__
from bnguard.records import Drift

SCHEMA_VERSION: Final = 1


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file. NaN and infinity, which JSON lacks, become null."""
    document = {"schema": SCHEMA_VERSION, "bnguard": __version__, **content}
    path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def drift_content(drift: Drift) -> dict[str, Any]:
    """The figures of the channel that moved most in one layer."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
