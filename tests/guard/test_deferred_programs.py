"""``check="deferred"`` beside a check at exit, in random programs: the same values at once, the same report later."""

from __future__ import annotations

import random
from typing import Any

import pytest
from torch import nn

import bnguard
from tests.asserts import assert_clean, state_of, told
from tests.guard.test_again import (
    ERRORS,
    EVENTS,
    _add_counting,
    _forward,
    _patch_forward,
    _stop_others,
    assert_same,
    make_net,
)

POLICIES: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "running": {"use_running_stats": True},
    "running-restore": {"on_change": "restore", "use_running_stats": True},
    "rollback": {"on_change": "rollback"},
    "some": {"on_change": "restore", "include": "0"},
    "affine": {"affine": True},
    "buffers": {"on_change": "restore", "buffers": "all"},
}
# Of buffers that are not guarded only the first block with a deferred check tells.
PROGRAMS = [event for event in EVENTS if event is not _add_counting]


def programs(policy: str) -> list[Any]:
    """Those that are alike: under "warn" a check at exit counts by a ``forward`` of ours, a deferred one by a hook."""
    return [event for event in PROGRAMS if policy != "warn" or event is not _patch_forward]


def run(events: list[Any], options: dict[str, Any], seed: int) -> list[list[Any]]:
    """What a program says and leaves, event by event."""
    random_ = random.Random(seed)
    net = make_net(random_)
    guard = bnguard.frozen(net, **options)
    trace = [
        _block(net, guard, event, random_, trains=trains)
        for event in events
        for trains in ([random_.random() < 0.5] if seed else [False, True])
    ]
    with told():
        _stop_others(net, random_)
    return trace


def _block(net: nn.Module, guard: bnguard.frozen, event: Any, random_: random.Random, *, trains: bool) -> list[Any]:
    """A block with one event inside: outputs, statistics right after it, and what was said once all is read."""
    outputs: list[Any] = []
    errors: list[str] = []
    with told() as said:
        try:
            with guard:
                outputs.append(event(net, random_))
                outputs.append(_forward(net.eval(), random_))
                if trains:
                    outputs.append(_forward(net.train(), random_))
        except ERRORS as error:
            errors.append(f"{error}\n{getattr(error, '__notes__', '')}")
        state, gradients = state_of(net), [parameter.grad for parameter in net.parameters()]
        for clean in (net, *net.__dict__.get("kept_clone", ())):
            if not net.__dict__.get("open_guards"):
                assert_clean(clean)
        if "deferred" in repr(guard._settings):
            try:
                guard.check()
            except bnguard.StatsChangedError as error:
                errors.append(str(error))
    lines = {line for text in (*errors, *said.warnings) for line in text.splitlines()}
    changes = [(change.names, change.buffers, change.updates, change.mean_shift) for change in guard.changes]
    reports = bool(errors), len(said.warnings), {line for line in lines if "deferred" not in line}
    return [outputs, state, gradients, changes, [layer.names for layer in guard.layers], reports]


def assert_alike(events: list[Any], options: dict[str, Any], seed: int) -> None:
    """A program goes the same whenever the comparison is read."""
    assert_same(run(events, options, seed), run(events, {**options, "check": "deferred"}, seed))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("event", PROGRAMS, ids=lambda event: event.__name__.strip("_<>"))
def test_deferred_check_finds_the_same(event: Any, policy: str) -> None:
    """Outputs, gradients and statistics at the end of a block, and errors, warnings and changes once they are read."""
    if event in programs(policy):
        assert_alike([event], POLICIES[policy], 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_deferred_check_finds_the_same_in_random_programs(policy: str) -> None:
    """The same for many events on nets of many forms."""
    for seed in range(1, 8):
        assert_alike(random.Random(seed).choices(programs(policy), k=6), POLICIES[policy], seed)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_deferred_check_finds_the_same_in_many_random_programs(policy: str) -> None:
    """The same for many more."""
    for seed in range(8, 200):
        assert_alike(random.Random(seed).choices(programs(policy), k=6), POLICIES[policy], seed)
