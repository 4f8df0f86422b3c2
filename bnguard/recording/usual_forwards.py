"""Note the updates of a layer that are like the last one, in few lines.

Note [Usual forwards]
~~~~~~~~~~~~~~~~~~~~~
In a training loop nearly every forward of a layer is like the one before: an update in train mode, from the same line,
with gradients, of a layer that is trained. Whether that is so is asked in two functions without a call of another one
of ours, right before the forward and right after it: what a function costs there is mostly that it is none of those
that are in the caches, see Note [Two parts of a record]. Either may say no of a usual forward. Then all is asked, one
by one; the record is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from bnguard.findings.events import Update, UpdateSite
from bnguard.guard.hold import guards
from bnguard.layers.kinds import StatsLayer, batch_norm_updates
from bnguard.recording.layer_listener import SeenLayer
from bnguard.recording.model_calls import ModelCall
from bnguard.recording.put_back import CopiesBefore
from bnguard.recording.run import Run
from bnguard.recording.update_sites import note_learned
from bnguard.torch_internals.autocast import is_any_autocast
from bnguard.torch_internals.checkpointing import running_backward
from bnguard.torch_internals.tracing import has_dispatch_mode, tracing_state


class UsualForwards(SeenLayer):
    """A layer, and what its updates so far have in common. See Note [Usual forwards].

    Attributes:
        record_update: Records an update that was noted. This and ``_is_frozen`` are methods of a subclass.
    """

    __slots__ = (
        "_backwards", "_copies", "_journal", "_last", "_last_noted", "_optimizers_of", "_run",
        "_steps", "_tick_noted", "_usual_site", "_was_evaluated",
    )  # fmt: skip

    record_update: Callable[..., None]
    _is_frozen: Callable[[nn.Module | None], bool]

    def __init__(self, layer: StatsLayer, run: Run) -> None:
        super().__init__(layer)
        self._run = run
        self._journal, self._steps, self._backwards = run.journal, run.steps, run.backwards
        self._last = self._place(layer.module)
        self._copies = CopiesBefore()
        self._was_evaluated = False
        self._optimizers_of = -1  # the counter's ``changes`` for which what is known of the optimizers is right
        self._last_noted: Update | None = None  # which may be to be recorded
        self._tick_noted = -1  # at which tick it was; -1 if all updates since then have been undone
        self._usual_site: UpdateSite | None = None  # that of the last one, if it was as most updates are

    def is_usual(self, module: nn.Module) -> bool:
        """Whether a forward that is about to begin is like most: it updates, and nothing is to be done before that."""
        tensor, last, fields = self.first_tensor, self._last, module.__dict__
        predict = self.kind.predict
        try:
            buffers = fields["_buffers"]
            if predict is batch_norm_updates:  # in line
                updates = (
                    fields["training"] and fields["track_running_stats"] and buffers["num_batches_tracked"] is not None
                )
            else:
                updates = predict is not None and predict(module)
            if (
                not updates
                or last is None
                or tensor is None
                or buffers[self.first] is not tensor
                or last[0] != id(tensor)
                or last[1] != tensor._version
                or last[2] != tensor.data_ptr()
                or fields["momentum"] == 0
                or not is_grad_enabled()
                or (self._tick_noted == self._steps.ticks and self._copies.left)
                or running_backward() != -1
                or id(module) in guards
            ):
                return False
        except (KeyError, RuntimeError, ValueError):  # see ``_place``
            return False
        self._was_evaluated = False
        return True

    def note_usual(self, module: nn.Module, call: ModelCall, args: tuple[Any, ...], output: Any) -> bool:
        """Notes the update of a usual forward if it is like the last update.

        Args:
            module: The layer, or a clone that shares its statistics.
            call: The call of the module whose forward has called it.
            args: Its arguments.
            output: What it has returned.

        Returns:
            Whether it was. If not, nothing was noted.
        """
        site, steps, last, tensor = self._usual_site, self._steps, self._last, self.first_tensor
        fields = module.__dict__
        if site is None or last is None or not args or type(output) is not Tensor or type(args[0]) is not Tensor:
            return False
        node = output.grad_fn
        line, calibrates, _, number, own, _, _, part = call
        if (
            node is None
            or output._base is not None
            or line != site.site
            or part != site.part
            or calibrates
            or not fields["training"]
            or self._optimizers_of != steps.changes
            or self._module() is not module
            or (self._copies.kept and self._copies.kept[-1].update is None)  # of the forward that is over
            or is_any_autocast()
            or has_dispatch_mode()
            or tracing_state() is not None
            or fields["_buffers"].get(self.first) is not tensor
            or tensor._version != last[1]
            or tensor.data_ptr() != last[2]
        ):
            return False
        for parameter in fields["_parameters"].values():
            if parameter is not None and parameter.requires_grad:
                break
        else:
            if self._is_frozen(module):
                return False
        is_frozen = has_learned = False
        update = Update(site, is_frozen, number, own, self._backwards.count, has_learned)
        run, tick = self._run, steps.ticks
        run.node_hooks.add(node, partial(note_learned, run, update, tick))
        self._last_noted, self._tick_noted = update, tick
        record = self.record_update, (self._module, update, args[0].shape, fields["momentum"], steps.count, tick)
        self._journal.entries.append(record)
        return True

    def _place(self, module: nn.Module | None) -> tuple[int, int, int] | None:
        """The first statistic, its version and its place in memory, if it has them."""
        try:
            # The table of a ScriptModule has no get().
            tensor = self.first_tensor if module is None else module._buffers[self.first]
            return None if tensor is None else (id(tensor), tensor._version, tensor.data_ptr())
        except (KeyError, RuntimeError, ValueError):  # an inference tensor, a lazy one, or one of a transform
            return None
