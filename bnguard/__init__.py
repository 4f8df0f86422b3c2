"""Protects the running statistics of PyTorch's BatchNorm, and its relatives, at run time.

``frozen`` holds the statistics of a model still, or says who moves them; ``strict`` does so around every call of a
function. Importing bnguard alone does not import torch.
"""

from __future__ import annotations

import sys

from bnguard.torch_internals.lazy_import import load

TYPE_CHECKING = False  # type checkers take it for true; importing typing would take most of the time
if TYPE_CHECKING:
    from typing import Any

    from bnguard.errors import BNGuardError as BNGuardError
    from bnguard.errors import BNGuardWarning as BNGuardWarning
    from bnguard.errors import StatsChangedError as StatsChangedError
    from bnguard.findings.audit import audit as audit
    from bnguard.findings.diff import diff as diff
    from bnguard.guard.frozen import frozen as frozen
    from bnguard.guard.options import OnChange as OnChange
    from bnguard.guard.recalibration import recalibrate as recalibrate
    from bnguard.guard.recompute import recompute_frozen as recompute_frozen
    from bnguard.guard.strict import strict as strict
    from bnguard.layers.kinds import LayerRegistration as LayerRegistration
    from bnguard.layers.kinds import register_layer as register_layer
    from bnguard.layers.select import Selector as Selector
    from bnguard.recording.watch import watch as watch
    from bnguard.records import Drift as Drift
    from bnguard.records import DriftSeries as DriftSeries
    from bnguard.records import Finding as Finding
    from bnguard.records import GuardedLayer as GuardedLayer
    from bnguard.records import Mode as Mode
    from bnguard.records import Recalibration as Recalibration
    from bnguard.records import Severity as Severity
    from bnguard.records import StatsChange as StatsChange
    from bnguard.records import StatsDiff as StatsDiff
    from bnguard.records import StatsUpdates as StatsUpdates
    from bnguard.records import UpdateSeries as UpdateSeries

__version__ = "0.1.0"

_HOMES = {
    "BNGuardError": "errors",
    "BNGuardWarning": "errors",
    "Drift": "records",
    "DriftSeries": "records",
    "Finding": "records",
    "GuardedLayer": "records",
    "LayerRegistration": "layers.kinds",
    "Mode": "records",
    "OnChange": "guard.options",
    "Recalibration": "records",
    "Selector": "layers.select",
    "Severity": "records",
    "StatsChange": "records",
    "StatsChangedError": "errors",
    "StatsDiff": "records",
    "StatsUpdates": "records",
    "UpdateSeries": "records",
    "audit": "findings.audit",
    "diff": "findings.diff",
    "frozen": "guard.frozen",
    "recalibrate": "guard.recalibration",
    "recompute_frozen": "guard.recompute",
    "register_layer": "layers.kinds",
    "strict": "guard.strict",
    "watch": "recording.watch",
}

_MEANT = {"assert_stats_unchanged": "testing.assert_stats_unchanged", "freeze": "frozen", "freeze_bn": "frozen"}

__all__ = [
    "BNGuardError",
    "BNGuardWarning",
    "Drift",
    "DriftSeries",
    "Finding",
    "GuardedLayer",
    "LayerRegistration",
    "Mode",
    "OnChange",
    "Recalibration",
    "Selector",
    "Severity",
    "StatsChange",
    "StatsChangedError",
    "StatsDiff",
    "StatsUpdates",
    "UpdateSeries",
    "__version__",
    "audit",
    "diff",
    "frozen",
    "recalibrate",
    "recompute_frozen",
    "register_layer",
    "strict",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        # With name and obj, Python suggests a name that is spelled like it; these are not.
        meant = f". Did you mean: {_MEANT[name]!r}?" if name in _MEANT else ""
        raise AttributeError(f"module 'bnguard' has no attribute {name!r}{meant}", name=name, obj=sys.modules[__name__])
    home = _HOMES[name]
    module = load(f"bnguard.{home}")
    globals().update({other: getattr(module, other) for other, place in _HOMES.items() if place == home})
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
