"""One rank of a distributed run: ``python -m tests.rank_job FOLDER NAME...`` under torchrun, or spawned by itself."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.rank_scenarios import SCENARIOS


def run(folder, names):
    """Runs scenarios one after the other, and writes down what came of each."""
    torch.set_num_threads(1)
    backend = os.environ.get("BACKEND", "gloo")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    results, rank = {}, dist.get_rank()
    try:
        for name in names:
            results[name] = SCENARIOS[name]()
            if dist.is_initialized():
                dist.barrier()
    except BaseException:
        results["failed"] = traceback.format_exc()
        raise
    finally:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


def spawned(rank, size, port, folder, names):
    """The same in a process of torch.multiprocessing.spawn."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    run(folder, names)


if __name__ == "__main__":
    if sys.argv[1] == "--spawn":
        size, port, target, *chosen = sys.argv[2:]
        torch.multiprocessing.spawn(spawned, (int(size), int(port), target, chosen), nprocs=int(size))
    else:
        run(sys.argv[1], sys.argv[2:])
