"""What the logs of all layers of one watch share."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from bnguard.recording.journal import Journal
from bnguard.recording.optimizer_steps import BackwardCounter, StepCounter
from bnguard.recording.timeline import Timeline
from bnguard.torch_internals.node_hooks import NodeHooks


class Run(NamedTuple):
    """How far the program has come that is being watched.

    Attributes:
        journal: What was noted and not recorded yet.
        steps: The steps of all optimizers.
        backwards: The backward passes.
        timelines: Updates over the steps, by line, in the order of their first updates.
        node_hooks: Registers hooks on nodes of the graph.
    """

    journal: Journal
    steps: StepCounter
    backwards: BackwardCounter
    timelines: defaultdict[str, Timeline]
    node_hooks: NodeHooks
