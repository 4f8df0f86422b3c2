"""What rules are given: the events of one layer in a run, and a model that is audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.layers.kinds import StatsLayer
from bnguard.records import Mode, StatsUpdates

# Named tuples, because a frozen dataclass takes three times as long to create, and these are in the path of a forward.


class Update(NamedTuple):
    """One forward that updates the statistics of the layer.

    Attributes:
        module: The layer.
        site: The user's line that called the model.
        mode: How the forward runs.
        is_frozen: Whether no parameter of the layer is trained; for a layer without any, no parameter of its model.
    """

    module: nn.Module
    site: str
    mode: Mode
    is_frozen: bool


class Evaluation(NamedTuple):
    """One forward that updates nothing: in eval mode, or in train mode with ``track_running_stats`` off.

    Attributes:
        module: The layer.
        model: Its model, as long as it exists.
    """

    module: nn.Module
    model: nn.Module | None


class Result(NamedTuple):
    """The result of a forward in eval mode, while autograd was recording.

    Attributes:
        output: The output of the layer.
        site: The user's line that called the model.
    """

    output: Any
    site: str


class Forward(NamedTuple):
    """One updating forward of an optimizer step.

    Attributes:
        site: The user's line that called the model.
        call: Number of the call of the outermost module: equal for all forwards inside one call.
        backward: How many backward passes had begun before.
    """

    site: str
    call: int
    backward: int


class StepEnd(NamedTuple):
    """The end of one step of the layer's optimizer in which the layer updated while autograd was recording.

    Attributes:
        forwards: The updating forwards of the step, the first 64 at most; recomputed ones are left out.
        updates: How many there were.
    """

    forwards: tuple[Forward, ...]
    updates: int


@dataclass(frozen=True, slots=True)
class LayerEnd:
    """All that is known of a layer when a run ends, or when findings are asked for earlier.

    Attributes:
        name: What to call the layer: its first name, preceded by the class of its model if several were watched.
        type: The class name.
        momentum: Its momentum when the watch met it.
        updates: Its updates by line and mode, in the order in which they first happened.
        before: Its statistics when the watch met it, by name.
        now: Its statistics at the end, by name.
        has_stepped: Whether any optimizer has made a step.
        optimized: The ids of the parameters of each optimizer that the layer's steps are counted by.
    """

    name: str
    type: str
    momentum: Any
    updates: tuple[StatsUpdates, ...]
    before: Mapping[str, Tensor]
    now: Mapping[str, Tensor]
    has_stepped: bool
    optimized: tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class AuditedModel:
    """A model whose findings are asked for without a run.

    Attributes:
        model: The model.
        layers: Its layers with running statistics, in the order of ``state_dict()``.
        optimizer: The optimizer that trains it, if given.
    """

    model: nn.Module
    layers: tuple[StatsLayer, ...]
    optimizer: Optimizer | None
