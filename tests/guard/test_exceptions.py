"""Exceptions on their way out of a block: theirs come out unmasked, ours are added to them, nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_untouched, state_of, statistics, values, warns
from tests.nets import OwnForward, conv_net, images, mlp, rows, warmed

POLICIES = pytest.mark.parametrize("on_change", ["raise", "warn", "restore"])
INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])


class Failing(nn.Module):
    """Fails in its forward."""

    def __init__(self, kind: type[BaseException] = ZeroDivisionError) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input: Tensor) -> Tensor:
        raise self.kind("theirs")


class FailingNorm(nn.BatchNorm2d):
    """Fails after it has updated."""

    kind: type[BaseException] = ZeroDivisionError

    def forward(self, input: Tensor) -> Tensor:
        super().forward(input)
        raise self.kind("theirs")


def notes_of(error: BaseException) -> list[str]:
    """What was added to an exception."""
    return getattr(error, "__notes__", [])


# Exceptions of others.


@POLICIES
@INTERRUPTS
def test_exception_of_the_block_comes_out(kind: type[BaseException], on_change: Any) -> None:
    """Any exception of the block is the one that comes out, without a note where nothing changed."""
    net = conv_net()
    mine = kind("mine")

    def run() -> None:
        with pytest.raises(kind) as caught, bnguard.frozen(net, on_change, affine=True):
            net.eval()(images())
            raise mine
        assert caught.value is mine

    assert_untouched(net, run)
    assert notes_of(mine) == []
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert_clean(net)


@INTERRUPTS
@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}, {"updates": 1}], ids=str)
def test_exception_of_a_later_layer_comes_out(kind: type[BaseException], options: Any) -> None:
    """A layer that fails after a guarded one has run leaves nothing behind; what was allowed stands."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2)), Failing(kind))
    twin, before = copy.deepcopy(net[0]), values(statistics(net))
    with pytest.raises(kind, match="theirs") as caught, bnguard.frozen(net, **options):
        net(images())
    assert notes_of(caught.value) == []
    if "updates" in options:
        twin(images())
        assert_same_bits(net[0].state_dict(), twin.state_dict())
    else:
        assert_same_bits(statistics(net), before)
    assert_clean(net)


@INTERRUPTS
@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}, {}], ids=str)
def test_exception_of_a_guarded_layer_comes_out(kind: type[BaseException], options: Any) -> None:
    """A layer that fails in its own forward after updating leaves its statistics as they were."""
    net = warmed(FailingNorm(2))
    net.kind = kind
    before, mean = values(statistics(net)), net.running_mean
    with pytest.raises(kind, match="theirs"), bnguard.frozen(net, **options):
        net(images())
    assert_same_bits(statistics(net), before)
    assert net.running_mean is mean
    assert_clean(net)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("when", ["before", "inside"])
@INTERRUPTS
@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}, {}], ids=str)
def test_exception_of_a_users_hook_comes_out(kind: type[BaseException], when: str, register: str, options: Any) -> None:
    """A user's hook that fails, older or younger than the guard, leaves the layer clean and the hook in place."""
    net = warmed(nn.Sequential(nn.BatchNorm2d(2)))
    before = state_of(net)

    def fail(*args: Any) -> None:
        raise kind("theirs")

    is_stopped = not options and not (register == "register_forward_pre_hook" and when == "before")
    if when == "before":
        getattr(net[0], register)(fail)
    with pytest.raises(bnguard.StatsChangedError if is_stopped else kind), bnguard.frozen(net, **options):
        if when == "inside":
            getattr(net[0], register)(fail)
        net(images())
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)
    with pytest.raises(kind, match="theirs"):
        net(images())


# Ours, swallowed.


def test_swallowed_error_fails_the_block() -> None:
    """Code that catches our error gets it again at the end of the block."""
    net = conv_net()
    before = state_of(net)
    told = pytest.raises(bnguard.StatsChangedError, match=r"was caught:\n  stem\.bn")
    with told, bnguard.frozen(net), suppress(Exception):
        net(images())
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


def test_swallowed_error_is_told_once() -> None:
    """An error that is on its way out of the block is not told again."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net(images())
    assert notes_of(caught.value) == []


def test_errors_that_are_swallowed_in_a_loop_are_kept_once() -> None:
    """A loop that catches every error of a block needs no more memory for the thousandth."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net) as guard:
        for _ in range(5):
            with contextlib.suppress(bnguard.StatsChangedError):
                net(images())
        assert guard._last is not None
        assert len(guard._last._outcome._errors) == 1


