"""Random programs around a guarded net, compared step by step with a twin whose statistics are kept by hand.

``HYPOTHESIS_PROFILE=long`` runs 20,000 programs, see ``tests/strategies.py``.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import bnguard
from tests.strategies import (
    DTYPES,
    ODD,
    Bomb,
    NetSpec,
    Seen,
    batch,
    differing,
    eager_switching,
    machine_settings,
    nets,
    odd_batch,
    random_state,
    same,
    seeds,
    set_random_state,
)
from tests.twin import Guard, Outcome, Stopped, Twin, may_update

POLICIES = ("raise", "warn", "restore", "rollback")
WRITES = ("data", "in place", "reset", "assign", "same bits", "negative zero", "functional", "move")
GRAD_MODES: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@st.composite
def guards(draw: st.DrawFn) -> dict[str, Any]:
    """What ``enter`` takes."""
    return {
        "policy": draw(st.sampled_from(POLICIES)),
        "running": draw(st.sampled_from([False, False, True])),
        "updates": draw(st.sampled_from([0, 0, 1, 2])),
        "affine": draw(st.sampled_from([False, False, False, True])),
        "where": draw(st.sampled_from(["", "", "stem", "body"])),
        "by_include": draw(st.booleans()),
        "in_thread": draw(st.sampled_from([False, False, True])),
    }


@dataclass(slots=True)
class Handle:
    """A guard, and what the oracle knows of its open blocks."""

    guard: bnguard.frozen
    options: dict[str, Any]
    target: nn.Module
    layers: list[tuple[nn.Module, nn.Module]]  # of the net, of the twin
    blocks: list[Block] = field(default_factory=list)
    in_thread: bool = False


@dataclass(slots=True)
class Block:
    model: Guard
    objects: list[tuple[dict[str, Any], str, Tensor]]  # where they hung at entry: a table, a name, the tensor
    errors: list[bnguard.StatsChangedError] = field(default_factory=list)


@dataclass(slots=True)
class Result:
    value: Any = None
    error: BaseException | None = None
    warnings: list[warnings.WarningMessage] = field(default_factory=list)


def attempt(function: Callable[[], Any], in_thread: bool = False) -> Result:
    """Runs ``function``, here or in a thread of its own; keeps its error and the warnings of bnguard."""
    result = Result()

    def run() -> None:
        try:
            result.value = function()
        except BaseException as error:
            result.error = error

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if in_thread:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
    result.warnings = [warning for warning in caught if issubclass(warning.category, bnguard.BNGuardWarning)]
    for warning in result.warnings:
        assert warning.filename.startswith(str(Path(__file__).parents[1])), warning
    return result


class GuardMachine(RuleBasedStateMachine):
    """One net under guards, and its twin without."""

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Sequential | None = None

    @initialize(spec=nets(), first=st.lists(guards(), max_size=2))
    def build(self, spec: NetSpec, first: list[dict[str, Any]]) -> None:
        self.spec = spec
        self.dtype = spec.dtype
        self.net = spec.build(self.device)
        self.twin = Twin(copy.deepcopy(self.net))
        self.pairs = dict(zip(self.net.modules(), self.twin.net.modules(), strict=True))
        self.norms = [module for module in self.net.modules() if module._buffers.get("running_mean") is not None]
        self.log: list[dict[str, Tensor]] = []
        for layer in self.norms:
            hook = Seen(0)
            hook.log = self.log
            layer.register_forward_hook(hook)
        self.traces = self.traces_of(self.net)
        self.handles: list[Handle] = []
        self.open: list[Handle] = []  # one entry for each block, the outermost first
        self.pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.optimizers = [
            torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(1))], lr=0.05, momentum=0.9, weight_decay=0.01)
            for net in (self.net, self.twin.net)
        ]
        for guard in first:
            self.enter_new(**guard)

    # Modes.

    @rule(position=st.integers(0, 20), mode=st.booleans())
    def set_mode_of_a_part(self, position: int, mode: bool) -> None:
        parts = list(self.pairs.items())
        for part in parts[position % len(parts)]:
            part.train(mode)

    @rule(mode=st.booleans())
    def set_mode(self, mode: bool) -> None:
        for net in (self.net, self.twin.net):
            net.train(mode)

    # Forwards and what follows.

    @rule(
        size=st.integers(2, 4),
        seed=seeds(),
        mode=st.sampled_from(list(GRAD_MODES)),
        when=st.sampled_from(["now", "later", "never"]),
        in_thread=st.booleans(),
    )
    def forward(self, size: int, seed: int, mode: str, when: str, in_thread: bool) -> None:
        inputs = batch(self.spec, size, seed, self.device, self.dtype)
        self.run_forward(inputs, mode, when, in_thread)

    @rule(size=st.integers(2, 4), seed=seeds(), when=st.sampled_from(["now", "later"]), step=st.booleans())
    def train_step(self, size: int, seed: int, when: str, step: bool) -> None:
        for net in (self.net, self.twin.net):
            net.train()
        self.run_forward(batch(self.spec, size, seed, self.device, self.dtype), "grad", when, in_thread=False)
        if step:
            self.optimizer_step()

    @rule(kind=st.sampled_from([*ODD, "bomb"]), seed=seeds(), in_thread=st.booleans())
    def odd_forward(self, kind: str, seed: int, in_thread: bool) -> None:
        if kind == "bomb":
            inputs = batch(self.spec, 2, seed, self.device, self.dtype)
        else:
            inputs = odd_batch(self.spec, kind, seed, self.device, self.dtype)
        bombs = [module for module in [*self.pairs, *self.pairs.values()] if isinstance(module, Bomb)]
        for bomb in bombs:
            bomb.armed = kind == "bomb"
        try:
            self.run_forward(inputs, "grad", "now", in_thread)
        finally:
            for bomb in bombs:
                del bomb.armed

    def run_forward(self, inputs: Tensor, mode: str, when: str, in_thread: bool) -> None:
        ours, theirs = inputs, inputs.clone(memory_format=torch.preserve_format)
        for tensor in (ours, theirs):
            tensor.requires_grad_(mode == "grad")
        random = random_state()

        def call() -> Tensor:
            with GRAD_MODES[mode]():
                return self.net(ours)

        result = attempt(call, in_thread)
        random_after = random_state()
        set_random_state(random)
        self.log, log = [], self.log
        for layer in self.norms:
            next(hook for hook in layer._forward_hooks.values() if isinstance(hook, Seen)).log = self.log
        self.twin.seen.clear()
        self.twin.warnings = 0
        expected = Result()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with GRAD_MODES[mode]():
                    expected.value = self.twin.forward(theirs)
            except Exception as error:
                expected.error = error
        assert len(result.warnings) == self.twin.warnings, [str(warning.message) for warning in result.warnings]
        if isinstance(expected.error, Stopped):
            assert isinstance(result.error, bnguard.StatsChangedError), repr(result.error)
            self.block_of(expected.error.guard).errors.append(result.error)
            set_random_state(random_after)
            return
        self.same_error(result.error, expected.error)
        assert all(map(torch.equal, random_after, random_state())), "random numbers"
        if expected.error is not None:
            return
        assert same(result.value, expected.value), "outputs"
        assert len(log) == len(self.twin.seen), "hooks"
        for now, then in zip(log, self.twin.seen, strict=True):
            assert not list(differing(now, then)), "a hook of the user saw other statistics"
        if mode == "grad" and when != "never" and result.value.requires_grad:
            self.pending.append((result.value, expected.value, ours, theirs))
            if when == "now":
                self.backward(-1)

    @staticmethod
    def same_error(ours: BaseException | None, theirs: BaseException | None) -> None:
        assert type(ours) is type(theirs), (ours, theirs)
        # Version counters start at other numbers in a copy.
        assert re.sub(r"version \d+", "version", str(ours)) == re.sub(r"version \d+", "version", str(theirs))

    @precondition(lambda self: self.net is not None and self.pending)
    @rule(position=st.integers(0, 5))
    def backward_of_an_earlier_forward(self, position: int) -> None:
        self.backward(position % len(self.pending))

    def backward(self, position: int) -> None:
        value, twin_value, ours, theirs = self.pending.pop(position)
        weights = torch.linspace(-1, 1, value.numel(), device=value.device).reshape(value.shape).to(value.dtype)
        results = [
            attempt(lambda value=value: value.mul(weights).sum().backward(retain_graph=True))
            for value in (value, twin_value)
        ]
        self.same_error(results[0].error, results[1].error)
        assert not results[0].warnings
        self.same_gradients(ours, theirs)

    def same_gradients(self, ours: Tensor, theirs: Tensor) -> None:
        tensors = [(ours, theirs), *zip(self.net.parameters(), self.twin.net.parameters(), strict=True)]
        for tensor, other in tensors:
            assert tensor.requires_grad == other.requires_grad
            assert (tensor.grad is None) == (other.grad is None)
            if tensor.grad is not None:
                assert same(tensor.grad, other.grad), "gradients"

    @rule()
    def step_alone(self) -> None:
        self.optimizer_step()

    def optimizer_step(self) -> None:
        results = [attempt(optimizer.step) for optimizer in self.optimizers]
        self.same_error(results[0].error, results[1].error)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    @precondition(lambda self: self.net is not None and not self.spec.noise)
    @rule(seed=seeds(), number=st.integers(2, 3))
    def parallel_forwards(self, seed: int, number: int) -> None:
        """Forwards at the same time, where the order in which they run does not matter."""
        assume(self.order_does_not_matter(number))
        inputs = batch(self.spec, 3, seed, self.device, self.dtype)
        barrier = threading.Barrier(number)
        results: list[Result] = []

        def call() -> None:
            result = Result()
            barrier.wait()
            try:
                with torch.no_grad():
                    result.value = self.net(inputs)
            except Exception as error:
                result.error = error
            results.append(result)

        threads = [threading.Thread(target=call) for _ in range(number)]
        with warnings.catch_warnings(record=True) as caught, eager_switching():
            warnings.simplefilter("always")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.log.clear()
        self.twin.warnings = 0
        values, stops = [], []
        for _ in range(number):
            try:
                with torch.no_grad():
                    values.append(self.twin.forward(inputs))
            except Stopped as stop:
                stops.append(stop)
        self.twin.seen.clear()
        assert len([w for w in caught if issubclass(w.category, bnguard.BNGuardWarning)]) == self.twin.warnings
        errors = [result.error for result in results if result.error is not None]
        assert len(errors) == len(stops), errors
        for error, stop in zip(errors, stops, strict=True):
            assert isinstance(error, bnguard.StatsChangedError)
            self.block_of(stop.guard).errors.append(error)
        for result in results:
            assert result.error is not None or same(result.value, values[0]), "outputs of parallel forwards"

    def order_does_not_matter(self, number: int) -> bool:
        """Whether at most one update of each layer would stand, and nothing reads what it writes."""
        for layer in self.twin.net.modules():
            if layer._buffers.get("running_mean") is None or not may_update(layer):
                continue
            if self.twin.may_be_free(layer):
                return False
            # Guards around one that rolls back are not asked.
            around = list(itertools.takewhile(lambda guard: guard.stance != "rollback", self.twin.around(layer)))
            left = [max(guard.budget - guard.spent.get(layer, 0), 0) for guard in around]
            holders = [(rest, guard) for rest, guard in zip(left, around, strict=True) if guard.stance != "warn"]
            # What is left once the budgets are spent: the smallest budget of those that hold decides.
            if not holders or min(rest for rest, _ in holders) > 1:
                return False
            if min(rest for rest, _ in holders) == 1 and (
                "running" in [guard.stance for _, guard in holders] or "forward" in layer.__dict__
            ):
                return False
        return True

    # Blocks.

    @rule(guard=guards())
    def enter(self, guard: dict[str, Any]) -> None:
        if len(self.open) < 5:
            self.enter_new(**guard)

    @precondition(lambda self: self.net is not None and not self.open)
    @rule(guard=guards())
    def enter_the_first(self, guard: dict[str, Any]) -> None:
        self.enter_new(**guard)

    @precondition(lambda self: self.net is not None and len(self.open) == 1)
    @rule(guard=guards())
    def nest(self, guard: dict[str, Any]) -> None:
        self.enter_new(**guard)

    def enter_new(
        self, policy: str, running: bool, updates: int, affine: bool, where: str, by_include: bool, in_thread: bool
    ) -> None:
        part = self.net.get_submodule(where)
        if not any(layer in self.norms for layer in part.modules()):
            where, part = "", self.net
        guarded = [layer for layer in part.modules() if layer in self.norms]
        running = running and policy != "rollback"
        options = {
            "on_change": policy,
            "use_running_stats": running,
            "updates": 0 if running or policy == "rollback" else updates,
            "affine": affine,
        }
        target = part
        if by_include:
            options["include"] = where or part
            target = self.net
        guard = bnguard.frozen(target, **options)
        handle = Handle(guard, options, target, [(layer, self.pairs[layer]) for layer in guarded], [], in_thread)
        self.handles.append(handle)
        self.enter_block(handle)

    @precondition(lambda self: self.net is not None and self.handles)
    @rule(position=st.integers(0, 5))
    def enter_again(self, position: int) -> None:
        handle = self.handles[position % len(self.handles)]
        assume(len(self.open) < 5 and not (handle.in_thread and handle.blocks))
        handle.in_thread = False
        self.enter_block(handle)

    def enter_block(self, handle: Handle) -> None:
        note(f"enter {handle.options}")
        options = handle.options
        model = Guard(
            options["on_change"],
            [twin for _, twin in handle.layers],
            options["use_running_stats"],
            options["updates"],
            options["affine"],
        )
        tables = ["_buffers", "_parameters"] if options["affine"] else ["_buffers"]
        objects = [
            (getattr(layer, table), name, tensor)
            for layer, _ in handle.layers
            for table in tables
            for name, tensor in getattr(layer, table).items()
            if tensor is not None
        ]
        result = attempt(handle.guard.start, handle.in_thread)
        assert result.error is None, repr(result.error)
        assert not result.warnings
        self.twin.enter(model)
        handle.blocks.append(Block(model, objects))
        self.open.append(handle)

    @precondition(lambda self: self.net is not None and self.open)
    @rule(
        position=st.sampled_from([0, 0, 0, 1, 2]),
        error=st.sampled_from([None, None, "value", "own", "interrupt", "generator"]),
    )
    def leave(self, position: int, error: str | None) -> None:
        """Leaves the innermost block, or another one."""
        handle = self.open[-1 - position % len(self.open)]
        block = handle.blocks[-1]
        in_flight: BaseException | None = None
        if error == "own" and block.errors:
            in_flight = block.errors[-1]
        elif error in ("value", "own"):
            in_flight = ValueError("in flight")
        elif error is not None:
            in_flight = {"interrupt": KeyboardInterrupt, "generator": GeneratorExit}[error]()
        self.leave_block(handle, in_flight)

    def leave_block(self, handle: Handle, in_flight: BaseException | None) -> None:
        block = handle.blocks.pop()
        last = max(index for index, other in enumerate(self.open) if other is handle)
        del self.open[last]
        notes = len(getattr(in_flight, "__notes__", []))
        result = attempt(lambda: handle.guard.__exit__(type(in_flight) if in_flight else None, in_flight, None))
        outcome = self.twin.leave(block.model)
        swallowed = outcome.swallowed and not any(str(error) in str(in_flight) for error in block.errors)
        outcome = Outcome(outcome.found, swallowed, outcome.warns)
        self.check_outcome(block, result, outcome, in_flight)
        if in_flight is not None:
            assert len(getattr(in_flight, "__notes__", [])) == notes + outcome.tells
            getattr(in_flight, "__notes__", []).clear()
        names = {change.names[0] for change in handle.guard.changes}
        expected = block.model.found | block.model.stopped
        prefixes = {module: name for name, module in handle.target.named_modules()}
        assert names == {prefixes[layer] for layer, twin in handle.layers if twin in expected}, handle.guard.changes
        if block.model.policy != "warn":
            for table, name, tensor in block.objects:
                assert table[name] is tensor or table[name].dtype != tensor.dtype, f"another object is {name}"

    def check_outcome(self, block: Block, result: Result, outcome: Outcome, in_flight: BaseException | None) -> None:
        if block.model.policy == "raise" and outcome.tells and in_flight is None:
            assert isinstance(result.error, bnguard.StatsChangedError), repr(result.error)
            assert not result.warnings
            return
        assert result.error is None, repr(result.error)
        silent = block.model.policy == "raise" and not isinstance(in_flight, GeneratorExit)
        assert len(result.warnings) == (0 if silent else int(outcome.tells)), result.warnings

    @precondition(lambda self: self.net is not None and self.open)
    @rule(position=st.integers(0, 4))
    def check(self, position: int) -> None:
        handle = self.open[position % len(self.open)]
        block = handle.blocks[-1]
        result = attempt(handle.guard.check)
        self.check_outcome(block, result, self.twin.check(block.model), None)
        if result.error is not None:
            block.errors.append(result.error)

    @precondition(lambda self: self.net is not None and any(not handle.blocks for handle in self.handles))
    @rule()
    def stop_what_is_closed(self) -> None:
        handle = next(handle for handle in self.handles if not handle.blocks)
        for function in (handle.guard.stop, handle.guard.check):
            result = attempt(function)
            assert result.error is None
            assert not result.warnings

    def block_of(self, model: Guard) -> Block:
        return next(block for handle in self.handles for block in handle.blocks if block.model is model)

    # Writes from elsewhere.

    @rule(seed=seeds(), assign=st.booleans())
    def load_state_dict(self, seed: int, assign: bool) -> None:
        state = self.twin.net.state_dict(keep_vars=False)
        generator = torch.Generator().manual_seed(seed)
        loaded = {
            key: tensor + (torch.rand(tensor.shape, generator=generator) * 2).to(tensor.device, tensor.dtype)
            for key, tensor in state.items()
        }
        results = []
        for net in (self.net, self.twin.net):
            own = {key: tensor.clone() for key, tensor in loaded.items()}
            results.append(attempt(lambda net=net, own=own: net.load_state_dict(own, assign=assign)))
        # An InstanceNorm whose flag was taken away refuses its own statistics.
        self.same_error(results[0].error, results[1].error)

    @rule(
        kind=st.sampled_from(
            ["data", "in place", "reset", "assign", "same bits", "negative zero", "functional", "move"]
        ),
        position=st.integers(0, 5),
        name=st.sampled_from(["running_mean", "running_var", "num_batches_tracked"]),
    )
    def write(self, kind: str, position: int, name: str) -> None:
        """Somebody writes to the statistics of one layer."""
        layer = self.norms[position % len(self.norms)]
        assume(kind != "reset" or isinstance(layer, _NormBase))
        assume(kind != "move" or not getattr(layer, name).is_inference())  # torch cannot detach() it any more
        results = [
            attempt(lambda module=module: self.write_to(module, kind, name, position))
            for module in (layer, self.pairs[layer])
        ]
        # A tensor that was made in inference mode refuses most of it.
        self.same_error(results[0].error, results[1].error)

    def write_to(self, layer: nn.Module, kind: str, name: str, seed: int) -> None:
        buffer = layer._buffers[name]
        if kind == "data":
            buffer.data.add_(1)
        elif kind == "in place":
            with torch.no_grad():
                buffer.mul_(3).add_(1)
        elif kind == "reset":
            layer.reset_running_stats()
        elif kind == "assign":
            setattr(layer, name, buffer.clone() + 1)
        elif kind == "same bits":
            setattr(layer, name, buffer.clone())
        elif kind == "negative zero":
            buffer.data.mul_(0).mul_(-1)
        elif kind == "move":
            buffer.data = buffer.data.clone()
        else:
            inputs = batch(self.spec, 3, seed, self.device, layer.running_mean.dtype)
            with torch.no_grad():
                F.batch_norm(inputs, layer.running_mean, layer.running_var, training=True)

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype: torch.dtype) -> None:
        # Graphs of before need the weights of before.
        self.pending.clear()
        self.dtype = dtype
        for net in (self.net, self.twin.net):
            net.to(dtype)

    @rule(seed=seeds())
    def functional_call(self, seed: int) -> None:
        """Statistics that are lent to the net for one call are not guarded."""
        inputs = batch(self.spec, 3, seed, self.device, self.dtype)
        random = random_state()
        lent, results = [], []
        for net in (self.net, self.twin.net):
            set_random_state(random)
            lent.append({name: t.detach().clone() for name, t in [*net.named_parameters(), *net.named_buffers()]})
            results.append(attempt(lambda net=net: torch.func.functional_call(net, lent[-1], (inputs,))))
        self.log.clear()
        self.same_error(results[0].error, results[1].error)
        assert not results[0].warnings
        if results[0].error is None:
            assert same(results[0].value, results[1].value)
        assert not list(differing(*lent))

    # Copies.

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), seed=seeds())
    def copy(self, how: str, seed: int) -> None:
        """A copy is an ordinary net."""
        duplicate = copy.deepcopy(self.net) if how == "deepcopy" else pickle.loads(pickle.dumps(self.net))
        if how == "pickle":
            assert b"bnguard" not in pickle.dumps(self.net)
        assert self.traces_of(duplicate) == self.traces, "the copy carries something of a guard"
        if self.twin.holds_parameters:
            return
        other = copy.deepcopy(self.twin.net)
        inputs = batch(self.spec, 2, seed, self.device, self.dtype)
        random = random_state()
        for net in (duplicate, other):
            set_random_state(random)
            result = attempt(lambda net=net: net.train()(inputs.clone().requires_grad_()).sum().backward())
            assert result.error is None
            assert not result.warnings
        self.same_nets(duplicate, other)

    # What holds after every step.

    @invariant()
    def nets_are_the_same(self) -> None:
        if self.net is not None:
            self.same_nets(self.net, self.twin.net)

    @invariant()
    def nothing_is_left(self) -> None:
        if self.net is not None and not self.open:
            assert self.traces_of(self.net) == self.traces, "something of a guard is left"

    @staticmethod
    def same_nets(net: nn.Module, twin: nn.Module) -> None:
        assert not (keys := list(differing(net.state_dict(), twin.state_dict()))), keys
        for module, other in zip(net.modules(), twin.modules(), strict=True):
            assert module.training == other.training
            assert {k: v is None for k, v in module._buffers.items()} == {
                k: v is None for k, v in other._buffers.items()
            }
        for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert parameter.requires_grad == other.requires_grad, "requires_grad"
            assert (parameter.grad is None) == (other.grad is None), "grad"
            assert parameter.grad is None or same(parameter.grad, other.grad), "grad"

    @staticmethod
    def traces_of(net: nn.Module) -> list[Any]:
        """All that a guard could leave on the modules of a net."""
        tables = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")
        traces = []
        for module in net.modules():
            state = module.__dict__
            hooks = [[type(hook).__name__ for hook in state[table].values()] for table in tables]
            traces.append((sorted(state), hooks, type(state.get("forward")).__name__))
        return traces

    def teardown(self) -> None:
        if self.net is None:
            return
        try:
            self.finish()
        finally:
            for handle in self.handles:
                for _ in range(5):
                    attempt(handle.guard.stop)

    def finish(self) -> None:
        """Leaves everything, then trains both nets the same way."""
        while self.open:
            self.leave_block(self.open[-1], None)
        self.nothing_is_left()
        self.same_nets(self.net, self.twin.net)
        while self.pending:
            self.backward(-1)
        for step in range(3):
            for net in (self.net, self.twin.net):
                net.train()
            self.run_forward(batch(self.spec, 3, step, self.device, self.dtype), "grad", "now", in_thread=False)
            self.optimizer_step()
            self.same_nets(self.net, self.twin.net)
        self.net.eval()
        self.twin.net.eval()
        self.run_forward(batch(self.spec, 3, 7, self.device, self.dtype), "no_grad", "never", in_thread=False)


@pytest.fixture(autouse=True)
def _one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


GuardMachine.TestCase.settings = machine_settings


class TestOnCPU(GuardMachine.TestCase):
    """Whatever a program does around and inside guards, the net does what its twin does."""


class CudaMachine(GuardMachine):
    device = "cuda"


CudaMachine.TestCase.settings = machine_settings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCUDA(CudaMachine.TestCase):
    """The same on a GPU."""

    @pytest.fixture(autouse=True)
    def _deterministic(self):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
