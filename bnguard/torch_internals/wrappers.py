"""Modules of torch, Lightning and mmengine that wrap a whole model and call it."""

from __future__ import annotations

from typing import Final

from torch import nn

# Wrapper classes, with the attributes that hold the wrapped module. Layer names leave these attributes out.
WRAPPERS: Final = {
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "MMDistributedDataParallel": ("module",),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "OptimizedModule": ("_orig_mod",),
    "CheckpointWrapper": ("_checkpoint_wrapped_module",),
    "_FabricModule": ("_forward_module", "_original_module"),  # the first may be a wrapper of the second
}
# Those that may be left out in one process: in them the same model runs, and computes the same.
ONLY_CALL: Final = frozenset(
    {"DataParallel", "DistributedDataParallel", "MMDistributedDataParallel", "OptimizedModule", "_FabricModule"}
)


def runs_a_step(module: nn.Module) -> bool:
    """Whether Lightning has put the call of a step, ``training_step()`` for instance, in place of a model's forward.

    It does so for one call, to run the step inside of a wrapper.
    """
    place: str = getattr(module.__dict__.get("forward"), "__module__", None) or ""
    return place.startswith(("lightning.", "pytorch_lightning."))
