"""What a guard that is open keeps in memory."""

from __future__ import annotations

import gc
import tracemalloc
from functools import partial
from typing import Final

import torch
from torch import nn

import bnguard
from benchmarks.models import NETS, bn_chain, sample
from benchmarks.race import spread
from benchmarks.results import Benchmark, Row
from benchmarks.rivals import batch_norms
from bnguard.layers.bits import has_values

__all__ = ["BENCHMARKS"]


def _storages() -> dict[int, int]:
    """Bytes of every storage that a Python tensor refers to, by its address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and has_values(item)]
    return {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def held_by_a_guard(net: nn.Module) -> int:
    """Bytes of tensors and of Python objects, among them copies of memory, that an open guard keeps."""
    before = _storages()
    tracemalloc.start()
    try:
        with bnguard.frozen(net, "restore"):
            gc.collect()
            objects, _ = tracemalloc.get_traced_memory()
            after = _storages()
    finally:
        tracemalloc.stop()
    return sum(size for address, size in after.items() if address not in before) + objects


def memory(name: str) -> list[Row]:
    """All of it, against what is asked and against the guarded buffers."""
    net = bn_chain(53) if name == "chain" else sample(name)[0]
    for _ in range(2):  # imports, caches and scratch tensors, which outlast a block
        held = held_by_a_guard(net)
    layers = batch_norms(net)
    guarded = sum(buffer.nbytes for layer in layers for buffer in layer._buffers.values() if buffer is not None)
    allowed = 2 * guarded + 1024 * len(layers)
    row = partial(Row, f"memory/{name}", f"Memory of an open guard, {name}, {len(layers)} layers")
    asked = "twice the guarded buffers and 1 KiB a layer"
    return [
        row("tensors and Python objects", asked, spread([held / allowed]), 1.0),
        row("tensors and Python objects", "the guarded buffers", spread([held / guarded])),
    ]


BENCHMARKS: Final[dict[str, Benchmark]] = {
    f"memory/{name}": partial(memory, name) for name in ("chain", *[name for name in NETS if name != "bn_mlp"])
}