@pytest.mark.parametrize("link", ["cause", "context", "group"])
def test_error_inside_another_one_is_not_told_again(link: str) -> None:
    """An exception that was caused by ours, came while ours was handled, or carries ours needs no note."""
    net = conv_net()
    with pytest.raises((KeyError, ExceptionGroup)) as caught, bnguard.frozen(net):
        try:
            net(images())
        except bnguard.StatsChangedError as error:
            if link == "cause":
                raise KeyError("mine") from error
            if link == "group":
                raise ExceptionGroup("mine", [ValueError(), error]) from None
            raise KeyError("mine")  # noqa: B904  # while ours is handled
    assert notes_of(caught.value) == []


def test_swallowed_error_is_added_to_another_one() -> None:
    """A later exception of the user's is not masked: it gets a note that tells of the swallowed one."""
    net = conv_net()
    with pytest.raises(KeyError, match="mine") as caught, bnguard.frozen(net):
        with pytest.raises(bnguard.StatsChangedError):
            net(images())
        raise KeyError("mine")
    (note,) = notes_of(caught.value)
    assert note.startswith("bnguard: 1 layer would have updated inside frozen(), and the StatsChangedError")


@POLICIES
@INTERRUPTS
def test_finding_is_added_to_the_users_exception(kind: type[BaseException], on_change: Any) -> None:
    """What the comparison finds while an exception is on its way is a note of that exception."""
    net = conv_net()
    before = state_of(net)
    is_warned = on_change != "raise" or kind is GeneratorExit
    with warns(count=is_warned), pytest.raises(kind, match="mine") as caught, bnguard.frozen(net, on_change) as guard:
        net.stem.bn.running_mean += 1
        raise kind("mine")
    (note,) = notes_of(caught.value)
    assert note.startswith("bnguard: running statistics of 1 layer changed inside frozen():\n  stem.bn (BatchNorm2d)")
    assert [change.names for change in guard.changes] == [("stem.bn",)]
    if on_change == "warn":
        before["stem.bn.running_mean"] += 1
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_warning_made_an_error_masks_nothing() -> None:
    """With warnings as errors the user's exception still comes out, note and all."""
    net = conv_net()
    with pytest.raises(KeyError, match="mine") as caught, bnguard.frozen(net, "restore"):
        net.stem.bn.running_mean += 1
        raise KeyError("mine")
    assert len(notes_of(caught.value)) == 1


@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
@pytest.mark.parametrize("on_change", ["warn", "restore"])
def test_warning_made_an_error_comes_out_where_nothing_else_does(on_change: Any) -> None:
    """With warnings as errors a finding at the end raises the warning; the model is clean."""
    net = conv_net()
    with pytest.raises(bnguard.BNGuardWarning), bnguard.frozen(net, on_change):
        net.stem.bn.running_mean += 1
    assert_clean(net)


@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnForward])
def test_warning_made_an_error_stops_the_forward(norm: Any) -> None:
    """With warnings as errors, warn raises from the forward, and the model is clean."""
    net = nn.Sequential(norm(2))
    with pytest.raises(bnguard.BNGuardWarning, match=r"0 \(\w+\) is in train mode"), bnguard.frozen(net, "warn"):
        net(images())
    assert_clean(net)


# Where a note would reach nobody.


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_finding_in_a_closed_generator_is_warned_about(on_change: Any) -> None:
    """``close()`` swallows GeneratorExit and its notes: the finding is a warning, too."""
    net = conv_net()
    before = state_of(net)

    def generate() -> Iterator[int]:
        with bnguard.frozen(net, on_change):
            net.stem.bn.running_mean += 1
            yield 1

    generator = generate()
    next(generator)
    with warns() as caught:
        generator.close()
    assert caught.message.startswith("running statistics of 1 layer changed inside frozen():\n  stem.bn")
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


def test_finding_while_an_iterator_stops_is_warned_about() -> None:
    """StopIteration on its way through a block is swallowed by the for statement: the finding is a warning, too."""
    net = conv_net()

    class Batches:
        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> int:
            with bnguard.frozen(net):
                net.stem.bn.running_mean += 1
                raise StopIteration

    with warns(at="with bnguard.frozen(net):") as caught:
        assert list(Batches()) == []
    assert "stem.bn (BatchNorm2d)" in caught.message


def test_finding_while_an_async_iterator_stops_is_warned_about() -> None:
    """As StopIteration, for ``async for``."""
    net = conv_net()

    class Batches:
        def __aiter__(self) -> AsyncIterator[int]:
            return self

        async def __anext__(self) -> int:
            with bnguard.frozen(net):
                net.stem.bn.running_mean += 1
                raise StopAsyncIteration

    async def main() -> list[int]:
        return [item async for item in Batches()]

    with warns():
        assert asyncio.run(main()) == []


