"""BN006: too few values per channel."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule
from bnguard.records import FEW_VALUES


class BN006(Rule):
    """The layer estimates its statistics from very small batches."""

    code = "BN006"
    title = "too few values per channel"
    fix = (
        "use larger batches, SyncBatchNorm over several devices, or statistics that stay: frozen(model, "
        "use_running_stats=True)"
    )
    short_fix = "use larger batches, or frozen(model, use_running_stats=True)"
    in_run = f"{{g.of}} made {{g.updates}} from fewer than {FEW_VALUES} values per channel, down to {{g.detail}}"
    in_brief = f"{{g.where}} moved {{g.count}} with fewer than {FEW_VALUES} values per channel, {{g.updates}}"
    meaning = "At least half of the updates of a layer come from fewer than eight values for each channel."
    harm = (
        "A variance of so few values is mostly noise, and with two values every normalised output is nearly +1 or -1. "
        "In train mode the model learns from that noise; the running statistics average it, so eval mode computes "
        "something else than the model was trained for."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
    """
    remedies = (
        "Use larger batches. Gradient accumulation does not help: each forward normalises with its own batch.",
        "On several devices, convert the model with nn.SyncBatchNorm.convert_sync_batchnorm().",
        "With pretrained statistics, use bnguard.frozen(model, use_running_stats=True); without, use GroupNorm.",
    )
    fine = (
        "The batches are that small in a smoke test only. The last, smaller batch of an epoch is not counted against "
        "you unless there are as many of them as of the others."
    )

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The line with most such updates, if they are half of all; the last batch of an epoch may be small."""
        small = sum([update.small_batches for update in end.updates])
        total = sum([update.count for update in end.updates])
        if "Sync" not in end.type and small >= 2 and 2 * small >= total:
            most = max(end.updates, key=lambda update: update.small_batches)
            yield Evidence(self.code, end.name, most.site, small, most.fewest_values)
