"""Protects the running statistics of PyTorch's BatchNorm, and its relatives, at run time.

``frozen`` holds the statistics of a model still, or says who moves them; ``strict`` does so around every call of a
function. Importing bnguard alone does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnguard.errors import BNGuardError as BNGuardError
    from bnguard.errors import BNGuardWarning as BNGuardWarning
    from bnguard.errors import StatsChangedError as StatsChangedError
    from bnguard.findings.audit import audit as audit
    from bnguard.findings.diff import StatsDiff as StatsDiff
    from bnguard.findings.diff import diff as diff
    from bnguard.findings.grouping import Finding as Finding
    from bnguard.guard.frozen import frozen as frozen
    from bnguard.guard.recompute import recompute_frozen as recompute_frozen
    from bnguard.guard.strict import strict as strict
    from bnguard.layers.drift import Drift as Drift
    from bnguard.layers.drift import DriftSeries as DriftSeries
    from bnguard.layers.kinds import LayerRegistration as LayerRegistration
    from bnguard.layers.kinds import register_layer as register_layer
    from bnguard.recording.timeline import UpdateSeries as UpdateSeries
    from bnguard.recording.watch import watch as watch
    from bnguard.records import GuardedLayer as GuardedLayer
    from bnguard.records import Mode as Mode
    from bnguard.records import StatsChange as StatsChange
    from bnguard.records import StatsUpdates as StatsUpdates

__version__ = "0.1.0"

_HOMES = {
    "BNGuardError": "errors",
    "BNGuardWarning": "errors",
    "Drift": "layers.drift",
    "DriftSeries": "layers.drift",
    "Finding": "findings.grouping",
    "GuardedLayer": "records",
    "LayerRegistration": "layers.kinds",
    "Mode": "records",
    "StatsChange": "records",
    "StatsChangedError": "errors",
    "StatsDiff": "findings.diff",
    "StatsUpdates": "records",
    "UpdateSeries": "recording.timeline",
    "audit": "findings.audit",
    "diff": "findings.diff",
    "frozen": "guard.frozen",
    "recompute_frozen": "guard.recompute",
    "register_layer": "layers.kinds",
    "strict": "guard.strict",
    "watch": "recording.watch",
}

__all__ = [
    "BNGuardError",
    "BNGuardWarning",
    "Drift",
    "DriftSeries",
    "Finding",
    "GuardedLayer",
    "LayerRegistration",
    "Mode",
    "StatsChange",
    "StatsChangedError",
    "StatsDiff",
    "StatsUpdates",
    "UpdateSeries",
    "__version__",
    "audit",
    "diff",
    "frozen",
    "recompute_frozen",
    "register_layer",
    "strict",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bnguard' has no attribute {name!r}")
    load = importlib.import_module
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:  # it may be a compiled function that asks first
        load = dynamo.disable(load)
    value = getattr(load(f"bnguard.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