def test_finding_in_a_guarded_generator_is_raised() -> None:
    """A decorated generator that ends with a finding raises it: its end is no exception of the block."""
    net = conv_net()

    @bnguard.frozen(net)
    def generate() -> Iterator[int]:
        yield 1
        net.stem.bn.running_mean += 1

    generator = generate()
    next(generator)
    with pytest.raises(bnguard.StatsChangedError, match=r"stem\.bn"):
        next(generator)


# Torch's own errors.


WRONG: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "batch-of-one": lambda: (mlp(), rows(1)),
    "batch-of-one-plain": lambda: (nn.BatchNorm1d(4, affine=False), rows(1)),
    "channels": lambda: (nn.BatchNorm2d(3), images()),
    "channels-plain": lambda: (nn.BatchNorm2d(3, affine=False), images()),
    "channels-sync": lambda: (nn.SyncBatchNorm(3), images()),
    "channels-sync-plain": lambda: (nn.SyncBatchNorm(3, affine=False), images()),
    "channels-instance": lambda: (nn.InstanceNorm2d(3, track_running_stats=True, affine=True), images()),
    "one-value-instance": lambda: (nn.InstanceNorm2d(2, track_running_stats=True), images()[:, :, :1, :1]),
    "dimensions": lambda: (nn.BatchNorm2d(2), images()[0]),
    "dimensions-sync": lambda: (nn.SyncBatchNorm(2), images()[0, 0, 0]),
    "dtype": lambda: (nn.BatchNorm2d(2), images().long()),
    "empty": lambda: (nn.BatchNorm2d(2), images()[:0, :, :0, :0]),
    "no-tensor": lambda: (nn.BatchNorm2d(2), None),  # type: ignore[dict-item]
    "no-argument": lambda: (nn.BatchNorm2d(2), ...),  # type: ignore[dict-item]
}


def error_of(net: nn.Module, input: Any) -> tuple[type[BaseException], str] | None:
    """What a forward raises: its type and text."""
    try:
        net() if input is ... else net(input)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"on_change": "warn"}, {"on_change": "restore", "updates": 1}], ids=str
)
@pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning")
def test_error_of_torch_is_word_for_word_its_own(case: str, options: Any) -> None:
    """An input that torch refuses is refused with torch's error; the statistics are held, or are the twin's."""
    net, input = WRONG[case]()
    twin, before = copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, **options):
        found = error_of(net, input)
    assert found == error_of(twin, input)
    assert_same_bits(statistics(net), before if options == {"on_change": "restore"} else statistics(twin))
    assert_clean(net)


@pytest.mark.parametrize("case", WRONG)
def test_error_of_torch_with_use_running_stats_is_the_eval_twins(case: str) -> None:
    """With use_running_stats the error, or the result, is that of eval mode."""
    net, input = WRONG[case]()
    twin, before = copy.deepcopy(net).eval(), values(statistics(net))
    with bnguard.frozen(net, use_running_stats=True):
        found = error_of(net, input)
    assert found == error_of(twin, input)
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("case", ["dimensions", "dimensions-sync"])
def test_error_of_torch_comes_before_ours(case: str) -> None:
    """Under raise an input that the layer refuses before it counts the batch gets torch's error, and is no finding."""
    net, input = WRONG[case]()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net) as guard:
        found = error_of(net, input)
    assert found == error_of(twin, input)
    assert guard.changes == ()


# Guards and exceptions in layers.


def test_exception_leaves_the_outer_guard_in_place() -> None:
    """A block that fails ends alone; the one around it goes on."""
    net = conv_net()
    before = state_of(net)
    with bnguard.frozen(net, "restore"):
        with pytest.raises(ZeroDivisionError), bnguard.frozen(net, use_running_stats=True):
            raise ZeroDivisionError
        net(images())
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


def test_exception_on_the_way_in_leaves_nothing() -> None:
    """A block that cannot be entered, for a selection that is empty by now, touches nothing."""
    net = conv_net()
    guard = bnguard.frozen(net, affine=True, include="body")
    net.body = nn.Identity()
    with pytest.raises(ValueError, match="include='body'"), guard:
        pytest.fail("the block was entered")
    assert_clean(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    guard.stop()


@pytest.mark.parametrize("is_open", [False, True])
def test_exception_in_a_guarded_function_keeps_its_traceback(is_open: bool) -> None:
    """The traceback of a finding goes through the user's line."""
    net = conv_net()
    outer = bnguard.frozen(net, "warn") if is_open else nullcontext()
    with pytest.raises(bnguard.StatsChangedError) as caught, outer, bnguard.frozen(net):
        net(images())
    assert any(
        entry.path.name == "test_exceptions.py" and "net(images())" in str(entry.statement)
        for entry in caught.traceback
    )
