"""Fine-tune a new head on a backbone that is frozen with ``requires_grad_(False)``, with and without a guard.

A small Conv-BN network is trained on scikit-learn's digits. Its backbone is frozen with ``requires_grad_(False)``, and
a new head is fine-tuned in train mode on shifted images: three times from the same start, without a guard, under
``restore`` and under ``use_running_stats``, and a fourth time with a guard that raises. Every number is measured.

This file is written as a user's training script would be: the guard's errors name its lines.
"""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections import OrderedDict
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnguard

_BATCH = 64
_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class FineTuning:
    """The effect of one run on the source network, from which the backbone was copied.

    Attributes:
        name: How the backbone was guarded, e.g. ``"restore"``.
        source_before: Accuracy of the source network on the source test images before fine-tuning, from 0 to 1.
        source_after: Accuracy of the source head on the backbone after fine-tuning. Neither was trained, so it should
            be equal.
        new_head: Accuracy of the new head on the shifted test images, in eval mode.
        is_same_output: Whether the output of the source network for one fixed test batch has the same bits before and
            after.
        step_time: Time of a step relative to the same step of the unguarded run, the median over all steps.
        drift: By BatchNorm layer, after each step: the largest shift of a channel's mean since the start, in standard
            deviations at the start.
    """

    name: str
    source_before: float
    source_after: float
    new_head: float
    is_same_output: bool
    step_time: float
    drift: dict[str, list[float]]

    @property
    def largest_shift(self) -> float:
        """The largest shift of a channel's mean over all layers, after the last step."""
        return max(steps[-1] for steps in self.drift.values())


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        train_images: Number of training images.
        test_images: Number of test images.
        runs: Without a guard, then ``restore``, then ``use_running_stats``.
        error: The error of the guard with ``on_change="raise"``.
    """

    train_images: int
    test_images: int
    runs: tuple[FineTuning, ...]
    error: bnguard.StatsChangedError


@dataclass(frozen=True, slots=True)
class _Digits:
    """Images of shape ``(N, 1, 8, 8)`` from 0 to 1, labels of shape ``(N,)``."""

    images: Tensor
    labels: Tensor

    def shifted(self) -> _Digits:
        """The images one pixel further right, with a third of the contrast, on a bright background."""
        return _Digits((torch.roll(self.images, 1, dims=3) + 2) / 3, self.labels)

    def batches(self) -> list[_Digits]:
        order = torch.randperm(len(self.labels))
        return [_Digits(self.images[rows], self.labels[rows]) for rows in order.split(_BATCH)]


def run(seed: int = 0, source_epochs: int = 10, epochs: int = 10) -> DemoResult:
    """Trains the source network, then fine-tunes on top of it under each guard.

    The state of torch's random number generator is restored afterwards.

    Args:
        seed: Seed of the split, the networks and the order of the batches.
        source_epochs: Epochs of the source network.
        epochs: Epochs of each fine-tuning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train, test = _load_digits()
        source, source_head = _backbone(), _head()
        optimizer = torch.optim.SGD([*source.parameters(), *source_head.parameters()], lr=0.05, momentum=0.9)
        for _ in range(source_epochs):
            for batch in train.batches():
                train_step(source, source_head, optimizer, batch)

        head = _head()
        learners = [
            _Learner("unguarded", None, source, head),
            _Learner("restore", {"on_change": "restore"}, source, head),
            _Learner("use_running_stats", {"use_running_stats": True}, source, head),
        ]
        _fine_tune(learners, train.shifted(), epochs)
        runs = [_measured(learner, learners[0], source, source_head, test) for learner in learners]
        return DemoResult(len(train.labels), len(test.labels), tuple(runs), _raised(source, head, train.shifted()))


def train_step(backbone: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, batch: _Digits) -> None:
    """One step in train mode."""
    backbone.train()
    head.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(head(backbone(batch.images)), batch.labels)
    loss.backward()
    optimizer.step()


