"""What findings say: every line that has a part in them, of what a number is a share, and what can be done."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bnguard
from bnguard.findings.rules import RULES
from bnguard.records import Finding

STEPS = 5


def found(run: Callable[[], object]) -> dict[str, Finding]:
    """The findings of a run, by code."""
    with bnguard.watch() as record:
        run()
    return {finding.code: finding for finding in record.findings}


def functions_in(text: str) -> list[str]:
    """The functions of the lines that a text names, in its order."""
    return re.findall(r"py:\d+ in (\w+)", text)


def gan(critic_steps: int) -> None:
    """Each update from a function of its own."""
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    of_generator, of_critic = (torch.optim.SGD(net.parameters(), 0.01) for net in (generator, critic))

    def real() -> None:
        critic(torch.randn(8, 4) + 1).mean().backward()

    def fake(rows: torch.Tensor) -> None:
        (-critic(rows.detach())).mean().backward()

    def fools(rows: torch.Tensor) -> None:
        critic(rows).mean().backward()

    for _ in range(STEPS):
        for _ in range(critic_steps):
            rows = generator(torch.randn(8, 4))
            of_critic.zero_grad()
            real()
            fake(rows)
            of_critic.step()
        of_generator.zero_grad()
        fools(rows)
        of_generator.step()


def test_all_lines_of_a_gan_are_named() -> None:
    """The critic updates on real and fake images before its step, and once more before that of the generator."""
    finding = found(lambda: gan(1))["BN003"]
    assert finding.severity == "note"
    assert "1 layer (critic: 1) updated up to 3 times for each step of its own optimizer" in finding.what
    assert sorted(functions_in(finding.what)) == ["fake", "fools", "real"]
    assert sorted(functions_in(finding.verdict)) == ["fake", "fools", "real"]
    assert str(finding).splitlines()[2].startswith("  Nothing, if the model is to learn")


def test_several_updates_are_a_share_of_the_runs_steps() -> None:
    """A run of ten steps, in three of which a second forward comes."""

    def run() -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for step in range(10):
            loss = net(torch.randn(8, 4)).square().mean()
            if step < 3:
                loss = loss + net(torch.randn(8, 4) + 3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    what = found(run)["BN003"].what
    assert what.startswith("1 layer (1) updated up to twice before one optimizer step, and several times before 3 of ")
    assert "before 3 of the run's 10 optimizer steps, from tests/findings/test_words.py:" in what


@pytest.mark.parametrize("code", ["BN003", "BN014", "BN016"])
def test_learning_the_statistics_anew_is_named_as_a_remedy(code: str) -> None:
    """In the report, and where the code is explained."""
    rule = RULES[code]
    assert "recalibrate(model, loader)" in rule.fix
    assert any("bnguard.recalibrate(model, loader)" in remedy for remedy in rule.remedies)
