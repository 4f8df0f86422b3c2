"""``recompute_frozen``: what activation checkpointing recomputes in backward updates no running statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from torch import nn

from bnguard.guard.hooks import LayerGuard, add_entry, drop_entry
from bnguard.guard.policy import IN_BACKWARD, POLICIES, Policy, PolicyEntry
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

    @outside_graphs
    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"recompute_frozen() takes a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._open: list[ExitStack] = []

    @outside_graphs
    def __call__(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """The contexts for the forward and for the recomputed forward, as ``context_fn`` returns them."""
        return recomputed_held(), _Holding(self._model, POLICIES["restore"])

    @outside_graphs
    def __enter__(self) -> recompute_frozen:
        stack = ExitStack()
        stack.enter_context(_Holding(self._model, IN_BACKWARD))
        self._open.append(stack)
        return self

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.pop().close()

    def __repr__(self) -> str:
        return f"<bnguard.recompute_frozen of a {type(self._model).__name__}>"


class _Holding:
    """Holds forwards of a model's layers, and compares nothing. Can be entered again after it was left."""

    @outside_graphs
    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self._model = model
        self._policy = policy
        self._undo = ExitStack()

    @outside_graphs
    def __enter__(self) -> None:
        layers = find_layers(self._model)
        entry = PolicyEntry(None, self._policy)
        guards: list[LayerGuard] = []
        with ExitStack() as undo:
            undo.callback(drop_entry, guards, entry, self._model)
            add_entry(layers, entry, guards)
            self._undo = undo.pop_all()

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()
