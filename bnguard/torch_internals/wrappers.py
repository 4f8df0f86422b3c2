"""Modules of torch, Lightning and mmengine that wrap a whole model and call it."""

from __future__ import annotations

from typing import Final

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
