"""``check="deferred"``: values are right when the block ends, the report comes later, and comes.

``test_deferred_programs.py`` has random programs.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import bnguard
from bnguard.guard.deferred import keep_verdict, read_verdicts
from tests import forks
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    assert_same_gradients,
    assert_untouched,
    run_threads,
    state_of,
    statistics,
    values,
    warns,
)
from tests.devices import emulated_device
from tests.guard.test_device_reads import EACH_DEPTH, EACH_POLICY, evaluate, put_on, train, write
from tests.guard.test_exit_check import EVERY_WRITE, make_input, make_net
from tests.nets import OwnForward, deep_net, images, warmed
from tests.old_torch import needs_guarded_graphs

DEFERRED: dict[str, Any] = {"check": "deferred"}
NOTE = 'It was found when the block ended, and is read only now: check="deferred".'


def write_mean(net: nn.Module) -> None:
    """A write to the first mean that no hook sees."""
    next(net.buffers()).data.add_(1)


# What is read when.


@EACH_DEPTH
@pytest.mark.parametrize("work", [evaluate, train, write])
@EACH_POLICY
def test_block_reads_nothing(options: dict[str, Any], work: Callable[..., object], layers: int) -> None:
    """At entry, inside and at the end of a block nothing is read, whatever it will turn out to have found."""
    with emulated_device() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        net, input = put_on(device, deep_net(layers)), images()
        guard = bnguard.frozen(net, **options, **DEFERRED)
        device.put(input)
        with suppress(bnguard.StatsChangedError), guard, suppress(bnguard.StatsChangedError):
            work(net, input)
        assert device.reads.total() == 0
        with suppress(bnguard.StatsChangedError):
            guard.check()
        assert 1 <= device.reads.total() <= 2  # whether anything differs, and then the values
        device.reads.clear()
        guard.check()
        assert device.reads.total() == 0


def test_next_block_reads_one_result() -> None:
    """The next block reads what the one before has found, and of what puts back in silence nothing at all."""
    for on_change, reads in (("raise", 1), ("restore", 1), ("warn", 1), ("rollback", 0)):
        with emulated_device() as device:
            net = put_on(device, deep_net(50).eval())
            guard = bnguard.frozen(net, on_change, **DEFERRED)
            with guard:
                pass
            assert device.reads.total() == 0
            with guard:
                pass
            assert device.reads.total() == reads


def test_next_block_does_not_read_what_was_said_already() -> None:
    """Under warn the first update of a block warns at its line; nothing would follow at the end, so nothing is read."""
    with emulated_device() as device:
        net, input = put_on(device, deep_net(2)), images()
        device.put(input)
        guard = bnguard.frozen(net, "warn", **DEFERRED)
        for _ in range(2):
            with warns("net(input)"), guard:
                net(input)
        assert device.reads.total() == 0


# Values and reports.


@EVERY_WRITE
@pytest.mark.parametrize("on_change", ["raise", "restore", "rollback", "warn"])
def test_values_are_right_at_once_and_the_report_is_that_of_a_check_at_exit(
    on_change: Any, write: Callable[[Any], Any]
) -> None:
    """Objects, statistics, changes, error and warnings, of every kind of write."""
    found = []
    for check in ("exit", "deferred"):
        net = make_net()
        before, objects = values(statistics(net)), statistics(net)
        guard = bnguard.frozen(net, on_change, check=check)  # type: ignore[arg-type]
        texts = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with guard:
                    torch.manual_seed(3)
                    with suppress(bnguard.StatsChangedError):
                        write(net)
                    now = statistics(net)
                    after = values(now)
                state = values(statistics(net))
                guard.check()
            except bnguard.StatsChangedError as error:
                state = values(statistics(net))
                texts.append(str(error))
        assert_same_bits(state, after if on_change == "warn" else before)
        expected = now if on_change == "warn" else objects
        assert {name: id(tensor) for name, tensor in statistics(net).items()} == {
            name: id(tensor) for name, tensor in expected.items()
        }
        assert_clean(net)
        texts += [str(warning.message) for warning in caught]
        found.append(([text.replace(f"\n{NOTE}", "") for text in texts], [repr(change) for change in guard.changes]))
    assert found[0] == found[1]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(2),
    "InstanceNorm": lambda: nn.InstanceNorm2d(2, track_running_stats=True),
    "own-forward": lambda: OwnForward(2),
    "half": lambda: nn.BatchNorm2d(2).to(torch.bfloat16),
    "without-counter": lambda: _without_counter(nn.BatchNorm2d(2)),
    "tied": lambda: _tied(),
    "expanded": lambda: _expanded(nn.BatchNorm2d(2)),
    "mixed": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3).double(), OwnForward(1).half()),
    "inference": lambda: _inference(),
    "empty": lambda: nn.BatchNorm2d(0),
}


def _without_counter(layer: nn.BatchNorm2d) -> nn.Module:
    layer.num_batches_tracked = None
    return layer


def _tied() -> nn.Module:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    net[1].running_mean = net[0].running_mean
    return net


def _expanded(layer: nn.BatchNorm2d) -> nn.Module:
    layer.running_mean = torch.zeros(1).expand(2)
    return layer


def _inference() -> nn.Module:
    with torch.inference_mode():
        return nn.BatchNorm2d(2)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("on_change", ["raise", "restore", "rollback"])
def test_values_return_to_every_kind_of_buffer(on_change: Any, make: Callable[[], nn.Module]) -> None:
    """Of every dtype, without a counter, shared, expanded, made in inference mode, or empty."""
    net = make()
    name, first = next(iter(net.named_buffers()))
    others = [buffer for buffer in net.buffers() if buffer.dim() and buffer.numel()]
    before = state_of(net)
    guard = bnguard.frozen(net, on_change, **DEFERRED)
    with guard, torch.inference_mode(any(buffer.is_inference() for buffer in others)):
        for buffer in others:
            buffer.data[:1].add_(1)
    assert_same_bits(state_of(net), before)
    assert dict(net.named_buffers())[name] is first
    if others and on_change == "raise":
        with pytest.raises(bnguard.StatsChangedError):
            guard.check()
    elif others and on_change == "restore":
        with warns("guard.check()"):
            guard.check()
    else:
        guard.check()
    assert bool(guard.changes) is bool(others)


def test_version_counters_and_gradients_are_those_without_a_guard() -> None:
    """What is written back increases no version counter: a backward pass after the block works, with its gradients."""
    net, twin = make_net().eval(), make_net().eval()
    versions = [buffer._version for buffer in net.buffers()]
    with bnguard.frozen(net, "restore", **DEFERRED):
        loss = net(make_input()).square().sum()
    assert [buffer._version for buffer in net.buffers()] == versions
    loss.backward()
    twin(make_input()).square().sum().backward()
    assert_same_gradients(net, twin)


def test_frozen_weights_return_at_once() -> None:
    """With ``affine=True`` weights and biases do so as well, and the report names them together with the statistics."""
    net = make_net()
    before = values(dict(net.named_parameters()))
    guard = bnguard.frozen(net, affine=True, **DEFERRED)
    with guard:
        net[1].weight.data.mul_(2)
        net[1].running_var.data.add_(1)
        net[4].bias.data.sub_(1)
    assert_same_bits(values(dict(net.named_parameters())), before)
    with pytest.raises(bnguard.StatsChangedError, match="running statistics and affine parameters of 2 layers"):
        guard.check()
    assert [change.buffers for change in guard.changes] == [("running_var", "weight"), ("bias",)]


def test_other_buffers_return_at_once() -> None:
    """``buffers=`` is held likewise."""
    net = make_net()
    net.register_buffer("queue", torch.arange(4.0))
    guard = bnguard.frozen(net, buffers="queue", **DEFERRED)
    with guard:
        net.queue.add_(1)
    assert_same_bits(net.queue, torch.arange(4.0))
    with pytest.raises(bnguard.StatsChangedError, match="queue"):
        guard.check()


def test_forward_still_raises_before_it_updates() -> None:
    """Only the comparison at the end is deferred; a violation that was caught fails the block at its end."""
    net = make_net()
    guard = bnguard.frozen(net, **DEFERRED)

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError, match="this forward would update"), guard:
            net(make_input())
        with pytest.raises(bnguard.StatsChangedError, match="was caught"), guard, suppress(bnguard.StatsChangedError):
            net(make_input())

    assert_untouched(net, run)
    guard.check()


def test_exception_that_ends_a_block_gets_its_note_at_once() -> None:
    """The comparison is not deferred then: who catches the exception may be the only one to hear of it."""
    net = make_net()
    guard = bnguard.frozen(net, **DEFERRED)
    with pytest.raises(KeyError) as caught, guard:
        write_mean(net)
        raise KeyError("of the user")
    assert "1 (BatchNorm2d): running_mean" in caught.value.__notes__[0]
    assert len(guard.changes) == 1
    guard.check()


@pytest.mark.parametrize("number", [1, None], ids=["one", "all"])
def test_statistics_read_as_another_dtype_are_treated_as_by_a_check_at_exit(number: int | None) -> None:
    """They are in the memory of the beginning, with its bits, but are other numbers."""
    found = []
    for options in ({}, DEFERRED):
        net = warmed(make_net())
        means = [buffer for buffer in net.buffers() if buffer.is_floating_point()][:number]
        guard = bnguard.frozen(net, **options)
        with pytest.raises(bnguard.StatsChangedError, match="running_mean") as error:
            with guard:
                for mean in means:
                    mean.data = mean.data.view(torch.int32)
            guard.check()
        found.append((state_of(net), [(change.names, change.buffers) for change in error.value.changes]))
    (state, changes), (late, changes_late) = found
    assert_same_bits(state, late)
    assert changes == changes_late


def test_replaced_statistics_are_reported_at_once() -> None:
    """The host sees them without the device."""
    net = make_net()
    with pytest.raises(bnguard.StatsChangedError, match="running_mean") as caught, bnguard.frozen(net, **DEFERRED):
        net[1].running_mean = torch.full((3,), 2.0)
    assert NOTE not in str(caught.value)


@needs_guarded_graphs
def test_graph_is_named_as_the_cause() -> None:
    """Of a late report as of one at exit."""
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    compiled(make_input())
    guard = bnguard.frozen(compiled, **DEFERRED)  # type: ignore[arg-type]

    def run() -> None:
        with guard:
            compiled(make_input())

    assert_untouched(net, run)
    with pytest.raises(bnguard.StatsChangedError, match="In a compiled graph no forward can be seen"):
        guard.check()


# When it is read.


def test_next_block_of_any_deferred_guard_raises() -> None:
    """It is not entered then, and the one after it is."""
    net = make_net().eval()
    guard = bnguard.frozen(net, **DEFERRED)
    with guard:
        write_mean(net)
    with bnguard.frozen(net):  # which reads at exit, and has nothing to do with it
        pass
    with pytest.raises(bnguard.StatsChangedError, match=re.escape(NOTE)) as caught, bnguard.frozen(net, **DEFERRED):
        pytest.fail("was entered")
    assert [change.names for change in caught.value.changes] == [("1",)]
    assert caught.value.changes == guard.changes
    assert_clean(net)
    with guard:
        net(make_input())
    guard.check()
    assert guard.changes == ()


def test_next_block_warns_under_restore_at_the_line_of_the_user() -> None:
    """And is entered."""
    net = make_net()
    guard = bnguard.frozen(net, "restore", **DEFERRED)
    with guard:
        write_mean(net)
    with warns("with guard:  # here") as caught, guard:  # here
        net(make_input())
    assert NOTE in caught.message


def test_guard_made_at_each_step_reads_the_step_before() -> None:
    """What belongs to a guard that is gone is not lost."""
    net = make_net()
    steps = 0
    with pytest.raises(bnguard.StatsChangedError, match=re.escape(NOTE)):
        for _ in range(5):
            with bnguard.frozen(net, **DEFERRED):
                steps += 1
                if steps == 3:
                    write_mean(net)
    assert steps == 3


def test_stop_reads_at_once() -> None:
    """Also what earlier blocks have left; stopping once more does nothing."""
    net = make_net()
    guard = bnguard.frozen(net, **DEFERRED)
    guard.start()
    write_mean(net)
    with pytest.raises(bnguard.StatsChangedError, match="running_mean"):
        guard.stop()
    guard.stop()
    with guard:
        write_mean(net)
    with pytest.raises(bnguard.StatsChangedError, match="running_mean"):
        guard.stop()
    guard.stop()


def test_check_inside_a_block_reads_both() -> None:
    """First what earlier blocks have left, then the open one."""
    net = make_net()
    guard = bnguard.frozen(net, "restore", **DEFERRED)
    with guard:
        with guard:
            net[1].running_mean.data.add_(1)
        net[4].running_var.data.add_(1)
        with warns("guard.check()", count=2) as caught:
            guard.check()
    guard.check()
    assert [re.search(r"\d \(", message)[0] for message in caught.messages] == ["1 (", "4 ("]  # type: ignore[index]


def test_nested_blocks_are_each_read_once() -> None:
    """The inner one puts back, so the outer one finds nothing."""
    net = make_net()
    outer, inner = bnguard.frozen(net, **DEFERRED), bnguard.frozen(net, **DEFERRED)
    with outer:
        with inner:
            write_mean(net)
        with pytest.raises(bnguard.StatsChangedError), inner:
            pytest.fail("was entered")
    outer.check()
    assert outer.changes == ()
    assert len(inner.changes) == 1


def test_strict_reads_at_the_next_call() -> None:
    """A decorated function raises before it runs; what the last call left is read by a guard on the model."""
    net = make_net()
    calls = []

    @bnguard.strict(check="deferred")
    def step(model: nn.Module) -> None:
        calls.append(1)
        write_mean(model)

    step(net)
    with pytest.raises(bnguard.StatsChangedError, match=f"(?s)inside @bnguard.strict.*{re.escape(NOTE)}"):
        step(net)
    assert len(calls) == 1
    step(net)
    with pytest.raises(bnguard.StatsChangedError, match=re.escape(NOTE)):
        bnguard.frozen(net, **DEFERRED).check()


def test_generators_and_coroutines_read_at_their_next_resumption() -> None:
    """Each resumption is a block."""
    net = make_net()

    @bnguard.frozen(net, **DEFERRED)
    def numbers() -> Iterator[int]:
        write_mean(net)
        yield 1
        pytest.fail("was resumed")

    @bnguard.frozen(net, **DEFERRED)
    async def run() -> None:
        write_mean(net)
        await asyncio.sleep(0)
        pytest.fail("was resumed")

    iterator = numbers()
    assert next(iterator) == 1
    with pytest.raises(bnguard.StatsChangedError, match=re.escape(NOTE)):
        next(iterator)
    with pytest.raises(bnguard.StatsChangedError, match=re.escape(NOTE)):
        asyncio.run(run())
    bnguard.frozen(net, **DEFERRED).check()


def test_threads_read_each_result_once() -> None:
    """Blocks of several threads on one model: as many reports as there were writes."""
    net = make_net()
    guard = bnguard.frozen(net, "restore", **DEFERRED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            with guard:
                net[1].running_mean.data.add_(number + 1)
            run_threads(*[guard.check] * 4)
    assert len(caught) == 3


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, torch.no_grad])
def test_modes_of_the_user_do_not_matter(mode: Callable[[], Any]) -> None:
    """Neither where a block ends nor where it is read."""
    net = make_net()
    guard = bnguard.frozen(net, **DEFERRED)
    before = state_of(net)
    guard.__enter__()
    write_mean(net)
    with mode():
        guard.__exit__(None, None, None)
    assert_same_bits(state_of(net), before)
    with mode(), pytest.raises(bnguard.StatsChangedError, match="running_mean"):
        guard.check()
    assert guard.changes[0].buffers == ("running_mean",)


# What nobody reads.


@pytest.mark.parametrize("options", [{}, {"include": True}], ids=["all", "a module"])
def test_unread_result_is_printed_when_the_model_goes(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, with its last reference: a result keeps no model alive."""
    net = make_net()
    guard = bnguard.frozen(net, include=[net, net[1]] if options else None, **DEFERRED)
    with guard:
        write_mean(net)
    gone = weakref.ref(net)
    gc.disable()
    try:
        del guard
        assert capsys.readouterr().err == ""
        del net
        assert gone() is None
    finally:
        gc.enable()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bnguard: error: running statistics of 1 layer changed inside frozen():"
    assert lines[1].startswith("  1 (BatchNorm2d): running_mean; mean moved by up to ")
    assert lines[-1].startswith('Nothing has read this result of check="deferred"')


