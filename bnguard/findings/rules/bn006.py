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

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The line with most such updates, if they are half of all; the last batch of an epoch may be small."""
        small = sum([update.small_batches for update in end.updates])
        total = sum([update.count for update in end.updates])
        if "Sync" not in end.type and small >= 2 and 2 * small >= total:
            most = max(end.updates, key=lambda update: update.small_batches)
            yield Evidence(self.code, end.name, most.site, small, most.fewest_values)
