"""What a process knows of the ranks of its run."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from bnguard.torch_internals.distributed import default_store, overwritten_by_ddp


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
@pytest.mark.parametrize("broadcasts", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_overwrites_all_ranks_but_the_first(rank: int, broadcasts: bool) -> None:
    """With the buffers of the first one, if it broadcasts them; modules outside of any DDP keep theirs."""
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        inside, outside = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        model = DistributedDataParallel(nn.Sequential(inside), broadcast_buffers=broadcasts)
        assert overwritten_by_ddp([inside, outside]) == ({id(inside): 0} if rank and broadcasts else {})
        assert default_store() is None
        assert model.module[0] is inside
    finally:
        dist.destroy_process_group()
