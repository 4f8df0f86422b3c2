"""The oracle of the state machine: an unguarded twin of a net, whose statistics are kept by hand.

Nothing in here knows bnguard. It says what the documentation promises about guards around a net, one rule at a time:

- A forward that would update asks the guards around the layer, the innermost first. A budget that is not yet spent, and
  ``"warn"``, let it stand, and the next one out is asked. What one further out prevents was never seen further in.
- ``"raise"`` stops the forward before the layer; ``"restore"`` gives the output of the update, without it;
  ``use_running_stats`` gives the output of eval mode with the statistics of its entry, of layers in eval mode as well.
- Under ``"rollback"`` updates stand until its end, and no guard further out is asked.
- What moves the number of batches alone, with momentum 0 or because torch refuses the batch, is within every budget and
  spends none.
- Where autograd may record a forward inside a guard that rolls back, the forward reads copies of the statistics.
- At the end, ``"raise"``, ``"restore"`` and ``"rollback"`` put back the objects and bits of entry, or those of the last
  update within the budget, past autograd; a converted buffer gets them converted. A tensor that has been given other
  memory meanwhile keeps none of it: whoever gave it, or a backward pass, may still need what is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tests.strategies import HandmadeNorm, OwnForward, same

__all__ = ["Guard", "Outcome", "Stopped", "Twin"]


class Stopped(Exception):
    """Stands for the error of a guard under ``"raise"``."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard


@dataclass(slots=True)
class Saved:
    """A tensor and the value it is to have again."""

    tensor: Tensor
    value: Tensor
    place: int = field(init=False)

    def __post_init__(self) -> None:
        self.place = self.tensor.data_ptr()