class _Learner:
    """A copy of the source backbone under one guard, and a head that is trained on it."""

    def __init__(self, name: str, options: dict[str, Any] | None, source: nn.Module, head: nn.Module) -> None:
        self.name = name
        self.source = source
        self.backbone = copy.deepcopy(source).requires_grad_(False)  # does not freeze the running statistics
        self.head = copy.deepcopy(head)
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9)
        self.guard: AbstractContextManager[object] = nullcontext()
        if options is not None:
            self.guard = bnguard.frozen(self.backbone, **options)
        self.seconds: list[float] = []
        self.drift: dict[str, list[float]] = {layer: [] for layer in _shifts(source, source)}

    def step(self, batch: _Digits) -> None:
        start = time.perf_counter()
        train_step(self.backbone, self.head, self.optimizer, batch)
        self.seconds.append(time.perf_counter() - start)
        for layer, shift in _shifts(self.source, self.backbone).items():
            self.drift[layer].append(shift)


def _fine_tune(learners: list[_Learner], images: _Digits, epochs: int) -> None:
    with ExitStack() as guards:
        for learner in learners:
            guards.enter_context(learner.guard)
        for _ in range(epochs):
            for batch in images.batches():
                # In turns, so that the load of the machine slows all of them down equally.
                for learner in learners:
                    learner.step(batch)


def _measured(
    learner: _Learner, unguarded: _Learner, source: nn.Module, source_head: nn.Module, test: _Digits
) -> FineTuning:
    fixed = test.images[:_BATCH]
    before, after = _output(source, source_head, fixed), _output(learner.backbone, source_head, fixed)
    return FineTuning(
        learner.name,
        source_before=_accuracy(source, source_head, test),
        source_after=_accuracy(learner.backbone, source_head, test),
        new_head=_accuracy(learner.backbone, learner.head, test.shifted()),
        # As integers: to torch.equal, 0.0 and -0.0 are the same.
        is_same_output=torch.equal(before.view(torch.int32), after.view(torch.int32)),
        step_time=statistics.median(map(operator.truediv, learner.seconds, unguarded.seconds)),
        drift=learner.drift,
    )


def _raised(source: nn.Module, head: nn.Module, images: _Digits) -> bnguard.StatsChangedError:
    learner = _Learner("raise", {"on_change": "raise"}, source, head)
    try:
        _fine_tune([learner], images, epochs=1)
    except bnguard.StatsChangedError as error:
        return error
    raise AssertionError("the guard did not raise at a forward in train mode")


def _load_digits() -> tuple[_Digits, _Digits]:
    """Two thirds for training, one third for testing."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels))
    train, test = order[: len(labels) * 2 // 3], order[len(labels) * 2 // 3 :]
    return _Digits(images[train], labels[train]), _Digits(images[test], labels[test])


def _backbone() -> nn.Module:
    def block(channels: int, pool: nn.Module) -> nn.Module:
        convolution = nn.Conv2d(channels, _CHANNELS, 3, padding=1, bias=False)
        return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(_CHANNELS), relu=nn.ReLU(), pool=pool))

    return nn.Sequential(
        OrderedDict(
            block1=block(1, nn.Identity()),
            block2=block(_CHANNELS, nn.MaxPool2d(2)),
            block3=block(_CHANNELS, nn.MaxPool2d(2)),
            flatten=nn.Flatten(),
        )
    )


def _head() -> nn.Module:
    return nn.Linear(_CHANNELS * 2 * 2, 10)


@torch.no_grad()
def _output(backbone: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    backbone.eval()
    head.eval()
    return cast("Tensor", head(backbone(images)))


def _accuracy(backbone: nn.Module, head: nn.Module, digits: _Digits) -> float:
    return (_output(backbone, head, digits.images).argmax(dim=1) == digits.labels).float().mean().item()


def _shifts(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """By BatchNorm layer: the largest shift of a channel's mean, in standard deviations."""
    shifts = {}
    for (name, old), new in zip(before.named_modules(), after.modules(), strict=True):
        if isinstance(old, nn.BatchNorm2d):
            deviation = (cast("Tensor", old.running_var) + old.eps).sqrt()
            shift = cast("Tensor", new.running_mean) - cast("Tensor", old.running_mean)
            shifts[name] = (shift.abs() / deviation).max().item()
    return shifts
