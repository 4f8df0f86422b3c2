"""What a watch does later, or in fewer lines, gives what it gives the long way: random programs, recorded both ways."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnguard
from bnguard.recording import drift_samples, journal
from bnguard.recording.layer_log import LayerLog
from bnguard.recording.summary import watch_content
from bnguard.torch_internals.node_hooks import NodeHooks
from tests.strategies import property_settings

# Of a guard around a checkpoint, and of torch about a checkpoint without gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


class Branches(nn.Module):
    """A stem, a part that is frozen at times, a layer in two places, and a head; one part runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.head = nn.Linear(4, 2)
        self.is_shared = self.has_teacher = self.recomputes = self.fails = self.takes_a_detour = False

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_a_detour:
            linear, norm, relu = self.stem
            x = relu(self._detour(norm, linear(x)))
        else:
            x = self.stem(x)
        if self.has_teacher:
            with torch.no_grad():
                self.part(x)
        x = checkpoint(self.part, x, use_reentrant=False) if self.recomputes else self.part(x)
        if self.is_shared:
            x = self.part(x)
        if self.fails:
            raise ValueError("asked for")
        out: Tensor = self.head(x)
        return out

    def _detour(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out


def _run(layer: nn.Module, args: Any) -> None:
    layer(*args)


def _in_a_thread(function: Callable[..., Any], *args: Any) -> None:
    """Calls a function directly from the thread, which has a short stack."""
    failed: list[BaseException] = []
    with mock.patch.object(threading, "excepthook", lambda error: failed.append(error.exc_value)):
        thread = threading.Thread(target=function, args=args)
        thread.start()
        thread.join()
    if failed:
        raise failed[0]


class Program:
    """A training script in small steps, each of which may come at any time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Branches()
        self.other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.optimizers = [torch.optim.SGD(self.model.parameters(), 0.1)]
        self.losses: list[Tensor] = []
        self.kept: list[Any] = []  # so that no other object gets its id
        self.hooks: list[Any] = []
        self.saved = copy.deepcopy(self.model.state_dict())

    def forward(self) -> None:
        self.losses.append(self.model(torch.randn(8, 3)).square().mean())

    def forward_elsewhere(self) -> None:
        self.losses.append(self.model(torch.randn(2, 3)).square().mean())

    def forward_without_gradients(self) -> None:
        with torch.no_grad():
            self.model(torch.randn(8, 3))

    def forward_of_a_layer(self) -> None:
        self.losses.append(self.model.stem(torch.randn(8, 3)).square().mean())

    def forward_that_fails(self) -> None:
        self.model.fails = True
        try:
            with suppress(ValueError):
                self.model(torch.randn(8, 3))
        finally:
            self.model.fails = False

    def forward_of_another_model(self) -> None:
        self.losses.append(self.other(torch.randn(8, 3)).mean())

    def backward(self) -> None:
        if self.losses:
            self.losses.pop().backward()  # type: ignore[no-untyped-call]

    def backward_twice(self) -> None:
        if self.losses:
            self.losses[-1].backward(retain_graph=True)  # type: ignore[no-untyped-call]

    def backward_of_an_old_loss(self) -> None:
        if self.losses:
            self.losses.pop(0).backward()  # type: ignore[no-untyped-call]

    def gradient_of_a_result(self) -> None:
        result = self.model.stem[1](torch.randn(8, 4))
        torch.autograd.grad(result.square().sum(), result)

    def gradient_of_a_result_and_beyond(self) -> None:
        result = self.model.stem[1](torch.randn(8, 4))
        torch.autograd.grad(result.square().sum(), [result, self.model.stem[1].weight])

    def gradient_of_a_parameter(self) -> None:
        if self.losses:
            torch.autograd.grad(self.losses.pop(), self.model.stem[0].weight, allow_unused=True)

    def gradient_of_the_end(self) -> None:
        if self.losses:
            self.losses.pop().backward(inputs=[self.model.head.bias])  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()

    def step_of_the_last(self) -> None:
        self.optimizers[-1].step()

    def train_step(self) -> None:
        for _ in range(4):
            self.forward()
            self.backward()
            self.step()

    def new_optimizer(self) -> None:
        self.optimizers.append(torch.optim.SGD(self.other.parameters(), 0.1))

    def next_optimizer(self) -> None:
        self.optimizers[0] = torch.optim.SGD(self.model.parameters(), 0.1)

    def change_learning_rate(self) -> None:
        group = self.optimizers[0].param_groups[0]
        group["lr"] = 0.0 if group["lr"] else 0.1

    def freeze(self) -> None:
        self.model.stem.requires_grad_(not self.model.stem[1].weight.requires_grad)

    def change_mode(self) -> None:
        self.model.train(not self.model.training)

    def change_mode_of_a_layer(self) -> None:
        self.model.stem[1].train(not self.model.stem[1].training)

    def change_tracking(self) -> None:
        layer = self.model.stem[1]
        layer.track_running_stats = not layer.track_running_stats

    def change_momentum(self) -> None:
        self.model.stem[1].momentum = {0.1: 0.0, 0.0: 0.3, 0.3: 0.1}[self.model.stem[1].momentum]

    def load(self) -> None:
        self.model.load_state_dict(self.saved)

    def reset(self) -> None:
        self.model.stem[1].reset_running_stats()

    def write(self) -> None:
        self.model.stem[1].running_mean.add_(1)

    def forward_and_put_back(self) -> None:
        before = {name: tensor.clone() for name, tensor in self.model.stem[1].named_buffers()}
        self.forward()
        for name, tensor in self.model.stem[1].named_buffers():
            tensor.copy_(before[name])

    def hold(self) -> None:
        with bnguard.frozen(self.model, "restore"):
            self.forward()

    def replace(self) -> None:
        self.kept.append(self.model.part[1])
        self.model.part[1] = nn.BatchNorm1d(4)

    def convert(self) -> None:
        self.kept.append(self.model.stem[1].running_mean)
        self.model.stem[1].running_mean = self.model.stem[1].running_mean.clone()

    def replace_data(self) -> None:
        self.kept.append(self.model.stem[1].running_mean.data)
        self.model.stem[1].running_mean.data = torch.ones(4)

    def replace_data_by_other_data(self) -> None:
        self.kept.append(self.model.part[1].running_mean.data)
        self.model.part[1].running_mean.data = torch.ones(4, dtype=torch.float64)

    def break_statistics(self) -> None:
        self.model.part[1].running_var.fill_(torch.nan)

    def clone(self) -> None:
        layer = copy.copy(self.model.stem[1])
        layer._parameters = dict(layer._parameters)
        self.losses.append(layer(torch.randn(8, 4)).square().mean())

    def lend(self) -> None:
        lent = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        torch.func.functional_call(self.model, lent, torch.randn(8, 3))

    def share(self) -> None:
        self.model.is_shared = not self.model.is_shared

    def teach(self) -> None:
        self.model.has_teacher = not self.model.has_teacher

    def recompute(self) -> None:
        self.model.recomputes = not self.model.recomputes

    def take_a_detour(self) -> None:
        self.model.takes_a_detour = not self.model.takes_a_detour

    def forward_in_a_thread(self) -> None:
        _in_a_thread(self.forward)

    def layer_in_a_thread(self) -> None:
        _in_a_thread(self.model.stem[1], torch.randn(8, 4))

    def hook_that_calls_a_layer(self) -> None:
        part = self.model.part[1]
        self.hooks.append(self.model.stem[1].register_forward_pre_hook(lambda module, args: _run(part, args)))

    def hook_that_calls_a_layer_afterwards(self) -> None:
        part = self.model.part[1]
        self.hooks.append(self.model.stem[1].register_forward_hook(lambda module, args, output: _run(part, args)))

    def hook_that_writes(self) -> None:
        def write(module: Any, args: Any) -> None:
            module.running_mean.add_(1)

        self.hooks.append(self.model.stem[1].register_forward_pre_hook(write))

    def hook_that_evaluates(self) -> None:
        def evaluate(module: Any, args: Any) -> None:
            module.eval()

        self.hooks.append(self.model.stem[1].register_forward_pre_hook(evaluate))

    def hook_that_fails(self) -> None:
        def fail(module: Any, args: Any) -> None:
            raise RuntimeError("asked for")

        self.hooks.append(self.model.stem[1].register_forward_pre_hook(fail))

    def remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def freeze_a_layer(self) -> None:
        self.model.stem[1].requires_grad_(not self.model.stem[1].weight.requires_grad)

    def cast_from_the_same_line(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            self.forward()

    def put_back_without_gradients(self) -> None:
        with torch.no_grad():
            self.forward_and_put_back()

    def forward_of_a_clone(self) -> None:
        layer = self.model.stem[1]
        self.model.stem[1] = copy.copy(layer)
        self.kept.append(self.model.stem[1])
        try:
            self.forward()
        finally:
            self.model.stem[1] = layer

    def cast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            self.losses.append(self.model(torch.randn(8, 3)).float().square().mean())

    def forget(self) -> None:
        """A model that is deleted while updates of it are to be recorded."""
        self.optimizers = self.optimizers[:1]
        self.losses.clear()
        self.other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


STEPS: dict[str, Callable[[Program], None]] = {
    name: step for name, step in vars(Program).items() if not name.startswith("_")
}


def programs() -> st.SearchStrategy[list[str]]:
    """Lists of steps; training goes on for a while in many of them."""
    often = ["forward", "backward", "step", "train_step"]
    return st.lists(st.sampled_from([*STEPS, *often * 6]), min_size=1, max_size=40)


def recorded(steps: list[str], way: Callable[[], Any], *, of_all: bool, every: Any = None) -> Any:
    """All that a watch has recorded of a program."""
    program = Program()
    with way(), bnguard.watch(None if of_all else program.model, every=every) as record:
        for step in steps:
            try:
                STEPS[step](program)
            except RuntimeError as error:  # by torch: a second backward pass, or one without gradients
                if isinstance(error, bnguard.BNGuardError):
                    raise
        in_the_middle = repr(watch_content(record.summary()))
    return in_the_middle, repr(watch_content(record.summary())), record.report()


@contextmanager
def at_once() -> Iterator[None]:
    """Records what was noted as soon as the call of a model is over."""
    with mock.patch.object(journal, "_MOST", 0):
        yield


@contextmanager
def few_at_a_time() -> Iterator[None]:
    """Records what was noted from time to time."""
    with mock.patch.object(journal, "_MOST", 7), mock.patch.object(drift_samples, "_MOST_COPIED", 50):
        yield


@contextmanager
def the_long_way() -> Iterator[None]:
    """Asks before each forward all that there is to ask, and hooks the result as torch does."""
    with (
        mock.patch.object(LayerLog, "is_usual", return_value=False),
        mock.patch.object(NodeHooks, "add", lambda hooks, node, hook: node.register_prehook(hook)),
    ):
        yield


@contextmanager
def step_by_step() -> Iterator[None]:
    """Computes the drift of each step by itself."""
    with mock.patch.object(drift_samples, "_source_of", return_value=None):
        yield


@contextmanager
def long_ways() -> Iterator[None]:
    """Takes all of these."""
    with at_once(), the_long_way(), step_by_step():
        yield


EVERY = (None, 1, 2, "auto")
USUAL = ["train_step"] * 2
# Programs that go on as usual until something comes that the short way must not pass over.
TRAPS = {
    "frozen, and moved by gradients from before": [
        "forward", "backward", "freeze", "forward", "step_of_the_last", "forward", "step_of_the_last",
    ],
    "put back after a step": ["forward", "forward_and_put_back", "step", "forward", "step"],
    "put back in the same step": ["forward", "forward_and_put_back", "forward", "backward", "step"],
    "put back, and first forwards that are to be recorded": ["forward", "forward_and_put_back", "forward", "step"],
    "momentum of 0": ["change_momentum", "train_step", "change_momentum"],
    "other tensor": ["convert", "train_step"],
    "held": ["hold", "train_step"],
    "recomputed after a step": ["recompute", "forward", "step", "backward", "step"],
    "evaluated, updated and then backward": [
        "change_mode", "forward", "change_mode", "forward", "backward_of_an_old_loss", "step",
    ],
    "learning rate of 0": ["change_learning_rate", "step", "train_step"],
    "next optimizer": ["next_optimizer", "train_step", "freeze", "next_optimizer", "train_step"],
    "written between evaluations": ["change_mode", "forward", "write", "forward", "write", "forward"],
    "other data": ["replace_data_by_other_data", "step", "replace_data", "step", "train_step"],
    "other tensors": ["convert", "step", "replace", "train_step"],
    "backward later": ["forward", "step", "forward", "step", "backward_of_an_old_loss", "forward", "step"],
    "gradient of a result": ["gradient_of_a_result", "step", "gradient_of_a_result", "step", "train_step"],
    "deleted": ["forward_of_another_model", "step", "forward_of_another_model", "step", "forget"],
    "same line in another mode": ["cast_from_the_same_line", "train_step"],
    "layer that is frozen alone": ["freeze_a_layer", "train_step", "freeze_a_layer", "train_step"],
    "put back without gradients": ["put_back_without_gradients", "put_back_without_gradients", "step"],
    "without tracking": ["change_tracking", "train_step", "change_tracking"],
    "clone in its place": ["forward_of_a_clone", "backward", "step", "forward_of_a_clone", "freeze", "step"],
    "evaluated alone and trained again": [
        "change_mode", "change_mode_of_a_layer", "change_mode_of_a_layer", "change_mode", "forward", "step", "forward",
    ],
    "learned from after a step": [
        "forward", "forward", "step", "forward", *["backward_of_an_old_loss"] * 3, "step",
    ] * 3,
    "evaluated, updated and then backward, again and again": [
        "change_mode", "forward", "change_mode", "forward", "backward_of_an_old_loss", "backward", "step",
    ] * 3,
    "evaluated, updated and then backward, one layer": [
        "change_mode", "forward_of_a_layer", "change_mode", "forward_of_a_layer", "backward_of_an_old_loss", "backward",
        "step",
    ] * 3,
    "detour": ["take_a_detour", "train_step"],
    "threads": ["forward_in_a_thread", "layer_in_a_thread", "train_step"],
    "hook that calls a layer": ["hook_that_calls_a_layer", "train_step", "remove_hooks", "train_step"],
    "hook that calls a layer afterwards": ["hook_that_calls_a_layer_afterwards", "train_step", "remove_hooks"],
    "hook that writes": ["hook_that_writes", "train_step", "remove_hooks"],
    "hook that evaluates": ["hook_that_evaluates", "forward", "remove_hooks", "change_mode", "change_mode"],
    "hook that fails": ["hook_that_fails", "train_step", "remove_hooks", "gradient_of_a_result", "step"],
    "clone": ["clone", "step", "clone", "freeze", "step", "clone", "step"],
}  # fmt: skip


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_what_is_not_usual_is_recorded_as_at_once(trap, of_all):
    """The record is that of the long way after it, too."""
    steps = [*USUAL, *trap, *USUAL]
    plain = recorded(steps, long_ways, of_all=of_all, every=1)
    assert recorded(steps, nullcontext, of_all=of_all, every=1) == plain
    steps = [*USUAL, *trap]
    plain = recorded(steps, long_ways, of_all=of_all, every=1)
    assert recorded(steps, nullcontext, of_all=of_all, every=1) == plain


@property_settings
@given(steps=programs(), of_all=st.booleans(), every=st.sampled_from(EVERY))
def test_updates_that_wait_are_recorded_as_at_once(steps, of_all, every):
    """Findings, updates and series are those of a watch that works up each call of a model when it is over."""
    plain = recorded(steps, at_once, of_all=of_all, every=every)
    assert recorded(steps, nullcontext, of_all=of_all, every=every) == plain
    assert recorded(steps, few_at_a_time, of_all=of_all, every=every) == plain


@property_settings
@given(steps=programs(), of_all=st.booleans())
def test_usual_forwards_are_recorded_as_unusual_ones(steps, of_all):
    """What is asked in fewer lines gives the same answers."""
    assert recorded(steps, nullcontext, of_all=of_all) == recorded(steps, the_long_way, of_all=of_all)


@property_settings
@given(steps=programs(), of_all=st.booleans(), every=st.sampled_from(EVERY))
def test_drift_of_many_steps_is_that_of_each(steps, of_all, every):
    """Statistics that are copied, and compared later, give a series of the same bits."""
    plain = recorded(steps, step_by_step, of_all=of_all, every=every)
    assert recorded(steps, nullcontext, of_all=of_all, every=every) == plain
