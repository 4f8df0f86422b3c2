"""How a guard protects each layer, in words."""

from __future__ import annotations

from bnguard.guard.policy import Stance
from bnguard.layers.kinds import EXPORTED, INSTANCE_NORM, SCRIPTED, StatsLayer

__all__ = ["protection_text"]

_GRAPH = "a compiled graph runs no hooks"
_VALUELESS = "not compared at exit: on the meta device, fake, or inside a transform, its statistics have no values"


def protection_text(layer: StatsLayer, stance: Stance, budget: int, is_compiled: bool, has_values: bool) -> str:
    """How one layer is protected.

    Args:
        layer: The layer.
        stance: What becomes of an update beyond the budget.
        budget: Updates that the block allows the layer.
        is_compiled: Whether a compiled graph runs the layer, as far as that can be known.
        has_values: Whether its statistics had values to compare with when the block began.
    """
    kind = layer.kind
    if kind is SCRIPTED:
        return _exit_only("a ScriptModule runs no hooks", has_values)
    if kind.hold == "none":
        return _exit_only("it has no forward of its own, as in an exported program", has_values)
    if is_compiled and budget:
        counts = "num_batches_tracked" in layer.buffers and kind is not INSTANCE_NORM  # which never counts
        how = "updates are counted by num_batches_tracked" if counts else "updates are not counted"
        return _exit_only(f"{_GRAPH}; {how}", has_values)
    if is_compiled and stance not in ("restore", "running"):
        return _exit_only(_GRAPH, has_values)
    if stance in ("restore", "running"):
        how = "held in its forward, in a compiled graph too" if is_compiled else "held in its forward"
        if kind is EXPORTED and stance == "running":
            how += ", which normalises as it was exported"
    elif kind.predict is not None:
        how = "held in its forward" if budget else "judged before each forward"
    elif stance == "warn" and not budget:
        how = "compared after each forward"
    else:
        how = "run on copies of its statistics and compared at each forward"
    return f"{how}; {'compared at exit' if has_values else _VALUELESS}"


def _exit_only(reason: str, has_values: bool) -> str:
    return f"compared at exit only ({reason})" if has_values else _VALUELESS
