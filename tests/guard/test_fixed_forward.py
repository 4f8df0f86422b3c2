"""Layers whose class has a property in the place of ``forward``: nothing on the layer can take its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, told, values


class ByProperty(nn.BatchNorm1d):
    """Picks its forward by an attribute."""

    scale = 2

    @property
    def forward(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        """The forward of now."""
        return lambda input: nn.BatchNorm1d.forward(self, input) * self.scale


@pytest.fixture
def net() -> nn.Module:
    """With one such layer."""
    torch.manual_seed(0)
    return nn.Sequential(ByProperty(3))


def test_running_statistics_are_refused(net: nn.Module) -> None:
    """It would normalise with the batch: said before anything has run, and nothing is left behind."""
    with pytest.raises(bnguard.BNGuardError, match=r"^0 \(ByProperty\) has a forward that is a property"):
        bnguard.frozen(net, use_running_stats=True).start()
    assert_clean(net)


@pytest.mark.parametrize(("on_change", "said"), [("raise", 1), ("warn", 1), ("restore", 1), ("rollback", 0)])
def test_every_other_policy_keeps_its_word(net: nn.Module, on_change: Any, said: int) -> None:
    """Outputs are those of the unguarded twin, the statistics those that the policy promises."""
    twin, batch = nn.Sequential(ByProperty(3)), torch.randn(4, 3)
    before, expected = values(statistics(net)), twin(batch)
    with told() as heard, bnguard.frozen(net, on_change):
        assert_same_bits(net(batch), expected)
    assert (heard.error is not None) + len(heard.warnings) == said
    assert_same_bits(statistics(net), statistics(twin) if on_change == "warn" else before)
    assert_clean(net)
