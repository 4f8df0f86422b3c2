"""Tracebacks of bnguard's errors: they end in the user's line, and pytest shows no frame of bnguard."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.guard.hooks import LayerGuard
from tests.nets import OwnForward, conv_net, images, rows, warmed

PACKAGE = str(Path(bnguard.__file__).parent)


def own_forward() -> tuple[nn.Module, torch.Tensor]:
    """A layer with a forward of its own, and an input."""
    return nn.Sequential(warmed(OwnForward(4))), rows()


def batch_norm() -> tuple[nn.Module, torch.Tensor]:
    """A net of torch's layers, and an input."""
    return conv_net(), images()


EACH_NET = pytest.mark.parametrize("make", [batch_norm, own_forward])


def in_block(net: nn.Module, run: Callable[[], Any]) -> None:
    """A plain block."""
    with bnguard.frozen(net):
        run()


def in_nested_blocks(net: nn.Module, run: Callable[[], Any]) -> None:
    """The inner one raises."""
    with bnguard.frozen(net, "warn"), bnguard.frozen(net):
        run()


def in_decorated(net: nn.Module, run: Callable[[], Any]) -> None:
    """A function that ``frozen`` decorates."""
    bnguard.frozen(net)(lambda: run())()


def in_strict(net: nn.Module, run: Callable[[], Any]) -> None:
    """A function that ``strict`` decorates."""

    @bnguard.strict
    def step(model: nn.Module) -> None:
        run()

    step(net)


def in_coroutine(net: nn.Module, run: Callable[[], Any]) -> None:
    """A coroutine."""

    @bnguard.frozen(net)
    async def step() -> None:
        run()

    asyncio.run(step())


def in_generator(net: nn.Module, run: Callable[[], Any]) -> None:
    """A generator."""

    @bnguard.frozen(net)
    def steps() -> Iterator[None]:
        yield run()

    list(steps())


EACH_WAY = pytest.mark.parametrize(
    "guarded", [in_block, in_nested_blocks, in_decorated, in_strict, in_coroutine, in_generator]
)


def frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a traceback, the innermost last."""
    return list(traceback.extract_tb(error.__traceback__))


@EACH_NET
@EACH_WAY
def test_traceback_of_a_stopped_forward_ends_in_the_users_line(make: Callable[[], Any], guarded: Any) -> None:
    """However the guard is written: not in torch's or bnguard's code, as soon as the error leaves the block."""
    net, batch = make()

    def run() -> None:
        net(batch)

    with pytest.raises(bnguard.StatsChangedError) as caught:
        guarded(net, run)
    last = frames(caught.value)[-1]
    assert (last.filename, last.line, last.name) == (__file__, "net(batch)", "run")


def test_traceback_ends_in_the_users_line_where_finally_stops_the_guard() -> None:
    """Of the error on its way out, and of the one that ``stop()`` adds, whose last frame is that of ``stop()``."""
    net = conv_net()
    guard = bnguard.frozen(net).start()
    with pytest.raises(bnguard.StatsChangedError) as caught:
        try:
            net(images())
        finally:
            guard.stop()
    assert caught.value.__context__ is not None
    assert [frame.line for frame in frames(caught.value.__context__)] == ["net(images())"]
    assert [frame.name for frame in frames(caught.value) if frame.filename.startswith(PACKAGE)] == ["stop"]


def test_traceback_ends_in_the_model_that_calls_the_layer() -> None:
    """The line in the user's model is one of the user's, too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, input: torch.Tensor) -> Any:
            return self.bn(input)

    net = Net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net(rows())
    assert frames(caught.value)[-1].line == "return self.bn(input)"


def test_traceback_of_the_exit_check_ends_in_the_block() -> None:
    """What only the comparison at the end has found is raised from the user's ``with``."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        next(net.buffers()).add_(1)
    assert [frame.filename for frame in frames(caught.value)] == [__file__]


def test_exceptions_of_others_keep_their_traceback() -> None:
    """Only bnguard's own errors are cut."""
    net = nn.Sequential(nn.BatchNorm1d(2).eval())
    with pytest.raises(RuntimeError) as caught, bnguard.frozen(net):
        net(torch.ones(4, 3))
    assert frames(caught.value)[-1].filename.startswith(str(Path(torch.__file__).parent))


@EACH_NET
@EACH_WAY
def test_pytest_shows_no_frame_of_bnguard(make: Callable[[], Any], guarded: Any) -> None:
    """Also where the error is caught inside the block, before it can be cut, and for the check at the end."""
    net, batch = make()
    inside: list[pytest.ExceptionInfo[bnguard.StatsChangedError]] = []

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError) as caught:
            net(batch)
        inside.append(caught)

    with pytest.raises(bnguard.StatsChangedError, match="was caught") as caught:
        guarded(net, run)
    assert any(frame.filename.startswith(PACKAGE) for frame in frames(inside[0].value))
    for found in (inside[0], caught):
        shown = found.traceback.filter(found)
        assert len(shown)
        assert [entry for entry in shown if str(entry.path).startswith(PACKAGE)] == []


def test_pytest_shows_the_frames_of_a_bug_in_bnguard(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is none of bnguard's own errors hides nothing."""
    monkeypatch.setattr(LayerGuard, "apply", lambda *_: 1 / 0)
    net = conv_net()
    with pytest.raises(ZeroDivisionError) as caught, bnguard.frozen(net):
        net(images())
    assert any(str(entry.path).startswith(PACKAGE) for entry in caught.traceback.filter(caught))
