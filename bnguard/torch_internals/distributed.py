"""Who sees to it that the ranks of a distributed run have the same statistics."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["keeping_their_own", "keeps_its_own", "overwritten_by_ddp"]

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


# By module: the DDP around it, once it has been found.
_around: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()


def overwritten_by_ddp(modules: Iterable[nn.Module], *, after_join: bool = False) -> dict[int, int]:
    """By id of those modules whose buffers another rank determines: the global rank, that of the first as a rule.

    Any wrapper in the process counts, whichever module the guard was given: DDP is not reachable from what it wraps.
    Looks at every object there is, once for each module; for when something has changed.

    Args:
        modules: The modules.
        after_join: Whether to count the first rank, too, under a DDP that has been in ``join()``: a rank with fewer
            batches gets the buffers of one that has more.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return {}
    modules = list(modules)
    if any([module not in _around or _around[module]() is None for module in modules]):
        for item in [item for item in gc.get_objects() if issubclass(type(item), DistributedDataParallel)]:
            for part in item.modules():
                _around[part] = weakref.ref(item)
    found = {}
    for module in modules:
        ddp = _around[module]() if module in _around else None
        if ddp is None or not _is_broadcasting(ddp):
            continue
        has_joined = after_join and getattr(getattr(ddp, "_join_config", None), "enable", False)
        if dist.get_rank(ddp.process_group) > 0 or has_joined:
            found[id(module)] = dist.get_process_group_ranks(ddp.process_group)[0]
    return found


def keeping_their_own(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The ids of those modules that are in a model which ``keeps_its_own``. Looks at every object there is."""
    # By type: isinstance() asks objects for their class, and some answer with a warning.
    found = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    return _inside(modules, [module for module in found if keeps_its_own(module)])


def keeps_its_own(model: nn.Module) -> bool:
    """Whether a model is trained by several ranks, and nobody makes its statistics equal.

    So it is under FSDP, and under ``DistributedDataParallel(forward_sync_buffers=False)``.
    """
    if isinstance(model, DistributedDataParallel):
        return not _is_broadcasting(model)
    return any([kind.__name__ in _SHARDED for kind in type(model).__mro__])


def _is_broadcasting(ddp: DistributedDataParallel) -> bool:
    """Whether rank 0's buffers go to all ranks before each forward."""
    return bool(getattr(ddp, "forward_sync_buffers", None) or getattr(ddp, "broadcast_buffers", False))


def _inside(modules: Iterable[nn.Module], wrappers: Iterable[nn.Module]) -> frozenset[int]:
    ids = {id(module) for module in modules}
    return frozenset([key for wrapper in wrappers for key in ids & {id(part) for part in wrapper.modules()}])
