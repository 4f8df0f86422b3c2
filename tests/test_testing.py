"""``bnguard.testing``: the assertion, and the strategies for other people's property tests."""

import asyncio
import copy
import inspect
import re

import pytest
import torch
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

import bnguard
from bnguard.testing import BNFrozen, assert_stats_unchanged, batches, bn_layers, bn_nets
from tests import forks
from tests.asserts import WITHOUT_BNGUARD, assert_same_bits, statistics
from tests.nets import conv_net, images
from tests.strategies import HandmadeNorm, property_settings

# The assertion.


def test_assertion_passes_and_returns_the_result():
    """What moves nothing passes, and hands on what the function returned."""
    net = conv_net().eval()
    assert assert_stats_unchanged(net, lambda: net(images()).shape[0]) == len(images())


def test_assertion_names_what_moved():
    """The message names layers, buffers and distances, and the function; what was done stays done."""
    net = conv_net()

    def train():
        net(images())

    twin = copy.deepcopy(net)
    with pytest.raises(AssertionError) as caught:
        assert_stats_unchanged(net, train)
    lines = str(caught.value).splitlines()
    count = len({name.rpartition(".")[0] for name in statistics(net)})
    assert lines[0] == f"running statistics of {count} layer{'s' * (count > 1)} changed in train():"
    assert re.fullmatch(
        r"  \S+ \(BatchNorm2d\): running_mean, running_var and num_batches_tracked; "
        r"mean moved by up to [\d.e+-]+ standard deviations",
        lines[1],
    )
    twin(images())
    assert_same_bits(statistics(net), statistics(twin))
    with pytest.raises(AssertionError, match=r"changed in the function:"):
        assert_stats_unchanged(net, lambda: net(images()))


@pytest.mark.parametrize(
    "write",
    [
        lambda net: net.running_mean.copy_(torch.tensor([-0.0, 0.0])),
        lambda net: net.running_var.data.fill_(float("nan")),
        lambda net: net.num_batches_tracked.add_(1),
        lambda net: net.double(),
        lambda net: setattr(net, "running_mean", None),
    ],
    ids=["negative zero", "nan", "counter", "dtype", "gone"],
)
def test_assertion_sees_bits(write):
    """A sign of zero, a counter, another dtype and a buffer that is gone are changes."""
    net = nn.BatchNorm2d(2)
    with pytest.raises(AssertionError, match=re.escape("(root) (BatchNorm2d): ")):
        assert_stats_unchanged(net, lambda: write(net))


def test_assertion_does_not_mind_equal_bits():
    """NaN is NaN, another object with the same bits is no change, and neither is what is no statistic."""
    net = nn.BatchNorm2d(2)
    net.running_mean.fill_(float("nan"))

    def run():
        net.running_mean = net.running_mean.clone()
        net.weight.data.fill_(3)

    assert_stats_unchanged(net, run)


def test_assertion_knows_layers_of_others():
    """Ownership decides, as everywhere."""
    net = HandmadeNorm(2, 0.1)
    with pytest.raises(AssertionError, match="HandmadeNorm"):
        assert_stats_unchanged(net, lambda: net(torch.ones(3, 2)))


def test_assertion_refuses_what_it_cannot_judge():
    """No module, no function, nothing to compare, or a function that has not run: an error instead of a pass."""
    net = nn.BatchNorm2d(2)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module first, got int"):
        assert_stats_unchanged(3, lambda: None)
    with pytest.raises(TypeError, match=r"takes a function second, as lambda: model\(images\), got None"):
        assert_stats_unchanged(net, None)
    with pytest.raises(ValueError, match="Linear has no layer with running statistics: the assertion could not fail"):
        assert_stats_unchanged(nn.Linear(1, 1), lambda: None)

    async def run():
        net(torch.ones(2, 2, 1, 1))

    with pytest.raises(TypeError, match="fn returned a coroutine, which has not run"):
        assert_stats_unchanged(net, run)
    with pytest.raises(AssertionError, match="changed in the function:"):
        assert_stats_unchanged(net, lambda: asyncio.run(run()))


def test_error_of_the_function_comes_out():
    """The function's own error is the one that a test shows."""
    with pytest.raises(OSError, match="mine"):
        assert_stats_unchanged(nn.BatchNorm2d(2), lambda: (_ for _ in ()).throw(OSError("mine")))


# The strategies.


@property_settings
@given(data=st.data())
def test_identical_outputs_across_repeated_forwards(data):
    """What the README shows: under restore, a train-mode forward can be repeated."""
    net = data.draw(bn_nets())
    batch = data.draw(batches(net))
    with bnguard.frozen(net, "restore"):
        first, second = (assert_stats_unchanged(net, lambda: net(batch)) for _ in range(2))
    assert torch.equal(first, second)


@property_settings
@given(data=st.data())
def test_nets_update_in_train_mode_and_not_in_eval_mode(data):
    """Each net has layers that a forward of its batches moves; without that, properties of them would be empty."""
    net = data.draw(bn_nets())
    batch = data.draw(batches(net))
    assert net.training
    assert_stats_unchanged(net.eval(), lambda: net(batch))
    # An InstanceNorm counts nothing, and without momentum (None is 0 there) it writes the same numbers, mostly.
    assume(not all(isinstance(layer, _InstanceNorm) and not layer.momentum for layer in norms(net)))
    with pytest.raises(AssertionError):
        assert_stats_unchanged(net.train(), lambda: net(batch))


