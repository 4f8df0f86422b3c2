"""Count the updates of torch's BatchNorm outside of graphs, in few steps.

``HeldLayer.run`` does the same for every layer and wherever it runs. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

from torch import Tensor

from bnguard.errors import hides_frame
from bnguard.guard.hold import normalise_and_update
from bnguard.guard.policy import Reporter, Ruling, count_within, give_back
from bnguard.guard.watching import WatchedLayer, forwards_lock
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.layers.usual_copy import UsualTensors
from bnguard.torch_internals.tracing import has_function_mode, is_calm

__tracebackhide__ = hides_frame


class UpdatingLayer(WatchedLayer):
    """A guarded layer whose updates happen, and are counted.

    Attributes:
        run: The layer's forward, as the guards around it want it.
        run_held: The layer's forward, so that its update goes nowhere. These two are methods of a subclass.
    """

    _known: tuple[Any, ...]
    _usual: UsualTensors | None = None  # once there was an update within a budget
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
        passing = self.begin_passing()
        if passing is None:
            return self.run((input,), {})
        try:
            usual = self._usual_tensors(mean, var, number)
            before = usual.read()
            is_within = count_within(updates, entry.budget)
        except RuntimeError:  # converted or cut in place
            self._usual = None
            is_within = False
        if not is_within:
            self._passing = None  # the forward does not copy them itself
            return self.run((input,), {})
        try:
            return normalise_and_update(self.module, input)
        except Exception:
            if usual.has_statistics(before):  # torch has refused the batch
                give_back((entry,), self.layer_id)
            raise
        finally:
            if (block := entry.block) is not None:
                with forwards_lock:  # before another one begins
                    self._passing = None
                    if passing.is_shared:  # what overlapping ones leave together
                        block.allowed(self.layer_id, None)
                    else:
                        self._keep(block, row, before, usual)

    def _usual_tensors(self, mean: Tensor, var: Tensor, number: Tensor) -> UsualTensors:
        """The statistics, to read their memory. Mostly the same: unless the user has replaced one."""
        usual = self._usual
        if usual is None or not all(map(is_, usual.tensors, (number, mean, var))):
            self._usual = usual = UsualTensors([[mean], [var], [number]])
        return usual

    def _keep(self, block: Reporter, row: int, before: bytes, usual: UsualTensors) -> None:
        """Has the block take what an update within its budget has written."""
        try:
            write = row, before, usual.read_here(), usual.layout
        except RuntimeError:  # they have other memory now
            block.allowed(self.layer_id, usual.layout.by_name(0, before))
        else:
            block.wrote(write)