def test_unread_result_of_restore_is_printed_as_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """As it would have been one."""
    net = make_net()
    with bnguard.frozen(net, "restore", **DEFERRED):
        write_mean(net)
    del net
    assert capsys.readouterr().err.startswith("bnguard: warning: running statistics of 1 layer changed inside frozen()")


def test_nothing_is_printed_of_models_that_did_not_change(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor under rollback, which is silent."""
    for on_change, work in (("raise", lambda net: None), ("rollback", write_mean)):
        net = make_net()
        with bnguard.frozen(net, on_change, **DEFERRED):  # type: ignore[arg-type]
            work(net)
        del net
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import torch, bnguard
net = torch.nn.BatchNorm1d(2)
with bnguard.frozen(net, check="deferred"):
    net.running_mean.data.add_(1)
print("done")
"""


def test_unread_result_is_printed_when_the_process_ends(tmp_path: Path, interpreter: None) -> None:
    """With the exit code of the program."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = forks.run(str(script))
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert result.stderr.startswith("bnguard: error: running statistics of 1 layer changed inside frozen():\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_leaves_the_report_to_its_parent() -> None:
    """What a child has inherited it neither reads nor prints."""
    net = make_net()
    guard = bnguard.frozen(net, **DEFERRED)
    with guard:
        write_mean(net)
    child = os.fork()
    if not child:
        try:
            guard.check()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(bnguard.StatsChangedError):
        guard.check()


def test_result_that_cannot_be_read_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device may have failed in the meantime."""

    def fail(self: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("bnguard.layers.flat_copy.FlatPair.result", fail)
    net = make_net()
    with bnguard.frozen(net, **DEFERRED):
        pass
    del net
    assert capsys.readouterr().err == (
        'bnguard: error: the result of a comparison with check="deferred" could not be read: an illegal memory access '
        "was encountered\n"
    )


def test_results_are_let_go_when_they_are_read() -> None:
    """The copies of the statistics go with them."""
    net, seen = make_net(), []

    class Spy:
        is_silent = False

        def read(self) -> None:
            seen.append(weakref.ref(self))

    keep_verdict(net, Spy())  # type: ignore[arg-type]
    read_verdicts(net)
    assert seen[0]() is None
    read_verdicts(net)
    assert len(seen) == 1


# Options.


def test_unknown_check_is_refused_with_the_nearest() -> None:
    """So are other values."""
    with pytest.raises(ValueError, match="check='defered': did you mean 'deferred'"):
        bnguard.frozen(make_net(), check="defered")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check=True: "):
        bnguard.strict(check=True)  # type: ignore[call-overload]


def test_budget_contradicts_a_deferred_check() -> None:
    """What it allows is found out at the end of the block."""
    with pytest.raises(ValueError, match="check='deferred' contradicts updates=1"):
        bnguard.frozen(make_net(), updates=1, **DEFERRED)


def test_guard_says_that_its_check_is_deferred() -> None:
    """In its report, and in its copies."""
    guard = bnguard.frozen(make_net(), **DEFERRED)
    assert 'check="deferred"' in guard.report()
    assert 'check="deferred"' in copy.deepcopy(guard).report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EACH_POLICY
def test_gpu_does_not_wait(options: dict[str, Any]) -> None:
    """On a GPU a block waits nowhere; the values are right, and a result is read on whatever stream is current."""
    net, input = deep_net(50).cuda().eval(), images().cuda()
    guard = bnguard.frozen(net, **options, **DEFERRED)
    before = state_of(net)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with guard:
            net(input)
            write_mean(net)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if options.get("on_change") != "warn":
        assert_same_bits(state_of(net), before)
    with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        with suppress(bnguard.StatsChangedError):
            guard.check()
    assert [change.buffers for change in guard.changes] == [("running_mean",)]
