"""What it costs that the ranks of a distributed run agree."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bnguard
from benchmarks.models import make_step, sample
from benchmarks.race import Contender, race
from benchmarks.results import Benchmark, Row, compared, from_json, to_json

__all__ = ["BENCHMARKS"]

_GROUP, _ALONE = "frozen(net, 'restore') at each step, of two ranks that agree", "the same with group=False"


def step() -> list[Row]:
    """A training step of the small CNN under ``DistributedDataParallel``, two processes, a block at each step."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
        return [from_json(item) for item in json.loads(Path(folder, "rows").read_text())]


def _rank(rank: int, folder: str) -> None:
    sys.path.insert(0, os.getcwd())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, x, y = sample("small_cnn")
    model = DistributedDataParallel(net)
    train = make_step(model, net, x, y)

    def guarded(group: bool | None) -> None:
        with bnguard.frozen(net, "restore", group=group):
            train()

    contenders = [Contender(_ALONE, lambda: guarded(False)), Contender(_GROUP, lambda: guarded(None))]
    result = race(contenders, rounds=20, steps=5)
    if rank == 0:
        title = "Training step of a 17-layer CNN under DDP, two processes"
        rows = compared("ranks/step", title, result, _ALONE)
        Path(folder, "rows").write_text(json.dumps([to_json(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


BENCHMARKS: Final[dict[str, Benchmark]] = {"ranks/step": step}
