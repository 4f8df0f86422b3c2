"""Drift: the measures against torch's own distributions, and the channel that moved most."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from bnguard.layers.drift import drift_between, sample_of, series_of
from tests.strategies import property_settings

numbers = st.floats(-100, 100)
variances = st.floats(1e-3, 100)


def statistics(mean, var):
    """The statistics of a layer."""
    return {
        "running_mean": torch.tensor(mean),
        "running_var": torch.tensor(var),
        "num_batches_tracked": torch.tensor(3),
    }


@property_settings
@given(channels=st.lists(st.tuples(numbers, numbers, variances, variances), min_size=1, max_size=5))
def test_measures_are_those_of_the_definitions(channels):
    """Shift, ratio and divergence agree with the definitions, eps included; divergence with torch.distributions."""
    old_mean, new_mean, old_var, new_var = (
        torch.tensor(values, dtype=torch.float64) for values in zip(*channels, strict=True)
    )
    eps = 1e-5
    drift = drift_between(
        ("a",),
        "BatchNorm1d",
        {"running_mean": old_mean, "running_var": old_var},
        {"running_mean": new_mean, "running_var": new_var},
        eps,
    )
    old, new = Normal(old_mean, (old_var + eps).sqrt()), Normal(new_mean, (new_var + eps).sqrt())
    torch.testing.assert_close(drift.divergence, kl_divergence(new, old), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(drift.mean_shift, (new_mean - old_mean).abs() / old.stddev)
    torch.testing.assert_close(drift.variance_ratio, new.variance / old.variance)
    assert drift.divergence[drift.worst] == drift.divergence.max()


def test_worst_channel_is_named():
    """In words: the channel, how far, how much wider, and the divergence."""
    drift = drift_between(
        ("stem.bn", "alias"), "BatchNorm2d", statistics([0.0, 1.0], [1.0, 4.0]), statistics([0.0, 5.0], [1.0, 8.0]), 0.0
    )
    assert drift.worst == 1
    assert drift.has_moved
    nats = (math.log(4 / 8) + (8 + 16) / 4 - 1) / 2
    assert (
        str(drift)
        == f"stem.bn = alias (BatchNorm2d): channel 1 moved by 2 standard deviations, variance x 2, {nats:.3g} nats"
    )


def test_nan_is_the_worst():
    """A channel that is broken is the one to look at."""
    drift = drift_between(
        ("",), "BatchNorm2d", statistics([0.0] * 3, [1.0] * 3), statistics([9.0, math.nan, 0.0], [1.0] * 3), 0.0
    )
    assert drift.worst == 1
    assert drift.has_moved
    assert str(drift).startswith("(root) (BatchNorm2d): channel 1 moved by nan")


def test_nothing_moved():
    """Equal statistics have no drift."""
    same = statistics([1.0, 2.0], [3.0, 4.0])
    drift = drift_between(("",), "BatchNorm2d", same, same, 1e-5)
    assert not drift.has_moved
    assert drift.mean_shift.tolist() == [0, 0]
    assert drift.variance_ratio.tolist() == [1, 1]


@pytest.mark.parametrize(
    "after", [{}, {"running_mean": torch.ones(2)}, {"running_mean": torch.ones(3), "running_var": torch.ones(3)}]
)
def test_no_drift_where_it_cannot_be_told(after):
    """Statistics that are gone, or have other shapes, give none; neither does a layer without a mean and a variance."""
    assert drift_between(("",), "X", statistics([1.0, 2.0], [3.0, 4.0]), after, 1e-5) is None
    assert drift_between(("",), "X", {"num_batches_tracked": torch.tensor(1)}, {}, 1e-5) is None


def test_series_has_no_value_where_drift_cannot_be_told():
    """A layer without a variance, or whose shape has changed, is NaN; the others are as measured one by one."""
    before = statistics([0.0, 1.0], [1.0, 4.0])
    after = statistics([3.0, 1.0], [1.0, 2.0])
    without = {"running_mean": torch.zeros(2)}
    layers = [(0, before, after, 0.1), (1, without, without, 0.1), (2, before, statistics([1.0], [1.0]), 0.1)]
    series = series_of([sample_of(5, layers), sample_of(6, layers[1:])], ["a", "b", "c"])
    drift = drift_between(("a",), "BatchNorm1d", before, after, 0.1)
    assert series.steps == (5, 6)
    assert series.layers == ("a", "b", "c")
    for table, expected in ((series.mean_shift, drift.mean_shift), (series.divergence, drift.divergence)):
        torch.testing.assert_close(table[0, 0], expected.max())
        assert table.isnan().sum() == 5
