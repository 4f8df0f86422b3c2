"""A user's suite, as type checkers see the fixture, the markers and the assertion; nothing here runs."""

# pyright: basic, reportUnnecessaryTypeIgnoreComment=error

from typing import assert_type

import pytest
import torch
from torch import nn

import bnguard
from bnguard.testing import BNFrozen, assert_stats_unchanged


@pytest.fixture
def model() -> nn.Module:
    """A net."""
    return nn.Sequential(nn.BatchNorm1d(3))


def test_fixture(model: nn.Module, bn_frozen: BNFrozen) -> None:
    """Each option of ``frozen``, and what the fixture returns."""
    guard = bn_frozen(model, "restore", include=[nn.BatchNorm1d, "0"], exclude=None, affine=True, buffers="all")
    assert_type(guard, bnguard.frozen)
    with bn_frozen(model, updates=1) as inner:
        assert_type(inner.changes, tuple[bnguard.StatsChange, ...])
    bn_frozen(model, use_running_stats=True).check()


def test_fixture_refuses_what_frozen_does(model: nn.Module, bn_frozen: BNFrozen) -> None:
    """Unneeded comments are an error of the checkers, so each of these is one."""
    bn_frozen(model, "restor")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bn_frozen(model, update=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bn_frozen(model, include=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.bn_frozen(updates=1)
def test_assertion(model: nn.Module) -> None:
    """It returns what the function returns."""
    assert_type(assert_stats_unchanged(model, lambda: torch.ones(2)), torch.Tensor)
