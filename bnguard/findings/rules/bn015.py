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

    @classmethod
    def across_ranks(cls, digests: Mapping[int, Mapping[str, str]]) -> Iterator[Evidence]:
        """Layers whose final statistics differ from those of the first rank."""
        (first, own), *others = digests.items()
        for name, digest in own.items():
            ranks = tuple([rank for rank, theirs in others if theirs.get(name, digest) != digest])
            if ranks:
                yield Evidence(cls.code, name, detail=f"{ranks_text(ranks)} than on rank {first}")
