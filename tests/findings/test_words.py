"""What findings say: every line that has a part in them, of what a number is a share, and what can be done."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.findings.rules import RULES
from bnguard.records import Finding
from bnguard.report.places import Place, library_line, place_of

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


TRAINER = """
import torch

def fit(net, optimizer, compute_loss=None):
    for _ in range(4):
        optimizer.zero_grad()
        (net(torch.randn(8, 4)).square().mean() if compute_loss is None else compute_loss(net)).backward()
        optimizer.step()

def fit_twice(net, optimizer):
    for _ in range(4):
        optimizer.zero_grad()
        (net(torch.randn(8, 4)).square().mean() + net(torch.randn(8, 4)).mean()).backward()
        optimizer.step()

@torch.no_grad()
def validate(net):
    for _ in range(2):
        net(torch.randn(8, 4))

def update_bn_stats(net):
    validate(net)
"""


def trainer() -> dict[str, Any]:
    """An installed package whose loop calls the model."""
    names: dict[str, Any] = {}
    exec(compile(TRAINER, os.path.join(sysconfig.get_paths()["purelib"], "trainer", "loop.py"), "exec"), names)
    return names


def net_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small net."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return net, torch.optim.SGD(net.parameters(), 0.01)


def test_the_line_of_a_library_stands_beside_the_users() -> None:
    """The user looks at his own call, and at what in the library calls the model."""
    net, optimizer = net_and_optimizer()
    net[1].requires_grad_(False)  # type: ignore[index]
    finding = found(lambda: trainer()["fit"](net, optimizer))["BN001"]
    assert re.fullmatch(
        r"tests/findings/test_words\.py:\d+ in <lambda> \(trainer/loop\.py:7 in fit\)", finding.where or ""
    )
    assert library_line(finding.where) == "trainer/loop.py:7 in fit"
    place = place_of(finding.where)
    assert isinstance(place, Place)
    assert place.file == "tests/findings/test_words.py"


def test_a_step_of_the_users_is_his_line() -> None:
    """A library that calls the user, who calls the model, is not named."""
    net, optimizer = net_and_optimizer()

    def compute_loss(net: nn.Module) -> torch.Tensor:
        loss: torch.Tensor = net(torch.randn(8, 4)).square().mean()
        return loss

    with bnguard.watch() as record:
        trainer()["fit"](net, optimizer, compute_loss)
    assert [(update.where or "").rpartition(":")[2] for update in record.updates] == [f"{STEP_LINE} in compute_loss"]


STEP_LINE = test_a_step_of_the_users_is_his_line.__code__.co_firstlineno + 5


def test_remedies_are_those_of_one_who_cannot_change_the_loop() -> None:
    """``model.eval()`` before a forward that a library makes is no advice."""
    net, optimizer = net_and_optimizer()
    own = found(lambda: validate_by_hand(net))["BN002"]
    assert own.fix.startswith("call model.eval() before it")

    def run() -> None:
        trainer()["fit_twice"](net, optimizer)
        trainer()["validate"](net)

    findings = found(run)
    assert set(findings) == {"BN002", "BN003"}
    for finding in findings.values():
        assert finding.fix.startswith("override the method in which the library ")
        assert finding.fix in finding.verdict


def validate_by_hand(net: nn.Module) -> None:
    """The user's own loop."""
    with torch.no_grad():
        net(torch.randn(8, 4))


def test_a_library_that_learns_the_statistics_anew_is_unaccused() -> None:
    """Its function says so, not the user's that calls it."""
    net, optimizer = net_and_optimizer()

    def main() -> None:
        trainer()["fit"](net, optimizer)
        validate = trainer()["update_bn_stats"]
        validate(net)

    assert "BN002" in found(main)  # the function that calls the model is another one
    code = TRAINER.replace("    validate(net)", "    with torch.no_grad():\n        net(torch.randn(8, 4))")
    names: dict[str, Any] = {}
    exec(compile(code, os.path.join(sysconfig.get_paths()["purelib"], "trainer", "loop.py"), "exec"), names)

    def anew() -> None:
        names["fit"](net, optimizer)
        names["update_bn_stats"](net)

    assert found(anew) == {}