def norms(net):
    """The layers with statistics."""
    return [layer for layer in net.modules() if layer._buffers.get("running_mean") is not None]


@pytest.mark.parametrize(
    "wanted",
    [
        lambda layer: isinstance(layer, nn.BatchNorm1d),
        lambda layer: isinstance(layer, nn.BatchNorm2d),
        lambda layer: isinstance(layer, nn.BatchNorm3d),
        lambda layer: isinstance(layer, nn.SyncBatchNorm),
        lambda layer: isinstance(layer, nn.InstanceNorm1d),
        lambda layer: isinstance(layer, nn.InstanceNorm2d),
        lambda layer: isinstance(layer, nn.InstanceNorm3d),
        lambda layer: layer.momentum is None and not layer.affine,
        lambda layer: layer.running_mean.dtype == torch.float64,
        lambda layer: layer.num_features == 4,
    ],
)
def test_layers_are_of_every_kind(wanted):
    """Each kind that the docstring names is drawn, with statistics that are not the initial ones."""
    layer = find(bn_layers(), wanted, settings=settings(property_settings, max_examples=100, derandomize=True))
    assert layer.training
    assert layer.running_mean.any()
    assert layer.running_var.ne(1).all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda net: len(set(norms(net))) == 3,
        lambda net: hasattr(net, "again"),
        lambda net: any(isinstance(module, nn.Conv3d) for module in net),
        lambda net: any(isinstance(module, nn.Linear) for module in net),
    ],
)
def test_nets_are_of_every_kind(wanted):
    """Each kind of net that the docstring names is drawn."""
    find(bn_nets(), wanted, settings=settings(property_settings, max_examples=100, derandomize=True))


def test_dropout_is_there_if_asked_for():
    """Random outputs are asked for."""
    some = settings(property_settings, max_examples=20)

    @some
    @given(net=bn_nets(dropout=True))
    def with_dropout(net):
        assert any(isinstance(module, nn.Dropout) for module in net)

    @some
    @given(net=bn_nets())
    def without(net):
        assert not any(isinstance(module, nn.Dropout) for module in net)

    with_dropout()
    without()


@settings(property_settings, max_examples=30)
@given(data=st.data())
def test_options_choose(data):
    """Dimensions, channels, sizes and shapes are those asked for."""
    layer = data.draw(bn_layers(dims=[2], channels=(3, 3)))
    assert layer.num_features == 3
    assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d))
    batch = data.draw(batches(nn.Flatten(), sizes=(5, 5), shape=(1, 2, 3)))
    assert batch.shape == (5, 1, 2, 3)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), (7,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 8, 8)),
        (nn.Conv1d(2, 1, 1), (2, 8)),
        (nn.ConvTranspose3d(2, 1, 1), (2, 8, 8, 8)),
        (nn.BatchNorm1d(6), (6,)),
        (nn.SyncBatchNorm(6), (6,)),
        (nn.BatchNorm3d(2), (2, 8, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shape_is_read_off_the_first_layer_that_tells(net, shape):
    """Batches for a net of one's own need no shape, mostly; dtype follows the net."""
    batch = find(batches(net.double()), lambda batch: True)
    assert batch.shape[1:] == shape
    assert batch.dtype == torch.float64
    net(batch)


def test_net_that_does_not_tell_is_refused():
    """Where no layer tells, the error says what to write."""
    with pytest.raises(
        ValueError, match=re.escape("the shape of an input is not known from the layers of this Flatten: pass it")
    ):
        batches(nn.Flatten())


def test_strategies_leave_the_random_state_alone():
    """Drawing a net and a batch moves no generator of the user's."""
    net, state = nn.Linear(2, 2), torch.get_rng_state()
    for strategy in (bn_layers(), bn_nets(dropout=True), batches(net)):
        find(strategy, lambda _: True)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_hypothesis_is_one_sentence():
    """The assertion works without the extra; a strategy says which extra it is."""
    code = WITHOUT_BNGUARD.replace('"bnguard"', '"hypothesis"') + (
        "import torch\nfrom bnguard.testing import assert_stats_unchanged, bn_nets\n"
        "net = torch.nn.BatchNorm1d(2).eval()\nassert_stats_unchanged(net, lambda: net(torch.ones(2, 2)))\nbn_nets()"
    )
    done = forks.run("-c", code)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ImportError: The strategies of bnguard.testing need hypothesis: pip install 'bnguard[testing]'\n"
    )


def test_type_of_the_fixture_has_the_options_of_frozen():
    """For annotations in a suite: as ``frozen``, which checks them. A test reads at its end what a block has found."""
    fixture, guard = (inspect.signature(call).parameters for call in (BNFrozen.__call__, bnguard.frozen.__init__))
    shown = [(name, one.kind, one.annotation) for name, one in fixture.items()]
    assert shown == [(name, one.kind, one.annotation) for name, one in guard.items() if name != "check"]
