"""Running statistics that a watch sees nothing of: the report says that they are there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard

ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class PerStep(nn.Module):
    """Statistics for each inner step, as parameters that nothing trains."""

    def __init__(self, *, trained: bool = False) -> None:
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(2, 4), requires_grad=trained)
        self.running_var = nn.Parameter(torch.ones(2, 4), requires_grad=trained)

    def forward(self, rows: Tensor) -> Tensor:
        return F.batch_norm(rows, self.running_mean[0].detach(), self.running_var[0].detach(), training=True)


class Learner(nn.Module):
    """Statistics in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.vars_bn = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in torch.ones(2, 4)])

    def forward(self, rows: Tensor) -> Tensor:
        return F.batch_norm(rows, self.vars_bn[0], self.vars_bn[1], training=self.training)


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass with a forward of its own: its statistics are buffers."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.batch_norm(rows, self.running_mean, self.running_var, training=True)


def report(model: nn.Module) -> str:
    """The report of one forward."""
    with bnguard.watch() as record:
        model(ROWS)
    return record.report()


def test_statistics_that_are_parameters_are_named() -> None:
    """That there is no layer with running statistics would be untrue."""
    assert report(nn.Sequential(nn.Linear(4, 4), PerStep())).splitlines() == [
        "no finding; running statistics that are no buffers cannot be watched",
        "",
        "Not watched: running_mean and running_var of 1 (PerStep). Register them with register_buffer().",
    ]


def test_statistics_that_are_passed_on_are_mentioned() -> None:
    """Without a telling name it is the call that shows that there are some."""
    lines = report(Learner()).splitlines()
    assert lines[0] == "no finding; no layer with running statistics was seen in Learner"
    assert lines[2] == "Learner called F.batch_norm(): statistics that are passed to it are not watched."


def test_they_are_named_beside_layers_that_are_watched() -> None:
    """Each once, however often it runs."""
    net = nn.Sequential(nn.BatchNorm1d(4), PerStep())
    with bnguard.watch(net) as record:
        for _ in range(3):
            net(ROWS)
    assert "3 updates of 1 layer" in record.report()
    assert record.report().count("running_mean and running_var of 1 (PerStep)") == 1


def test_a_module_is_named_once_by_its_name_in_the_whole() -> None:
    """A constructor may run the parts before the model that contains them."""
    part = PerStep()
    with bnguard.watch() as record:
        part(ROWS)
        nn.Sequential(nn.Linear(4, 4), part)(ROWS)
    assert record.report().splitlines()[2].startswith("Not watched: running_mean and running_var of 1 (PerStep). ")


@pytest.mark.parametrize(
    "model",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), OwnBatchNorm(4), OwnBatchNorm(4).eval()],
    ids=["plain", "without statistics", "own forward", "own forward in eval mode"],
)
def test_nothing_is_said_about_ordinary_layers(model: nn.Module) -> None:
    """Their statistics are buffers, or there are none."""
    assert "F.batch_norm" not in report(model)
    assert "Not watched" not in report(model)


def test_nothing_is_said_about_what_is_trained() -> None:
    """A parameter with a gradient is no statistic, whatever its name."""
    assert "Not watched" not in report(PerStep(trained=True))
