"""Which layers ``DistributedDataParallel`` overwrites with the statistics of rank 0 at each forward."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["overwritten_by_ddp"]


def overwritten_by_ddp(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The ids of those modules whose buffers another rank determines.

    Any wrapper in the process counts, whichever module the guard was given: DDP is not reachable from what it wraps.
    Looks at every object there is; for when something has changed.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return frozenset()
    ids = {id(module) for module in modules}
    found: set[int] = set()
    for wrapper in [item for item in gc.get_objects() if isinstance(item, DistributedDataParallel)]:
        if wrapper.broadcast_buffers and dist.get_rank(wrapper.process_group) > 0:
            found |= ids & {id(module) for module in wrapper.modules()}
    return frozenset(found)