@dataclass(eq=False, slots=True)
class Guard:
    """One extent of one guard, as the oracle sees it."""

    policy: str
    layers: list[nn.Module]
    running: bool = False
    budget: int = 0
    affine: bool = False
    spent: dict[nn.Module, int] = field(default_factory=dict)
    saved: dict[tuple[str, nn.Module, str], Saved] = field(default_factory=dict)
    has_warned: bool = False
    has_stopped: bool = False
    untouched: bool = True  # the layer of the update under way, by anything but forwards
    stopped: set[nn.Module] = field(default_factory=set)
    found: set[nn.Module] = field(default_factory=set)  # by any comparison so far

    @property
    def stance(self) -> str:
        return "running" if self.running else self.policy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the end of a block, or a check, does: whether it raises, how often it warns, what it has to tell."""

    found: set[nn.Module]
    swallowed: bool
    warns: int

    @property
    def tells(self) -> bool:
        return bool(self.found or self.swallowed)


@dataclass(slots=True)
class HeldParameter:
    requires_grad: bool
    grad: Tensor | None
    holders: list[Guard]


class Twin:
    """The twin and the guards around it, the outermost first."""

    def __init__(self, net: nn.Sequential) -> None:
        self.net = net
        self.guards: list[Guard] = []
        self.seen: list[dict[str, Tensor]] = []
        self.warnings = 0
        self._held: dict[Tensor, HeldParameter] = {}

    # Forwards.

    def forward(self, input: Tensor) -> Tensor:
        """The forward that the guarded net should have run. ``warnings`` counts those that it should have issued."""
        for stage in self.net:
            for layer in stage:
                tracked = layer._buffers.get("running_mean") is not None
                input = self._layer(layer, input) if tracked else layer(input)
                if tracked:
                    self.seen.append(statistics(layer, clone=True))
        return input

    def verdict(
        self, layer: nn.Module, *, only_counts: bool = False
    ) -> tuple[str, Guard | None, list[Guard], list[Guard]]:
        """What happens to an update: the stance, who decided, who merely sees it, and whose budget pays."""
        warned, within = [], []
        for guard in self.around(layer):
            if guard.budget and (only_counts or guard.spent.get(layer, 0) < guard.budget):
                within.append(guard)
            elif guard.stance == "warn":
                warned.append(guard)
            elif guard.stance == "rollback":
                break
            else:
                return guard.stance, guard, [], []
        return "stand", None, warned, within

    def may_be_free(self, layer: nn.Module) -> bool:
        """Whether a forward presumably moves the number of batches alone, and a budget is asked about it."""
        is_counting = getattr(layer, "momentum", None) == 0 and "num_batches_tracked" in statistics(layer)
        asked = itertools.dropwhile(lambda guard: not guard.budget and guard.stance == "warn", self.around(layer))
        return is_counting and any(guard.budget for guard in itertools.islice(asked, 1))

    def around(self, layer: nn.Module) -> list[Guard]:
        """The guards around a layer, the innermost first."""
        return [guard for guard in reversed(self.guards) if layer in guard.layers]

    def _layer(self, layer: nn.Module, input: Tensor) -> Tensor:
        if not self.around(layer):
            return layer(input)
        if has_own_forward(layer):
            return self._own_forward(layer, input)
        stance, decider, warned, within = self.verdict(layer)
        if not would_update(layer) and stance != "running":
            return self._reading(layer, input)
        if is_rejected(layer, input):
            return layer(input)
        if stance != "running" and self.may_be_free(layer):
            return self._own_forward(layer, input)
        if stance == "raise":
            refuse_single_values(layer, input)
            self._stop(decider, layer)
        if stance == "restore":
            with on_copies(layer):
                return layer(input)
        if stance == "running":
            return self._eval_mode(layer, input, decider)
        self._warn(warned)
        self._look(layer, within)
        before = {name: tensor.detach().clone() for name, tensor in statistics(layer).items()}
        try:
            output = layer(input)
        except Exception:
            if moved(before, statistics(layer)) != ["num_batches_tracked"]:
                self._pay(layer, within)
            raise
        else:
            self._pay(layer, within)
            return output
        finally:
            self._refresh(layer, within)

    def _own_forward(self, layer: nn.Module, input: Tensor) -> Tensor:
        stance, decider, warned, within = self.verdict(layer)
        if stance == "running":
            return self._eval_mode(layer, input, decider)
        is_free = self.may_be_free(layer)
        if stance == "restore" and not is_free:
            with on_copies(layer):
                return layer(input)
        before = {name: Saved(tensor, tensor.detach().clone()) for name, tensor in statistics(layer).items()}
        self._look(layer, self.around(layer))
        failure = output = None
        try:
            output = self._reading(layer, input)
        except Exception as error:
            failure = error
        names = moved({name: saved.value for name, saved in before.items()}, statistics(layer))
        free = self.verdict(layer, only_counts=True)
        is_paid = True
        if names == ["num_batches_tracked"] and (is_free or failure is not None) and free[3]:
            (stance, decider, warned, within), is_paid = free, False
        if names and stance in ("raise", "restore"):
            for name, saved in before.items():
                saved.tensor.data.copy_(saved.value)
                layer._buffers[name] = saved.tensor
            if stance == "raise" and failure is None:
                self._stop(decider, layer)
        elif names:
            if failure is None:
                self._warn(warned)
            if is_paid:
                self._pay(layer, within)
            self._refresh(layer, within)
        if failure is not None:
            raise failure
        return output

    def _reading(self, layer: nn.Module, input: Tensor) -> Tensor:
        """Where the statistics will be put back before a backward pass, autograd must not have saved them."""
        if not torch.is_grad_enabled() or all(guard.stance != "rollback" for guard in self.around(layer)):
            return layer(input)
        if layer.training and isinstance(layer, _BatchNorm) and not has_own_forward(layer):
            return layer(input)  # whose backward pass reads those of its batch
        after: Callable[[], dict[str, Tensor]] = dict
        try:
            with on_copies(layer) as after:
                return layer(input)
        finally:
            for name, tensor in after().items():
                layer._buffers[name].data.copy_(tensor)

    def _eval_mode(self, layer: nn.Module, input: Tensor, guard: Guard) -> Tensor:
        mode, flag = layer.training, getattr(layer, "track_running_stats", None)
        layer.training = False
        is_instance_norm = isinstance(layer, _InstanceNorm) and not has_own_forward(layer)
        if is_instance_norm:
            layer.track_running_stats = True  # else it would use the batch
        try:
            with on_copies(layer):
                for name, tensor in statistics(layer).items():
                    layer._buffers[name] = guard.saved["_buffers", layer, name].value.to(tensor.dtype, copy=True)
                return layer(input)
        finally:
            layer.training = mode
            if is_instance_norm:
                layer.track_running_stats = flag

    def _stop(self, guard: Guard, layer: nn.Module) -> None:
        guard.has_stopped = True
        guard.stopped.add(layer)
        raise Stopped(guard)

    def _warn(self, guards: Iterable[Guard]) -> None:
        for guard in guards:
            self.warnings += not guard.has_warned
            guard.has_warned = True

    @staticmethod
    def _pay(layer: nn.Module, within: list[Guard]) -> None:
        for guard in within:
            guard.spent[layer] = guard.spent.get(layer, 0) + 1

    def _look(self, layer: nn.Module, within: list[Guard]) -> None:
        for guard in within:
            guard.untouched = not any(
                key[0] == "_buffers" and key[1] is layer and self._differs(key, saved)
                for key, saved in guard.saved.items()
            )

    @staticmethod
    def _refresh(layer: nn.Module, within: list[Guard]) -> None:
        """An update within the budget is to stay, unless it built on what somebody else had written."""
        for guard in within:
            if guard.untouched:
                with torch.inference_mode(mode=False):
                    for name, tensor in statistics(layer).items():
                        guard.saved["_buffers", layer, name].value = tensor.detach().clone()

    # Blocks.

    def enter(self, guard: Guard) -> None:
        """Puts a guard innermost."""
        for layer in guard.layers:
            names = {"_buffers": list(statistics(layer)), "_parameters": []}
            if guard.affine:
                names["_parameters"] = [name for name in ("weight", "bias") if layer._parameters.get(name) is not None]
            for table, listed in names.items():
                for name in listed:
                    tensor = getattr(layer, table)[name]
                    guard.saved[table, layer, name] = Saved(tensor, tensor.detach().clone())
        for (table, _, _), saved in guard.saved.items():
            if table == "_parameters":
                parameter = saved.tensor
                held = self._held.setdefault(parameter, HeldParameter(parameter.requires_grad, parameter.grad, []))
                held.holders.append(guard)
                parameter.requires_grad_(False)
                parameter.grad = None
        self.guards.append(guard)

    def check(self, guard: Guard, *, is_end: bool = False) -> Outcome:
        """Compares, puts back, and says what to tell."""
        found = {key[1] for key, saved in guard.saved.items() if self._differs(key, saved)}
        if guard.policy == "warn":
            guard.found = found
        else:
            guard.found |= found
            if is_end or guard.stance != "rollback":
                for key, saved in guard.saved.items():
                    self._put_back(key, saved)
        told = found and guard.policy != "rollback" and not (guard.policy == "warn" and guard.has_warned)
        warns = bool(told) and guard.policy != "raise"
        if guard.policy == "warn":
            guard.has_warned = guard.has_warned or warns
        outcome = Outcome(found if told else set(), guard.has_stopped, int(warns))
        # An error of a check may be caught, like that of a forward.
        guard.has_stopped = guard.has_stopped or (guard.policy == "raise" and outcome.tells)
        return outcome

    def leave(self, guard: Guard) -> Outcome:
        """Takes a guard off; it need not be the innermost."""
        outcome = self.check(guard, is_end=True)
        self.guards.remove(guard)
        for parameter, held in list(self._held.items()):
            if guard in held.holders:
                held.holders = [other for other in held.holders if other is not guard]
                if not held.holders:
                    parameter.requires_grad_(held.requires_grad)
                    # As torch converts a gradient along with its parameter.
                    parameter.grad = None if held.grad is None else held.grad.to(parameter.dtype)
                    del self._held[parameter]
        return outcome

    @property
    def holds_parameters(self) -> bool:
        return bool(self._held)

    @staticmethod
    def _differs(key: tuple[str, nn.Module, str], saved: Saved) -> bool:
        table, layer, name = key
        current = getattr(layer, table).get(name)
        if current is None:
            return True
        expected = saved.value.to(current.dtype)
        if current.dtype != saved.value.dtype and current.shape == expected.shape:
            # Converting may give a NaN other bits, depending on the way.
            both = current.isnan() & expected.isnan()
            return not same(current.detach().masked_fill(both, 0), expected.masked_fill(both, 0))
        return not same(current, expected)

    def _put_back(self, key: tuple[str, nn.Module, str], saved: Saved) -> None:
        table, layer, name = key
        owner = getattr(layer, table)
        current = owner.get(name)
        if current is not None and current.dtype != saved.tensor.dtype:
            if self._differs(key, saved):
                value = saved.value.to(current.dtype, copy=True)  # what is written to it later is no part of it
                parameter = isinstance(current, nn.Parameter)
                owner[name] = nn.Parameter(value, current.requires_grad) if parameter else value
            return
        value = saved.value.to(saved.tensor.dtype)
        if not same(saved.tensor, value):
            if saved.tensor.data_ptr() == saved.place:
                saved.tensor.data.copy_(value)
            else:
                saved.tensor.data = value.clone()
        owner[name] = saved.tensor


def statistics(layer: nn.Module, clone: bool = False) -> dict[str, Tensor]:
    """The running statistics of a layer, by name."""
    found = {name: tensor for name, tensor in layer._buffers.items() if tensor is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()} if clone else found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The statistics that have other bits."""
    return [name for name in before if not same(before[name], after[name])]


