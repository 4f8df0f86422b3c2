"""Every text as users meet it, word for word, and the line that a warning points to."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import warns
from tests.nets import ReassigningNorm, SharedNet, conv_net, deep_net, images

CAUSES = """\
No forward that bnguard can see explains it: look for load_state_dict(), reset_running_stats(), assignments,
F.batch_norm() or forward() called directly, a forward that failed, another thread or process, or a
compiled or scripted model.
"""
CHOICES = """\
  frozen(model, use_running_stats=True)    normalise with the frozen statistics
  frozen(model, on_change="restore")       normalise with the batch, keep the statistics"""


def line_of(text: str) -> str:
    """Where the calling test contains ``text``, as messages print it."""
    frame = inspect.currentframe().f_back
    lines, start = inspect.getsourcelines(frame.f_code)
    number = next(
        start + index
        for index, line in enumerate(lines)
        if text in line and "line_of" not in line and "at=" not in line
    )
    return f"tests/guard/test_messages.py:{number} in {frame.f_code.co_name}"


def move(net: nn.Sequential, layers: int) -> None:
    """Writes to the mean of the first layers."""
    for layer in net[:layers]:
        layer.running_mean += 2


def raised(guard: bnguard.frozen, run: Any) -> str:
    """The text of the error of a block."""
    with pytest.raises(bnguard.StatsChangedError) as caught, guard:
        run()
    return str(caught.value)


# Errors of a forward.


def test_stopped_forward_says_where_what_and_what_to_do() -> None:
    """The error of a forward names layer, buffers, line and both ways out."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net(images())
    assert str(caught.value) == (
        "stem.bn (BatchNorm2d) is in train mode inside frozen():\n"
        "this forward would update running_mean, running_var and num_batches_tracked.\n"
        f"  at {line_of('net(images())')}\n"
        "Call eval() on it after model.train(), or choose what you meant:\n"
        f"{CHOICES}"
    )


def test_stopped_forward_in_eval_mode_does_not_advise_eval_mode() -> None:
    """A layer that updates in eval mode is not told to be put there."""
    net = nn.InstanceNorm2d(2, track_running_stats=True).eval()
    net.track_running_stats = False
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net(images())
    assert str(caught.value) == (
        "(root) (InstanceNorm2d) is in eval mode inside frozen():\n"
        "this forward would update running_mean and running_var.\n"
        f"  at {line_of('net(images())')}\n"
        "Choose what you meant:\n"
        f"{CHOICES}"
    )


def test_stopped_forward_beyond_the_budget_of_one() -> None:
    """With a budget the error says how many updates there were, and how to let the rest pass."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net, updates=1):
        net(images())
        net(images(5))
    assert str(caught.value) == (
        "stem.bn (BatchNorm2d) has updated once inside frozen(updates=1):\n"
        "this forward would update running_mean, running_var and num_batches_tracked once more.\n"
        f"  at {line_of('net(images(5))')}\n"
        "A step should update each layer once: run the batches through the model in one forward, or\n"
        '  frozen(model, on_change="restore", updates=1)    let the first one update, not the rest'
    )


@pytest.mark.parametrize(("budget", "times", "first"), [(2, "twice", "2"), (3, "3 times", "3")])
def test_stopped_forward_beyond_a_larger_budget(budget: int, times: str, first: str) -> None:
    """Budgets of two and more are worded as such."""
    net = conv_net()
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net, updates=budget):
        for _ in range(budget + 1):
            net(images())
    assert str(caught.value) == (
        f"stem.bn (BatchNorm2d) has updated {times} inside frozen(updates={budget}):\n"
        "this forward would update running_mean, running_var and num_batches_tracked once more.\n"
        f"  at {line_of('net(images())')}\n"
        f"A step should update each layer {times}: run the batches through the model in one forward, or\n"
        f'  frozen(model, on_change="restore", updates={budget})    let the first {first} update, not the rest'
    )


def test_root_layer_is_called_root() -> None:
    """A model that is itself a layer has a name in messages."""
    net = nn.BatchNorm2d(2)
    assert raised(bnguard.frozen(net), lambda: net(images())).startswith("(root) (BatchNorm2d) is in train mode")


def test_shared_layer_is_called_by_all_its_names() -> None:
    """Both names of a shared layer are printed."""
    net = SharedNet()
    assert raised(bnguard.frozen(net), lambda: net(images())).startswith("norm = again (BatchNorm2d) is in train mode")


@pytest.mark.parametrize(
    "wrapper", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")], ids=["DataParallel", "compile"]
)
def test_wrapper_prefixes_are_no_part_of_a_name(wrapper: Any) -> None:
    """Names are those of the bare model."""
    net = wrapper(conv_net())
    assert [layer.names for layer in bnguard.frozen(net).layers] == [("stem.bn",), ("body.bn",)]


# Warnings of a forward.


def test_warning_of_a_forward_points_at_the_users_line() -> None:
    """Under warn the first update of a block is told, at its line."""
    net = conv_net()
    with warns(at="net(images())") as caught, bnguard.frozen(net, "warn"):
        net(images())
    assert caught.message == (
        "stem.bn (BatchNorm2d) is in train mode inside frozen() and updates its running statistics: "
        "running_mean, running_var and num_batches_tracked.\n"
        f"  at {line_of('net(images())')}\n"
        "The update was kept. Later ones are recorded without further warnings; guard.changes lists them all."
    )


def test_warning_of_a_forward_beyond_the_budget() -> None:
    """With a budget the warning counts."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    with warns(at="net(images(5))") as caught, bnguard.frozen(net, "warn", updates=1):
        net(images())
        net(images(5))
    assert caught.message == (
        "0 (BatchNorm2d) has updated once inside frozen(updates=1) and updates once more: "
        "running_mean, running_var and num_batches_tracked.\n"
        f"  at {line_of('net(images(5))')}\n"
        "The update was kept. Later ones are recorded without further warnings; guard.changes lists them all."
    )


