"""Count the updates of torch's BatchNorm outside of graphs, in few steps.

``HeldLayer.run`` does the same for every layer and wherever it runs. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnguard.errors import hides_frame
from bnguard.guard.hold import normalise_and_update
from bnguard.guard.policy import Ruling, count_within, give_back
from bnguard.guard.watching import WatchedLayer
from bnguard.layers.bits import same_bits
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.layers.usual_copy import Write
from bnguard.torch_internals.tracing import has_function_mode, is_calm

__tracebackhide__ = hides_frame


class UpdatingLayer(WatchedLayer):
    """A guarded layer whose updates happen, and are counted.

    Attributes:
        run: The layer's forward, as the guards around it want it.
        run_held: The layer's forward, so that its update goes nowhere. These two are methods of a subclass.
    """

    _known: tuple[Any, ...]
    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    run_held: Callable[[tuple[Any, ...], dict[str, Any]], Any]

    def run_updating(self, input: Tensor) -> Any:
        """The forward of torch's BatchNorm in train mode, where it updates unless a budget is spent."""
        ruling, known = self.ruling, self._known  # the ruling of the moment at which it begins
        own = self.module._buffers
        is_usual = len(known) == len(BATCH_NORM_STATISTICS) and own.get("num_batches_tracked") is known[2]
        is_usual = is_usual and not has_function_mode() and is_calm() and known[0].is_cpu
        if ruling.decider is not None or not is_usual:  # decided by a "rollback"
            return self.run((input,), {})
        self.module._check_input_dim(input)
        if ruling.rows is not None:
            return self._run_within(ruling, ruling.rows[self.layer_id], input)
        for entry in ruling.entries:
            if entry.block is not None:
                entry.block.updated(self.layer_id)
        return normalise_and_update(self.module, input)

    def _run_within(self, ruling: Ruling, row: int, input: Tensor) -> Any:
        """Under a budget, with copies of all three statistics from before and after the forward."""
        (entry,), (mean, var, number) = ruling.entries, self._known
        updates = entry.counts[self.layer_id]
        if self.module.momentum == 0:  # it may move the number of batches alone
            return self.run((input,), {})
        if updates.within >= entry.budget and entry.policy.action == "hold":
            return self.run_held((input,), {})
        passing = self.begin_passing() if mean.shape == var.shape else None
        if passing is None:
            return self.run((input,), {})
        try:
            before, number_before = torch.cat((mean, var)), number.item()
            is_within = count_within(updates, entry.budget)
        except RuntimeError:  # converted in place
            is_within = False
        if not is_within:
            self._passing = None  # the forward does not copy them itself
            return self.run((input,), {})
        try:
            return normalise_and_update(self.module, input)
        except Exception:
            if same_bits(before, torch.cat((mean, var))):  # torch has refused the batch
                give_back((entry,), self.layer_id)
            raise
        finally:
            block = entry.block
            write = Write(row, before, torch.cat((mean, var)), number_before, number.item())
            if block is not None:
                self.end_passing(passing, partial(block.wrote, write), partial(block.allowed, self.layer_id, None))
