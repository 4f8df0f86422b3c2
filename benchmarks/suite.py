"""What ``--bn-frozen=warn`` costs a suite whose tests train models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from benchmarks.race import Contender, race
from benchmarks.results import Benchmark, Row, compared
from benchmarks.startup import run_python

__all__ = ["BENCHMARKS", "SUITE", "TESTS"]

TESTS: Final = 40
# Each builds a small net and trains it, as tests of models do: about 50 ms.
SUITE: Final = f"""\
import pytest
import torch
from torch import nn


def make_net(width):
    layers = []
    for inputs in (3, width, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize("seed", range({TESTS}))
def test_net_trains(seed):
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    net = make_net(16 + 8 * (seed % 3))
    images, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    net.eval()
    with torch.no_grad():
        assert net(images).shape == (16, 10)
"""


def suite() -> list[Row]:
    """The whole command, the start of pytest and torch with it."""
    plain, warned = "pytest", "pytest -p bnguard.pytest_plugin --bn-frozen=warn"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nets.py").write_text(SUITE, encoding="utf-8")

        def run(command: str) -> None:
            # Without the plugins of others, whose start varies by more than ours takes.
            run_python("-m", *command.split(), "-q", cwd=folder, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

        contenders = [Contender(plain, lambda: run(plain)), Contender(warned, lambda: run(warned))]
        result = race(contenders, rounds=6, steps=1)
    return compared("suite/warn", f"A suite of {TESTS} tests that train nets", result, plain, {warned: 1.03})


BENCHMARKS: Final[dict[str, Benchmark]] = {"suite/warn": suite}
