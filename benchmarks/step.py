"""A training step and a validation batch of whole nets: guarded, unguarded, and by what people do instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional as F

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_around
from benchmarks.models import NETS, make_step, sample
from benchmarks.race import Contender, race_of_steps
from benchmarks.results import Benchmark, Row, compared

__all__ = [
    "BENCHMARKS", "BY_HAND", "PLAIN", "PUT_BACK", "RESTORE", "RESTORE_EACH", "REUSED", "STRICT", "entered_each_step",
]  # fmt: skip

# How many steps of each contender are timed, each alone: about as long for each net.
_STEPS: Final = {"resnet50": 15, "mobilenet_v2": 40, "densenet121": 15, "small_cnn": 100, "bn_mlp": 1000}
# At most, by net: a new block at each step; one guard, entered again; strict; use_running_stats around the loop.
_EACH: Final = {"resnet50": 1.005, "mobilenet_v2": 1.01, "densenet121": 1.01, "small_cnn": 1.02, "bn_mlp": 1.3}
_REUSED: Final = {"bn_mlp": 1.2}
_STRICT: Final = {"resnet50": 1.005, "small_cnn": 1.02, "bn_mlp": 1.22}
_RUNNING: Final = {"bn_mlp": 1.03}

PLAIN, BY_HAND = "unguarded", "train(), then eval() on each BatchNorm, each step"
RESTORE, RESTORE_EACH = "frozen(net, 'restore') around the loop", "frozen(net, 'restore') around each step"
LEAST = "the least around each step: a walk, a copy, an attribute a layer, a comparison"
REUSED, RUNNING = "one guard, entered again at each step", "frozen(net, use_running_stats=True) around the loop"
STRICT = "@bnguard.strict(on_change='restore') on the step, "
COMPARED = "clones before each batch, torch.equal after it"
PUT_BACK = "clones before each step, torch.equal and copy_ after it"


def entered_each_step(net: nn.Module, step: rivals.Step) -> rivals.Step:
    """A new block under ``"restore"`` around each step."""

    def run() -> None:
        with bnguard.frozen(net, "restore"):
            step()

    return run


def _restore_contenders(net: nn.Module, step: rivals.Step) -> list[Contender]:
    reused = bnguard.frozen(net, "restore")

    def again() -> None:
        with reused:
            step()

    def least() -> None:
        least_around(net)
        step()

    return [
        Contender(PLAIN, step),
        Contender(RESTORE, step, partial(bnguard.frozen, net, "restore")),
        Contender(RESTORE_EACH, entered_each_step(net, step)),
        Contender(REUSED, again),
        Contender(LEAST, least),
    ]


class _Trainer:
    """What holds a net and trains it."""

    def __init__(self, net: nn.Module, step: rivals.Step) -> None:
        self.net = net
        self.step = step

    @bnguard.strict(on_change="restore")
    def train_step(self) -> None:
        self.step()


def _strict_contenders(name: str, net: nn.Module, step: rivals.Step) -> list[Contender]:
    """By what leads ``strict`` to the net: for short steps each, since they differ by microseconds."""
    strict = bnguard.strict(on_change="restore")

    @strict
    def train_step(model: nn.Module) -> None:
        step()

    argument = Contender(f"{STRICT}the net an argument", partial(train_step, net))
    if name != "bn_mlp":
        return [argument]
    script: dict[str, object] = {"net": net, "step": step}
    exec("def train_step():\n    net\n    step()", script)  # reads globals, as the functions of a script do
    return [
        argument,
        Contender(f"{STRICT}an attribute of self", _Trainer(net, step).train_step),
        Contender(f"{STRICT}in its closure", strict(step)),
        Contender(f"{STRICT}among its globals", strict(cast("rivals.Step", script["train_step"]))),
        Contender(f"{STRICT}model=net", bnguard.strict(model=net, on_change="restore")(step)),
    ]


def _by_hand(net: nn.Module, step: rivals.Step) -> list[Contender]:
    by_hand = rivals.eval_by_hand(net, step)
    return [
        Contender(BY_HAND, by_hand, partial(rivals.back_in_train_mode, net)),
        Contender(PUT_BACK, rivals.put_back_by_hand(net, step)),
    ]


def _rival_contenders(net: nn.Module, step: rivals.Step) -> list[Contender]:
    return [
        *_by_hand(net, step),
        Contender("built with track_running_stats=False", step, partial(rivals.untracked, net)),
        Contender("converted to a frozen BatchNorm", step, partial(rivals.converted, net)),
        Contender("momentum 0", step, partial(rivals.momentum_zero, net)),
        Contender("load_state_dict() back after each step", rivals.loaded_back(net, step)),
        Contender("clone and torch.equal in hooks", step, partial(rivals.compared_by_hooks, net)),
        Contender("state_dict() copied and compared each step", rivals.compared_by_state_dict(net, step)),
    ]


def train(name: str) -> list[Row]:
    """A training step in one thread, of every contender."""
    net, x, y = sample(name)
    step = make_step(net, net, x, y)
    running = Contender(RUNNING, step, partial(bnguard.frozen, net, use_running_stats=True))
    strict = _strict_contenders(name, net, step) if name in _STRICT else []
    contenders = [*_restore_contenders(net, step), *strict, running, *_rival_contenders(net, step)]
    result = race_of_steps(contenders, rounds=_STEPS[name])
    key, title = f"step/{name}", f"Training step, {name}, batch {tuple(x.shape)}"
    first = Row(key, title, RUNNING, BY_HAND, result.ratio(RUNNING, BY_HAND), _RUNNING.get(name, 1.0))
    targets = _targets(name) | {contender.name: _STRICT[name] for contender in strict}
    return [first, *compared(key, title, result, PLAIN, targets)]


def _targets(name: str) -> dict[str, float]:
    reused = {REUSED: _REUSED[name]} if name in _REUSED else {}
    return {RESTORE: 1.0, RESTORE_EACH: _EACH[name], **reused}


def train_in_two_threads(name: str) -> list[Row]:
    """A training step in two threads, guarded and unguarded."""
    net, x, y = sample(name)
    step = make_step(net, net, x, y)
    contenders = [*_restore_contenders(net, step), *_by_hand(net, step)]
    result = race_of_steps(contenders, rounds=_STEPS[name], threads=2)
    return compared(f"threads/{name}", f"Training step in two threads, {name}", result, PLAIN, _targets(name))


@contextmanager
def _in_eval_mode(net: nn.Module) -> Iterator[None]:
    net.eval()
    with torch.no_grad():
        yield
    net.train()


@contextmanager
def _guarded_eval_mode(net: nn.Module) -> Iterator[None]:
    with _in_eval_mode(net), bnguard.frozen(net):
        yield


def validate(name: str) -> list[Row]:
    """A validation batch in eval mode, where the guard only watches."""
    net, x, _ = sample(name)

    def batch() -> None:
        net(x)

    def guarded() -> None:
        with bnguard.frozen(net):
            net(x)

    contenders = [
        Contender(PLAIN, batch, partial(_in_eval_mode, net)),
        Contender("frozen(net) around the loop", batch, partial(_guarded_eval_mode, net)),
        Contender("frozen(net) around each batch", guarded, partial(_in_eval_mode, net)),
        Contender(COMPARED, rivals.put_back_by_hand(net, batch), partial(_in_eval_mode, net)),
    ]
    result = race_of_steps(contenders, rounds=4 * _STEPS[name])
    return compared(f"validation/{name}", f"Validation batch, {name}, eval mode, no_grad", result, PLAIN)


def test_of_a_step() -> list[Row]:
    """What a test suite pays to know that one training step moves nothing."""
    from pytest_torch.training import assert_frozen

    net, x, y = sample("small_cnn")
    net = rivals.keep_in_eval_mode(net)
    step = make_step(net, net, x, y)

    def with_guard() -> None:
        with bnguard.frozen(net):
            step()

    def with_rival() -> None:
        assert_frozen(net, x, lambda scores: F.cross_entropy(scores, y), ["*running*", "*tracked"], steps=1)

    ours, theirs = "frozen(net) around the step itself", "assert_frozen of pytest-torch: a step of a deep copy"
    result = race_of_steps([Contender(ours, with_guard), Contender(theirs, with_rival)], rounds=50)
    title = "A test that one training step moves no statistics, small_cnn"
    return [Row("test/small_cnn", title, ours, theirs, result.ratio(ours, theirs))]


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"step/{name}": partial(train, name) for name in NETS},
    **{f"threads/{name}": partial(train_in_two_threads, name) for name in ("resnet50", "small_cnn", "bn_mlp")},
    **{f"validation/{name}": partial(validate, name) for name in ("resnet50", "small_cnn", "bn_mlp")},
    "test/small_cnn": test_of_a_step,
}
