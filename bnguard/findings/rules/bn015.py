"""BN015: statistics that differ between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnguard.findings.rule import Evidence, Rule
from bnguard.words import ranks_text


class BN015(Rule):
    """The ranks of a distributed run end with different statistics."""

    code = "BN015"
    title = "statistics that differ between ranks"
    fix = (
        "a checkpoint or an evaluation of one rank has only what that one has seen: use SyncBatchNorm, or average "
        "the buffers (torch.distributed.all_reduce) before you save or evaluate"
    )
    short_fix = "use SyncBatchNorm, or average them before you save"
    in_run = "{g.of} ended with other statistics on {g.detail}"
    meaning = "The ranks of a distributed run end with different running statistics."
    harm = (
        "Each rank has normalised with its own part of the data. A checkpoint of rank 0 has only what rank 0 has seen, "
        "an evaluation gives other numbers on each rank, and a run that is resumed from the checkpoint is another run "
        "on all ranks but one."
    )
    example = """
        # torchrun --nproc-per-node 2 train.py
        import torch
        import torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group("gloo")
        torch.manual_seed(dist.get_rank())  # each rank has its own data
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        model = DistributedDataParallel(net, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
        dist.destroy_process_group()
    """
    remedies = (
        "Convert the model with nn.SyncBatchNorm.convert_sync_batchnorm(), which updates from all ranks.",
        "Or average the buffers with torch.distributed.all_reduce before you save or evaluate.",
        "DistributedDataParallel sends the buffers of rank 0 to the other ranks at each forward: leave that on.",
    )
    fine = "Each rank keeps statistics of its own on purpose, as clients in federated learning do (FedBN)."

    @classmethod
    def across_ranks(cls, digests: Mapping[int, Mapping[str, str]]) -> Iterator[Evidence]:
        """Layers whose final statistics differ from those of the first rank."""
        (first, own), *others = digests.items()
        for name, digest in own.items():
            ranks = tuple([rank for rank, theirs in others if theirs.get(name, digest) != digest])
            if ranks:
                yield Evidence(cls.code, name, detail=f"{ranks_text(ranks)} than on rank {first}")