def has_own_forward(layer: nn.Module) -> bool:
    """Whether something other than torch's own code runs, of which nothing can be known beforehand."""
    return isinstance(layer, (OwnForward, HandmadeNorm)) or "forward" in layer.__dict__


def would_update(layer: nn.Module) -> bool:
    """Whether torch's own layer decides to update, from its flags."""
    if isinstance(layer, _InstanceNorm):
        return layer.training or not layer.track_running_stats
    return layer.training and layer.track_running_stats


def may_update(layer: nn.Module) -> bool:
    """Whether a forward of the layer as it stands could update it."""
    return layer.training if isinstance(layer, HandmadeNorm) else would_update(layer)


def is_rejected(layer: nn.Module, input: Tensor) -> bool:
    """Whether torch turns the input down before anything else happens."""
    try:
        layer._check_input_dim(input)
    except ValueError:
        return True
    return False


def refuse_single_values(layer: nn.Module, input: Tensor) -> None:
    """Raises torch's error about a batch with one value a channel, without what torch does before it looks."""
    with on_copies(layer):
        try:
            type(layer).forward(layer, input)
        except ValueError as error:
            if str(error).startswith("Expected more than 1"):
                raise
        except Exception:  # of no interest: the update is stopped first
            pass


@contextmanager
def on_copies(layer: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Exchanges the statistics of a layer for copies; yields what tells the copies' values, also afterwards."""
    originals = dict(layer._buffers)
    after: dict[str, Tensor] = {}
    layer._buffers.update(statistics(layer, clone=True))
    try:
        yield lambda: after
    finally:
        after.update(statistics(layer))
        layer._buffers.clear()
        layer._buffers.update(originals)
