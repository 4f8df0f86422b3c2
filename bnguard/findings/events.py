"""What rules are given: the events of one layer in a run, and a model that is audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.layers.kinds import StatsLayer
from bnguard.records import Mode


@dataclass(slots=True, eq=False, repr=False)
class UpdateSite:
    """The updates of one layer from one line in one mode, as far as the run has come. For fields see ``StatsUpdates``.

    Attributes:
        site: The user's line that called the model.
        part: The line in the model that called the part without gradients to which the layer belongs; empty if the
            model ran as a whole.
        results: Of how many of them the result had a gradient function: only then can be told what ``learned`` says.
        learned: Through how many of those results a backward pass went.
        recalibrating: How many of them came after a reset of the statistics, before the next optimizer step.
        momenta: The momenta of the layer, a few of them.
    """

    site: str
    part: str
    mode: Mode
    first_step: int
    last_step: int
    batch_shape: tuple[int, ...] | None
    count: int = 0
    fewest_values: int | None = None
    small_batches: int = 0
    results: int = 0
    learned: int = 0
    recalibrating: int = 0
    momenta: set[Any] = field(default_factory=set)


@dataclass(slots=True, eq=False, repr=False)
class Update:
    """One forward that has updated the statistics of the layer.

    Attributes:
        of: The updates of which this is one.
        is_frozen: Whether no parameter of the layer is trained; for a layer without any, none of the part of the model
            around it.
        call: Number of the call of the outermost module: equal for all forwards inside one call.
        parent: Number of the call of the module that called the layer.
        backward: How many backward passes had begun before.
        has_learned: Whether a backward pass went through the result; None if that cannot be told.
        is_undone: Whether the script has put back the statistics from before it.
    """

    of: UpdateSite
    is_frozen: bool
    call: int
    parent: int
    backward: int
    has_learned: bool | None = None
    is_undone: bool = False

    @property
    def site(self) -> str:
        """The line to name."""
        return self.of.part or self.of.site

    @property
    def mode(self) -> Mode:
        """How the forward ran."""
        return self.of.mode


class Evaluation(NamedTuple):
    """One forward that updates nothing: in eval mode, or in train mode with ``track_running_stats`` off.

    Attributes:
        module: The layer.
        model: Its model, as long as it exists.
        is_held: Whether it ran in train mode inside a guard that keeps the statistics.
    """

    module: nn.Module
    model: nn.Module | None
    is_held: bool = False


class Result(NamedTuple):
    """The result of a forward in eval mode, while autograd was recording.

    Attributes:
        output: The output of the layer.
        site: The user's line that called the model.
    """

    output: Any
    site: str


class StepEnd(NamedTuple):
    """What lies between two steps of any optimizers, in which the layer updated.

    Attributes:
        updates: The updates, the first 64 at most.
        total: How many there were.
        is_trained: Whether the step is one of an optimizer of the layer's parameters; None if no step came.
        is_of_rival: Whether the step is one of an optimizer of another model alone.
    """

    updates: tuple[Update, ...]
    total: int
    is_trained: bool | None
    is_of_rival: bool


class LayerEnd(NamedTuple):
    """All that is known of a layer when a run ends, or when findings are asked for earlier.

    Attributes:
        name: What to call the layer: its first name, preceded by the name of its model if several were watched.
        type: The class name.
        momentum: Its momentum when the watch met it.
        updates: Its updates by line and mode, in the order in which they first happened.
        learned: By line, most updates of a layer that a backward pass went through.
        before: Its statistics when the watch met it, by name.
        now: Its statistics at the end, by name.
        parameters_before: Its parameters when the watch met it, by name; empty if an optimizer trains it.
        parameters_now: Its parameters at the end, by name.
        steps: How many steps all optimizers have made.
        is_trained: Whether an optimizer has trained the layer.
        is_loaded: Whether a state dict was loaded into it.
        evaluations: How many forwards in eval mode updated nothing.
        rewritten: How many writes between two evaluations nothing explains.
        optimized: The ids of the parameters of the optimizers that train the layer.
        broken: Between which optimizer steps its statistics broke; None if that was not measured.
    """

    name: str
    type: str
    momentum: Any
    updates: tuple[UpdateSite, ...]
    learned: Mapping[str, int]
    before: Mapping[str, Tensor]
    now: Mapping[str, Tensor]
    parameters_before: Mapping[str, Tensor]
    parameters_now: Mapping[str, Tensor]
    steps: int
    is_trained: bool
    is_loaded: bool
    evaluations: int
    rewritten: int
    optimized: frozenset[int]
    broken: tuple[int, int] | None = None


class AuditedModel(NamedTuple):
    """A model whose findings are asked for without a run.

    Attributes:
        model: The model.
        layers: Its layers with running statistics, in the order of ``state_dict()``.
        optimizer: The optimizer that trains it, if given.
    """

    model: nn.Module
    layers: tuple[StatsLayer, ...]
    optimizer: Optimizer | None
