"""BN017: updates in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

from bnguard.findings.events import LayerEnd
from bnguard.findings.rule import Evidence, Rule


class BN017(Rule):
    """The layer updates in eval mode."""

    code = "BN017"
    title = "updates in eval mode"
    fix = (
        "InstanceNorm normalises with each instance and updates in eval mode, too, once track_running_stats is False: "
        "leave the flag on and use frozen(model, use_running_stats=True), or set running_mean and running_var to None; "
        "in a layer of your own, update only where self.training is True"
    )
    short_fix = "leave track_running_stats on, or use frozen(model, use_running_stats=True)"
    in_run = "{g.of} made {g.updates} in eval mode"
    in_brief = "{g.where} moved {g.count} in eval mode, {g.updates}"

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """Each line that did so."""
        counts: dict[str, int] = {}
        for site in end.updates:
            if not (site.mode.training or site.mode.recompute or site.mode.calibration):
                counts[site.site] = counts.get(site.site, 0) + site.count
        for where, count in counts.items():
            yield Evidence(self.code, end.name, where, count)
