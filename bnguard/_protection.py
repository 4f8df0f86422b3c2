"""How a guard protects each layer, in words."""

from __future__ import annotations

from bnguard._claims import Stance
from bnguard._layers import INSTANCE_NORM, StatsLayer

__all__ = ["protection_text"]


def protection_text(layer: StatsLayer, stance: Stance, budget: int, is_compiled: bool) -> str:
    """How one layer is protected.

    Args:
        layer: The layer.
        stance: What becomes of an update beyond the budget.
        budget: Updates that the block allows the layer.
        is_compiled: Whether a compiled graph runs the layer, as far as that can be known.
    """
    kind = layer.kind
    if kind.hold == "none":
        return "compared at exit only (a ScriptModule runs no hooks)"
    if is_compiled and budget:
        counts = "num_batches_tracked" in layer.buffers and kind is not INSTANCE_NORM  # which never counts
        how = "counted by num_batches_tracked" if counts else "not counted"
        return f"compared at exit only, updates {how} (a compiled graph runs no hooks)"
    if stance in ("restore", "running"):
        where = "in its forward, in a compiled graph too" if is_compiled else "in its forward"
        return f"held {where}; compared at exit"
    if is_compiled:
        return "compared at exit only (a compiled graph runs no hooks)"
    if budget and kind.predict is not None:
        return "held in its forward; compared at exit"
    if kind.predict is not None:
        return "judged before each forward; compared at exit"
    if stance == "warn" and not budget:
        return "compared after each forward and at exit"
    return "run on copies of its statistics and compared at each forward; compared at exit"
