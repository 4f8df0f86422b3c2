"""``recompute_frozen``: what activation checkpointing recomputes in backward updates no running statistics."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from types import TracebackType

from torch import nn

from bnguard.guard.hooks import LayerGuard, add_entry, drop_entry
from bnguard.guard.policy import IN_BACKWARD, POLICIES, PolicyEntry
from bnguard.layers.tree import find_layers
from bnguard.torch_internals.checkpointing import recomputed_held
from bnguard.torch_internals.compile import outside_graphs


class recompute_frozen:  # noqa: N801  # lower case, as frozen
    """Keeps the recomputed forward of activation checkpointing from updating running statistics a second time.

    A checkpointed region runs twice in a train step, in the forward and again in the backward pass, and each time its
    normalisation layers update (https://github.com/pytorch/pytorch/issues/96136). With this the first forward updates
    and the recomputed one does not: the statistics are bit for bit those of the network without checkpointing.

    ::

        # as context_fn of torch.utils.checkpoint, use_reentrant=False:
        y = checkpoint(block, x, use_reentrant=False, context_fn=bnguard.recompute_frozen(block))

        # around the step or the whole run, for either kind of checkpoint:
        with bnguard.recompute_frozen(model):
            model(x).sum().backward()

    The recomputed forward normalises with its batch, as the first one did. Not covered: a layer whose train-mode output
    depends on its running statistics (batch renormalisation) recomputes with statistics that have moved in the
    meantime. Under ``torch.compile`` a checkpointed region updates once anyway, and nothing is done.

    Args:
        model: The module whose layers are held: the checkpointed region, or a model around it.

    Raises:
        TypeError: ``model`` is no module.
    """

    __module__ = "bnguard"  # as a user imports it

    @outside_graphs
    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"recompute_frozen() takes a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._policy = IN_BACKWARD
        self._open: list[_Hold] = []

    @outside_graphs
    def __call__(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """The contexts for the forward and for the recomputed forward, as ``context_fn`` returns them."""
        recomputed = recompute_frozen(self._model)
        recomputed._policy = POLICIES["restore"]
        return recomputed_held(), recomputed

    @outside_graphs
    def __enter__(self) -> recompute_frozen:
        hold = _Hold(self._model, PolicyEntry(None, self._policy))
        hold.entry.manager = weakref.ref(self, hold.end)
        try:
            add_entry(find_layers(self._model), hold.entry, hold.guards)
            self._open.append(hold)
            return self
        except BaseException:
            hold.end()
            raise

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        hold = self._open.pop()
        try:
            hold.end()
        except BaseException:  # see Note [Ctrl-C]
            hold.end()
            raise

    def __repr__(self) -> str:
        return f"<bnguard.recompute_frozen of a {type(self._model).__name__}>"


class _Hold:
    """Holds forwards of a model's layers, and compares nothing."""

    def __init__(self, model: nn.Module, entry: PolicyEntry) -> None:
        self.entry = entry
        self.guards: list[LayerGuard] = []
        self._model = model

    def end(self, _: object = None) -> None:
        """Lets go of the layers. May be done again."""
        drop_entry(self.guards, self.entry, self._model)
        self.entry.manager = None  # which knows this object
