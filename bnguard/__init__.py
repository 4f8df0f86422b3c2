"""Protects the running statistics of PyTorch's BatchNorm, and its relatives, at run time.

``frozen`` holds the statistics of a model still, or says who moves them; ``strict`` does so around every call of a
function. Importing bnguard alone does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnguard._audit import audit as audit
    from bnguard._changes import GuardedLayer as GuardedLayer
    from bnguard._changes import StatsChange as StatsChange
    from bnguard._diff import StatsDiff as StatsDiff
    from bnguard._diff import diff as diff
    from bnguard._drift import Drift as Drift
    from bnguard._drift import DriftSeries as DriftSeries
    from bnguard._findings import Finding as Finding
    from bnguard._frozen import frozen as frozen
    from bnguard._layers import LayerRegistration as LayerRegistration
    from bnguard._layers import register_layer as register_layer
    from bnguard._recompute import recompute_frozen as recompute_frozen
    from bnguard._strict import strict as strict
    from bnguard._timeline import UpdateSeries as UpdateSeries
    from bnguard._updates import Mode as Mode
    from bnguard._updates import StatsUpdates as StatsUpdates
    from bnguard._watch import watch as watch
    from bnguard.errors import BNGuardError as BNGuardError
    from bnguard.errors import BNGuardWarning as BNGuardWarning
    from bnguard.errors import StatsChangedError as StatsChangedError

__version__ = "0.1.0"

_HOMES = {
    "BNGuardError": "errors",
    "BNGuardWarning": "errors",
    "Drift": "_drift",
    "DriftSeries": "_drift",
    "Finding": "_findings",
    "GuardedLayer": "_changes",
    "LayerRegistration": "_layers",
    "Mode": "_updates",
    "StatsChange": "_changes",
    "StatsChangedError": "errors",
    "StatsDiff": "_diff",
    "StatsUpdates": "_updates",
    "UpdateSeries": "_timeline",
    "audit": "_audit",
    "diff": "_diff",
    "frozen": "_frozen",
    "recompute_frozen": "_recompute",
    "register_layer": "_layers",
    "strict": "_strict",
    "watch": "_watch",
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