def test_warning_of_an_own_forward_points_at_the_users_line() -> None:
    """What is only seen after the call points at the same line."""
    net = nn.Sequential(ReassigningNorm(2))
    with warns(at="net(images())") as caught, bnguard.frozen(net, "warn"):
        net(images())
    assert f"  at {line_of('net(images())')}\n" in caught.message


# What only the comparison sees.


@pytest.mark.parametrize(
    ("layers", "lines"),
    [
        (1, "1 layer changed inside frozen():\n  0 (BatchNorm2d): running_mean; {shift}\n"),
        (
            3,
            "3 layers changed inside frozen():\n"
            + "".join(f"  {i} (BatchNorm2d): running_mean; {{shift}}\n" for i in range(3)),
        ),
        (
            53,
            "53 layers changed inside frozen():\n"
            + "".join(f"  {i} (BatchNorm2d): running_mean; {{shift}}\n" for i in range(3))
            + "  and 50 more\n",
        ),
    ],
)
@pytest.mark.parametrize(
    ("on_change", "outcome"),
    [
        ("raise", "The original statistics have been restored."),
        ("restore", "The original statistics have been restored."),
        ("warn", "The changes were kept."),
    ],
)
def test_exit_names_three_layers_and_counts_the_rest(layers: int, lines: str, on_change: Any, outcome: str) -> None:
    """However many layers changed, the text names three, says by how much, and where to look."""
    net = deep_net(layers)
    guard = bnguard.frozen(net, on_change)
    if on_change == "raise":
        text = raised(guard, lambda: move(net, layers))
    else:
        with warns(at="caught, guard:") as caught, guard:
            move(net, layers)
        text = caught.message
    shift = "mean moved by up to 2 standard deviations"
    assert text == f"running statistics of {lines.format(shift=shift)}{CAUSES}{outcome}"


def test_exit_without_a_mean_gives_no_distance() -> None:
    """Where only the counter was written nothing is said about the mean but that it did not move."""
    net = deep_net(1)
    text = raised(bnguard.frozen(net), lambda: net[0].num_batches_tracked.add_(1))
    assert text.splitlines()[1] == "  0 (BatchNorm2d): num_batches_tracked"


def test_check_points_at_its_line() -> None:
    """A warning of ``check()`` points at the call."""
    net = deep_net(1)
    with warns(at="guard.check()"), bnguard.frozen(net, "restore") as guard:
        move(net, 1)
        guard.check()


def test_stop_points_at_its_line() -> None:
    """A warning of ``stop()`` points at the call."""
    net = deep_net(1)
    guard = bnguard.frozen(net, "restore").start()
    move(net, 1)
    with warns(at="guard.stop()"):
        guard.stop()


def test_decorated_function_points_at_its_call() -> None:
    """A warning at the end of a decorated function points at the line that called it."""
    net = deep_net(1)

    @bnguard.frozen(net, "restore")
    def write() -> None:
        move(net, 1)

    with warns(at="write()"):
        write()


def test_swallowed_error_is_told_at_the_end() -> None:
    """What was caught comes back with layer, number and line of the first forward."""
    net = deep_net(1)
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        for _ in range(2):
            with pytest.raises(bnguard.StatsChangedError):
                net(images())
    assert str(caught.value) == (
        "1 layer would have updated inside frozen(), and the StatsChangedError that said so was caught:\n"
        "  0 (BatchNorm2d): running_mean, running_var and num_batches_tracked; "
        f"2 updates stopped, first at {line_of('net(images())')}\n"
        "The updates did not happen. Let the error through, or use on_change='restore' where they are expected."
    )


def test_swallowed_error_and_a_write_are_told_together() -> None:
    """Both findings are in one error, the write first."""
    net = deep_net(2)
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net[1].running_mean += 2
        with pytest.raises(bnguard.StatsChangedError):
            net(images())
    assert str(caught.value) == (
        "running statistics of 1 layer changed inside frozen():\n"
        "  1 (BatchNorm2d): running_mean; mean moved by up to 2 standard deviations\n"
        f"{CAUSES}The original statistics have been restored.\n"
        "1 layer would have updated inside frozen(), and the StatsChangedError that said so was caught:\n"
        "  0 (BatchNorm2d): running_mean, running_var and num_batches_tracked; "
        f"1 update stopped at {line_of('            net(images())')}\n"
        "The updates did not happen. Let the error through, or use on_change='restore' where they are expected."
    )
    assert [change.names for change in caught.value.changes] == [("0",), ("1",)]


