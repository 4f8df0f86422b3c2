"""Detect how the ranks of a distributed run synchronise their running statistics, and access the default store."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnguard.torch_internals.fork import call_in_children

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "FSDP")  # the last two are one, named FSDP in torch 2.4


def is_distributed() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_prefix() -> str:
    """The prefix of a message in a distributed run, ``"[rank 3] "``; else the empty string."""
    if not is_distributed():
        return ""
    return f"[rank {dist.get_rank()}] "


# The DDP around each module, once it has been found.
_around: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()


def overwritten_by_ddp(modules: Iterable[nn.Module], *, after_join: bool = False) -> dict[int, int]:
    """Finds modules whose buffers DDP overwrites with those of another rank.

    A module has no reference to the DDP around it, so this searches all objects of the process, once for each module.
    It is slow, and only called after a change was found.

    Args:
        modules: The modules.
        after_join: Whether to include the first rank under a DDP that has been in ``join()``: a rank with fewer batches
            gets the buffers of a rank that has more.

    Returns:
        By id of each such module, the global rank of the first process in its group, whose buffers DDP normally
        broadcasts.
    """
    if not is_distributed():
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


def modules_differing_per_rank(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The ids of the modules inside a model for which ``differs_per_rank`` is true. Searches all objects."""
    # By type: isinstance() reads __class__, and some objects warn when an attribute is read.
    found = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    return _inside(modules, [module for module in found if differs_per_rank(module)])


def differs_per_rank(model: nn.Module) -> bool:
    """Whether a model is trained by several ranks, and each rank has its own running statistics.

    This holds under FSDP and under ``DistributedDataParallel(forward_sync_buffers=False)``.
    """
    if isinstance(model, DistributedDataParallel):
        return not _is_broadcasting(model)
    return any([kind.__name__ in _SHARDED for kind in type(model).__mro__])


def _is_broadcasting(ddp: DistributedDataParallel) -> bool:
    """Whether DDP broadcasts rank 0's buffers before each forward."""
    return bool(getattr(ddp, "forward_sync_buffers", None) or getattr(ddp, "broadcast_buffers", False))


def _inside(modules: Iterable[nn.Module], wrappers: Iterable[nn.Module]) -> frozenset[int]:
    ids = {id(module) for module in modules}
    return frozenset([key for wrapper in wrappers for key in ids & {id(part) for part in wrapper.modules()}])


# Stores that this process has inherited from a parent by fork().
_inherited: weakref.WeakSet[Any] = weakref.WeakSet()


def default_store() -> Any:
    """The store of the default process group.

    Returns:
        The store; None without a process group, for a single process, for the "fake" backend, and in a forked child
        such as a ``DataLoader`` worker, which is not a rank and must not use its parent's connection.
    """
    if not is_distributed():
        return None
    store = dist.distributed_c10d._get_default_store()
    if store is None or store in _inherited or dist.get_backend() == "fake":
        return None
    return store


def own_connection(store: Any) -> Any:
    """Opens a new connection to a store, because a thread that waits on a connection blocks it for all others."""
    return store.clone() if hasattr(store, "clone") else store


def _after_fork() -> None:
    if dist.is_available() and dist.is_initialized():
        _inherited.add(dist.distributed_c10d._get_default_store())


call_in_children(_after_fork)
