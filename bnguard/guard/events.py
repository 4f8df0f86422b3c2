"""What happens in one block: what its forwards tell it, what it has said, and what has changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bnguard.errors import BNGuardWarning, StatsChangedError, hides_frame
from bnguard.guard import messages
from bnguard.guard.changes import KnownChanges, change_of_forward
from bnguard.guard.options import Settings
from bnguard.guard.outcome import Outcome
from bnguard.guard.policy import Counts, count_update
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.parents import name_as_parts, registered_root
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import FlatDifference
from bnguard.torch_internals.callsite import CallSites, call_site
from bnguard.torch_internals.checkpointing import Region
from bnguard.torch_internals.distributed import is_distributed

if TYPE_CHECKING:
    from bnguard.records import StatsChange

__tracebackhide__ = hides_frame


class Events:
    """The events of one block.

    Args:
        tree: The modules of the model.
        layers: The layers that the block guards.
        settings: Its options.
        sites: Finds the lines of the user's code.

    Attributes:
        settings: See above.
        has_news: Whether there may be more to say of the block than what a quick comparison finds.
    """

    __slots__ = (
        "_counts", "_has_named", "_has_warned_of_program", "_known", "_layers", "_outcome", "_owners", "_policy",
        "_regions", "_sites", "_tree", "has_news", "settings",
    )  # fmt: skip

    def __init__(self, tree: Tree, layers: Sequence[StatsLayer], settings: Settings, sites: CallSites) -> None:
        self._tree = tree
        self._layers = layers
        self.settings = settings
        self._policy = settings.policy  # each block asks many times
        self._sites = sites
        self._owners: dict[int, int] | None = None
        self._has_warned_of_program = False
        self._has_named = False
        self._regions: dict[int, Region] = {}  # checkpointed, held, and not recomputed so far
        self._start_over()

    def _start_over(self) -> None:
        self._counts = Counts()
        self._known = KnownChanges(self._layers, self._policy)
        self._outcome = Outcome(self.settings)
        self.has_news = False

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the order of the layers."""
        return self._known.listed(dict(self._counts), self._change)

    @property
    def stats_layers(self) -> Sequence[StatsLayer]:
        """The guarded layers."""
        return self._layers

    @property
    def guards_every_model(self) -> bool:
        """Whether the user has not named the model: the pytest plugin, or ``bnguard run``."""
        return self.settings.frontend.is_outermost

    def take_late(self, found: Mapping[int, StatsChange]) -> None:
        """Adds what a comparison has found, by owner, to the changes of the block."""
        self._known.take(found, self._counts)

    # What a forward calls.

    def stopped(self, layer: int) -> StatsChangedError:
        """Records an update that is stopped of the layer with this id; returns the error to raise."""
        self.has_news = True
        count_update(self._counts[layer], call_site())
        found = self._layer(layer)
        return self._outcome.stopped(self._change(found), _mode(found), self.settings.updates)

    def updated(self, layer: int) -> None:
        """Records an update that is let through; the first one of the block is warned about, at the user's line."""
        self.has_news = True
        count = self._counts[layer]
        if count.site is not None:
            count_update(count, count.site)
            return
        site = self._sites.find()
        count_update(count, site)
        if self._outcome.claims_warning():
            found = self._layer(layer)
            self._outcome.updated(self._change(found), _mode(found), self.settings.updates, site)

    def recorded(self, layer: int) -> None:
        """Warns, once a block, that a layer in train mode is traced or exported although it is held in eval mode."""
        self.has_news = True
        if not self._has_warned_of_program:
            self._has_warned_of_program = True
            found = self._layer(layer)
            text = messages.recorded_text(found.names, type(found.module).__name__, self.settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    def checkpointed(self, region: Region) -> None:
        """Keeps a checkpointed region in mind until its backward pass."""
        self.has_news = True
        if region.is_recomputed:
            self._regions.pop(region.key, None)
        elif self.settings.use_running_stats or not region.is_recomputed_held:
            self._regions.setdefault(region.key, region)

    # Parts.

    def _takes_long(self) -> bool:
        """Whether there is more to look at, at the end of the block, than updates that were told of."""
        return bool(self._known.is_compared or self._regions or self._has_warned_of_program or self._has_named)

    def _takes_as_told(self, moved: Sequence[FlatDifference]) -> bool:
        """Whether all that there is to say at the end has been said. What has moved is looked at when asked for."""
        policy, outcome = self._policy, self._outcome
        counts = dict(self._counts)
        seen = {layer: count.beyond for layer, count in counts.items() if count.beyond}
        if not (moved or seen or outcome.has_spoken):
            return True
        if policy.puts_back or not outcome.has_warned or outcome.is_due or is_distributed():
            return False
        self._known.take_later(moved, counts, seen)
        return True

    def _owner(self, layer: int) -> int:
        """The index of the layer with this id."""
        if self._owners is None:
            self._owners = {id(found.module): owner for owner, found in enumerate(self._layers)}
        return self._owners[layer]

    def _name_layers(self) -> None:
        """Names the layers as parts of the whole model where the user did not say which one that is."""
        if self.guards_every_model and not self._has_named:
            self._has_named = True
            name_as_parts(self._layers, registered_root(self._tree.model))

    def _layer(self, layer: int) -> StatsLayer:
        return self._layers[self._owner(layer)]

    def _change(self, layer: StatsLayer) -> StatsChange:
        self._name_layers()
        return change_of_forward(layer, self._counts[id(layer.module)], prevented=self._policy.stops)


def _mode(layer: StatsLayer) -> str:
    return "train" if layer.module.training else "eval"