def test_a_flag_for_single_forwards_has_the_remedy_of_single_forwards() -> None:
    """Frozen statistics would be another model: virtual adversarial training normalises with the batch."""
    net, optimizer = net_and_optimizer()

    def run() -> None:
        for _ in range(STEPS):
            net[1].track_running_stats = False  # type: ignore[index]
            distance = net(torch.randn(8, 4)).square().mean()
            net[1].track_running_stats = True  # type: ignore[index]
            optimizer.zero_grad()
            (net(torch.randn(8, 4)).square().mean() + distance).backward()
            optimizer.step()

    finding = found(run)["BN011"]
    assert finding.severity == "note"
    assert "frozen(model, 'restore')" in finding.fix
    assert "frozen(model, 'restore')" in finding.verdict
    assert "use_running_stats" not in finding.fix


def test_instance_norm_with_the_flag_off_has_words_of_its_own() -> None:
    """It goes on updating, in eval mode, too: the words about batches and a freeze are untrue of it."""
    net = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4))
    for layer in net:
        layer.track_running_stats = False
    instance, batch = bnguard.audit(net)
    assert (instance.code, batch.code) == ("BN011", "BN011")
    assert (instance.layers, batch.layers) == (("0",), ("1",))
    assert "updates the statistics, too" in instance.what
    assert "batch" not in instance.fix
    assert batch.what == "1 layer (1) has statistics, and track_running_stats=False"


def break_at(step: int, **options: Any) -> Finding:
    """A run of ten steps with one bad batch, before which another function makes the updates."""
    net, optimizer = net_and_optimizer()

    def warm_up(rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = net(rows).square().mean()
        return loss

    def train(rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = net(rows).square().mean()
        return loss

    with bnguard.watch(net, **options) as record:
        for number in range(10):
            rows = torch.randn(8, 4)
            rows[0, 0] = float("nan") if number == step else 0.0
            (train if number > 2 else warm_up)(rows).backward()
            for parameter in net.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.nan_to_num()
            optimizer.step()
    (finding,) = [one for one in record.findings if one.code == "BN012"]
    return finding


@pytest.mark.parametrize(
    ("every", "step", "span", "functions"),
    [
        (1, 5, (5, 6), ["train"]),
        (4, 5, (4, 8), ["train"]),
        (4, 1, (0, 4), ["warm_up", "train"]),
        (1, 0, (0, 1), ["warm_up"]),
        ("auto", 9, (9, 10), ["train"]),
    ],
)
def test_the_step_and_the_line_that_broke_statistics_are_named(
    every: Any, step: int, span: tuple[int, int], functions: list[str]
) -> None:
    """The measurements before and after are all that is known; several lines are all named."""
    finding = break_at(step, every=every)
    sound, broken = span
    assert f"statistics, which were sound at optimizer step {sound} and broken at step {broken}: " in finding.what
    assert functions_in(finding.what) == functions
    assert functions_in(finding.where or "") == (functions if len(functions) == 1 else [])


@pytest.mark.parametrize("every", [None, 16])
def test_without_a_measurement_broken_statistics_are_those_of_the_end(every: int | None) -> None:
    """Nothing is said that is not known."""
    finding = break_at(5, every=every)
    assert finding.what == "1 layer (1) has NaN, infinite or negative statistics, and had none at the beginning"
    assert finding.where is None


class Task(nn.Module):
    """A model whose step a trainer calls inside of a wrapper, in place of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net, _ = net_and_optimizer()

    def training_step(self) -> torch.Tensor:
        """The user's line."""
        loss: torch.Tensor = self.net(torch.randn(8, 4)).mean()
        return loss


@pytest.mark.parametrize("redirects", [True, False])
def test_a_step_inside_of_a_wrapper_is_the_users_line(redirects: bool) -> None:
    """Lightning's DDP calls training_step() as the forward of the wrapped model; any other forward is the model's."""
    task = Task()

    def forward() -> torch.Tensor:
        return task.training_step()

    if redirects:
        forward.__module__ = "lightning.pytorch.strategies.strategy"
    task.forward = forward  # type: ignore[method-assign]
    with bnguard.watch() as record:
        nn.DataParallel(task, device_ids=[])()
    (update,) = record.updates
    assert functions_in(update.where or "") == ["training_step" if redirects else current_function()]


def current_function() -> str:
    """The name of the test."""
    return test_a_step_inside_of_a_wrapper_is_the_users_line.__name__
