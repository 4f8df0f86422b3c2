"""Where a forward of a guarded layer runs, and whose statistics it uses there."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError
from bnguard.guard.copies import InstancePatch, clones_of
from bnguard.guard.hold import NO_STATISTICS, converted, guards
from bnguard.guard.policy import NO_RULING, PolicyEntry, decide
from bnguard.layers.kinds import (
    BATCH_NORM,
    BATCH_NORMS,
    INSTANCE_NORM,
    OTHER_BUFFERS,
    OWN_FORWARD,
    SYNC_BATCH_NORM,
    LayerKind,
    StatsLayer,
    statistics_of,
)
from bnguard.layers.swaps import own_tensors
from bnguard.torch_internals.batch_sizes import refuse_single_values
from bnguard.torch_internals.checkpointing import current_region
from bnguard.torch_internals.compile import (
    GRAPHS_REFUSED,
    at_compile_time,
    is_exporting,
    record_compiled,
    refused_in_graphs,
)
from bnguard.torch_internals.distributed import is_distributed
from bnguard.torch_internals.functional_call import in_functional_call
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import are_on_cuda, is_capturing, is_recorded, unseen


@at_compile_time
def traced(key: int) -> None:
    """Records that a graph is traced through the layer with this id."""
    guard = guards.get(key)
    if guard is not None and not is_exporting():
        record_compiled(guard.module)


@refused_in_graphs
def refuse_graph() -> None:
    """Raises the error about a guard in a graph; for torch before 2.12."""
    raise BNGuardError(GRAPHS_REFUSED)


@at_compile_time
def is_cloned(key: int) -> bool:
    """Whether there are clones of the layer with this id which have its ``forward``. A graph cannot say whose runs."""
    guard = guards.get(key)
    return guard is not None and any([_is_of_module(clone) for clone in clones_of([guard])])


@at_compile_time
def class_changed(key: int) -> None:
    """Finds out anew what depends on the class of the layer with this id."""
    guard = guards.get(key)
    if guard is not None:
        guard.conform_again()


@at_compile_time
def recorded(key: int) -> None:
    """Makes the blocks warn that the layer with this id, which they run in eval mode, is traced or exported."""
    guard = guards.get(key)
    for entry in () if guard is None else guard.ruling.entries:
        if entry.block is not None and entry.policy.action == "running":
            entry.block.recorded(key)


@at_compile_time
def _is_lent(key: int) -> bool:
    """Whether ``functional_call`` provides the statistics with which a graph is traced through the layer with this id.

    Only the tracer sees them. The layer itself still has its own, unless the user has replaced them.
    """
    guard = guards.get(key)
    return guard is None or guard.has_own_tensors()


class Surroundings(InstancePatch):
    """A guarded layer in the program around it.

    Attributes:
        names: The buffers that are guarded.
        kind: The family of the layer.
        layer_id: The id of the layer; for a replica, of the layer that it is one of.
        ruling: What follows from the blocks around it.
        members: What the blocks around it want: see Note [Interruption]. If the layer normalises with its statistics,
            with those of the beginning, as soon as a forward has asked for them.
        cls: The class on which the kind depends.
        is_plain: Whether its forward is an ordinary method of its class.

    Args:
        layer: The layer.
        known: Its statistics, in the order of its buffers.
    """

    ruling = NO_RULING
    _on_cuda: bool | None = None  # not known yet
    _turn: threading.RLock | None = None

    def __init__(self, layer: StatsLayer, known: tuple[Tensor | None, ...]) -> None:
        # The whole object, in one go: of each layer one is made at every step.
        self.module = module = layer.module
        self.layer_id = id(module)
        self.members: dict[PolicyEntry, dict[str, Tensor] | None] = {}
        self.names = layer.buffers
        self.previous = module.__dict__.get("forward")
        self._set_class(type(module), layer.kind)
        self._known = known

    def _set_class(self, cls: type[nn.Module], kind: LayerKind) -> None:
        """Sets what depends on the class of the layer, which is of this kind."""
        self.cls = cls
        previous = self.previous
        if previous is not None and kind.hold != "none":
            kind = OWN_FORWARD
        self.kind = kind
        self.is_plain = kind is BATCH_NORM or (previous is None and _is_plain(cls))
        if kind is not BATCH_NORM and self._turn is None:
            self._turn = RLock()
        is_usual = cls in BATCH_NORMS  # to look for an attribute that is not there takes long
        self.copies_itself = not is_usual and hasattr(cls, "__deepcopy__")
        self.reduces_itself = not is_usual and (
            cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
        )

    def is_outdated(self) -> bool:
        """Whether the user's code has changed the class of the layer, or put a ``forward`` on the instance."""
        if type(self.module) is not self.cls:
            return True
        return not self.has_forward and self.module.__dict__.get("forward") is not self.previous

    def look_again(self) -> None:
        """Finds out anew what depends on the class of the layer and on a ``forward`` of the user's."""
        if not self.has_forward:
            self.previous = self.module.__dict__.get("forward")
        found = statistics_of(self.module)[1]
        kind = self.kind if self.kind is OTHER_BUFFERS else OWN_FORWARD if found.hold == "none" else found
        self._set_class(type(self.module), kind)

    def remember(self) -> None:
        """Remembers the current statistics as the layer's own."""
        self._known = tuple(map(own_tensors(self.module, "_buffers").get, self.names))
        self._on_cuda = None

    def of_entry(self) -> Mapping[str, Tensor]:
        """The statistics that the layer normalises with, by buffer name: those of the beginning of the block.

        Nobody writes to them, so they also serve a backward pass after the block. Without those that the layer did not
        have, or had of a class of its own.
        """
        ruling = self.ruling
        decider = decide(ruling.entries, self.layer_id).decider if ruling.action is None else ruling.decider
        held = None if decider is None else self.members.get(decider)
        if decider is None or decider.block is None or held is None:
            return NO_STATISTICS
        if not held or decider.budget:
            captured = decider.block.captured(self.layer_id)
            unread = "num_batches_tracked" if self.kind is BATCH_NORM else None
            held.update([(name, value) for name, value in captured.items() if name != unread])
        own = self.module._buffers if self.kind is BATCH_NORM else own_tensors(self.module, "_buffers")
        for name, value in held.items():
            now = own.get(name)
            if type(now) is not Tensor or now.dtype is not value.dtype or now.device != value.device:
                break
            if not now.is_contiguous():
                break
        else:
            return held
        return {
            name: converted(value, now)
            for name, value in held.items()
            if type(now := own.get(name)) is Tensor and now.shape == value.shape
        }

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, bound as Python binds it."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        if self.is_plain:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.own_forward()(*args, **kwargs)

    def own_forward(self) -> Callable[..., Any]:
        """The forward that the module has without a guard."""
        return _bound_forward(self.module) if self.previous is None else self.previous

    def is_captured(self) -> bool:
        """Whether the forward becomes part of a CUDA graph."""
        if self._on_cuda is None:
            self._on_cuda = are_on_cuda(self._known)
        return self._on_cuda and is_capturing()

    def surroundings(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Literal["graph", "record", "capture"] | None:
        """Whether a forward is compiled into a graph, traced otherwise, or captured in a CUDA graph; else None.

        Records the graph, and reports a checkpointed region around the forward to the blocks that hold.
        """
        if torch.compiler.is_compiling():
            traced(id(self.module))
            return "graph"
        region = current_region()
        if region is not None:
            for entry in self.ruling.entries:
                if entry.block is not None and entry.policy.holds:
                    entry.block.checkpointed(region)
        if self.is_captured():
            return "capture"
        return "record" if is_recorded(args, kwargs) else None

    @unseen
    def rejects(self, args: tuple[Any, ...]) -> bool:
        """Whether torch rejects the input before it counts the batch."""
        check = getattr(self.module, "_check_input_dim", None)
        if check is None or len(args) != 1:
            return False
        try:
            check(args[0])
        except Exception:  # whatever it is, the layer's own forward raises it again
            return True
        return False

    @unseen
    def refuse_batch(self, args: tuple[Any, ...]) -> None:
        """Raises torch's own error if it refuses the batch, which it does after it has counted it."""
        kind, input = self.kind, args[0] if args else None
        is_joint = kind is SYNC_BATCH_NORM and is_distributed()  # then the batches of all ranks count
        if isinstance(input, Tensor) and kind in (BATCH_NORM, SYNC_BATCH_NORM, INSTANCE_NORM) and not is_joint:
            no_batch = getattr(self.module, "_get_no_batch_dim", lambda: 0)()
            size = torch.Size((1, *input.shape)) if input.dim() == no_batch else input.shape
            refuse_single_values(size, per_instance=kind is INSTANCE_NORM)

    def has_own_tensors(self) -> bool:
        """Whether the layer's buffers are the remembered ones, on which compiled graphs depend."""
        buffers = self.module._buffers
        return all([buffers.get(name) is tensor for name, tensor in zip(self.names, self._known, strict=True)])

    def is_foreign(self, module: nn.Module) -> bool:
        """Whether this call uses the statistics of a replica or of ``functional_call``, which are not guarded.

        Statistics that the user replaced for good are the layer's own from then on.
        """
        buffers = module._buffers
        for name, tensor in zip(self.names, self._known, strict=True):
            if buffers.get(name) is not tensor:
                if torch.compiler.is_compiling():
                    return _is_lent(id(self.module))
                if module is not self.module:
                    return not self.shared_statistics(module)
                if own_tensors(module, "_buffers").get(name) is tensor:
                    return False  # swapped by an overlapping forward
                if in_functional_call():
                    return True
                self.remember()
                return False
        return False

    def shared_statistics(self, other: nn.Module) -> tuple[str, ...]:
        """The statistics of the layer that a replica or a clone has, too; it may have assigned others itself."""
        theirs, own = other._buffers, own_tensors(self.module, "_buffers")
        return tuple([name for name in self.names if own.get(name) is not None and theirs.get(name) is own[name]])


def _is_of_module(attributes: dict[str, Any]) -> bool:
    """Whether a dictionary is in use. torch.export makes copies of those of the modules that it exports."""
    owners = [each for each in gc.get_referrers(attributes) if isinstance(each, nn.Module)]
    return any([owner.__dict__ is attributes for owner in owners])


def _is_plain(cls: type) -> bool:
    """Whether ``forward`` is an ordinary method of the class."""
    return type(_unbound_forward(cls)) is FunctionType


def has_fixed_forward(cls: type) -> bool:
    """Whether ``forward`` is a property or the like, which Python finds before a ``forward`` on the instance."""
    return hasattr(type(_unbound_forward(cls)), "__set__")


def _bound_forward(module: nn.Module) -> Callable[..., Any]:
    """The class's forward, bound as Python binds it: descriptors, static and class methods too."""
    cls = type(module)
    found = _unbound_forward(cls)
    bind = getattr(type(found), "__get__", None)
    bound: Callable[..., Any] = found if bind is None else bind(found, module, cls)
    return bound


def _unbound_forward(cls: type) -> Any:
    """``forward`` as it is in the class, or in the first of its bases that has one: ``nn.Module`` does."""
    return next(base.__dict__["forward"] for base in cls.__mro__ if "forward" in base.__dict__)
