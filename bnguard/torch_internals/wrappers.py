"""Modules of torch that wrap a whole model and call it."""

from __future__ import annotations

from typing import Final

# Wrapper classes, with the attribute that holds the wrapped module. Layer names leave this attribute out.
WRAPPERS: Final = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