def test_swallowed_error_of_check_is_told_at_the_end() -> None:
    """An error of ``check()`` that was caught comes back, too, and says that the statistics are those of entry."""
    net = deep_net(1)
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net) as guard:
        move(net, 1)
        with pytest.raises(bnguard.StatsChangedError):
            guard.check()
    assert str(caught.value) == (
        "1 layer changed inside frozen(), and the StatsChangedError that said so was caught:\n"
        "  0 (BatchNorm2d): running_mean; mean moved by up to 2 standard deviations\n"
        "The original statistics have been restored. "
        "Let the error through, or use on_change='restore' where they are expected."
    )


@pytest.mark.parametrize(
    ("number", "names"), [(1, "2"), (3, "2, 3, 4"), (5, "2, 3, 4 and 2 more")], ids=["one", "three", "five"]
)
def test_added_layers_are_named(number: int, names: str) -> None:
    """Layers that came inside are named, three of them, and the rest is counted."""
    net = deep_net(2)
    with warns(at="with warns") as caught, bnguard.frozen(net):
        net.extend(deep_net(number))
    assert caught.message == (
        f"{names} came into the model inside frozen() and was not guarded there.\n"
        "Change the model before the block, or open another block after the change."
    )


def test_model_without_layers_is_told_at_the_users_line() -> None:
    """A model with nothing to guard gets one warning, and runs."""
    with warns(at="frozen(nn.Linear") as caught:
        guard = bnguard.frozen(nn.Linear(2, 2))
    assert caught.message == (
        "Linear has no layer with running statistics: frozen() has nothing to guard.\n"
        "If one of its layers keeps statistics under other names, see bnguard.register_layer()."
    )
    with guard:
        pass
    assert guard.report() == 'frozen(model, on_change="raise") guards no layer.'


# Reports.


def test_report_of_a_quiet_block() -> None:
    """The report counts the layers by how they are protected."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), ReassigningNorm(2))
    assert bnguard.frozen(net).report() == (
        'frozen(model, on_change="raise") guards 3 layers.\n'
        "  2 checked before each forward; compared at exit\n"
        "  1 compared after each forward; compared at exit\n"
        "No change."
    )
    assert bnguard.frozen(net, "warn").report() == (
        'frozen(model, on_change="warn") guards 3 layers.\n'
        "  2 checked before each forward; compared at exit\n"
        "  1 compared after each forward; compared at exit\n"
        "No change."
    )
    assert bnguard.frozen(net, "restore").report() == (
        'frozen(model, on_change="restore") guards 3 layers.\n  3 held in its forward; compared at exit\nNo change.'
    )


def test_report_lists_every_change() -> None:
    """The report is not cut after three layers."""
    net = deep_net(5)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net) as guard:
        move(net, 5)
    lines = guard.report().splitlines()
    assert lines[2] == "5 layers changed:"
    assert lines[3:] == [
        f"  {index} (BatchNorm2d): running_mean; mean moved by up to 2 standard deviations" for index in range(5)
    ]


def test_report_of_updates_that_stood() -> None:
    """Under warn the report says how often a layer updated, and where first."""
    net = nn.Sequential(nn.BatchNorm2d(2, momentum=1.0))
    with warns(), bnguard.frozen(net, "warn") as guard:
        for _ in range(2):
            net(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1))
    assert guard.report().splitlines()[-1] == (
        "  0 (BatchNorm2d): running_mean, running_var and num_batches_tracked; "
        f"mean moved by up to 2 standard deviations; 2 updates seen, first at {line_of('net(torch.tensor')}"
    )


# The exception as an object.


def test_error_pickles() -> None:
    """Text and changes survive pickling."""
    net = deep_net(1)
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net):
        net(images())
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is bnguard.StatsChangedError
    assert str(again) == str(caught.value)
    assert again.changes == caught.value.changes != ()


def test_error_is_made_from_one_string() -> None:
    """A DataLoader worker makes an exception anew from its text."""
    error = bnguard.StatsChangedError("text")
    assert str(error) == "text"
    assert error.changes == ()
    assert isinstance(error, bnguard.BNGuardError)
    assert isinstance(error, RuntimeError)


def test_error_of_a_data_parallel_like_copy_is_not_told_twice() -> None:
    """An error rebuilt from its text, with more around it, counts as the one that was raised."""
    net = deep_net(1)
    with pytest.raises(bnguard.StatsChangedError, match=r"^Caught StatsChangedError in replica 0"), bnguard.frozen(net):
        try:
            net(images())
        except bnguard.StatsChangedError as error:
            raise bnguard.StatsChangedError(f"Caught StatsChangedError in replica 0\n{error}") from None
