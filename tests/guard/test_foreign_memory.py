"""Statistics that are given somebody else's memory through ``.data``: that is never written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, statistics, told, values
from tests.nets import OwnForward, images, warmed

PUTTING_BACK = ["raise", "restore", "rollback"]
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
    "own": OwnForward,
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def pair(norm: str) -> tuple[nn.Module, nn.Module]:
    """A student, and a teacher with other statistics."""
    student, teacher = warmed(NORMS[norm](2)), NORMS[norm](2)
    teacher(images() * 3 + 5)
    return student.eval(), teacher.eval()


def lend(teacher: nn.Module, student: nn.Module) -> None:
    """Gives a student the statistics of a teacher, as memory."""
    for name, tensor in statistics(student).items():
        tensor.data = statistics(teacher)[name].data


@EVERY_NORM
@pytest.mark.parametrize("policy", PUTTING_BACK)
def test_teacher_keeps_its_statistics(policy: str, norm: str) -> None:
    """The student gets its own values back, in memory of its own."""
    student, teacher = pair(norm)
    before, of_teacher = values(statistics(student)), state_of(teacher)
    with told(), bnguard.frozen(student, policy):
        lend(teacher, student)
    assert_same_bits(teacher.state_dict(), of_teacher)
    assert_same_bits(statistics(student), before)
    student.train()(images())
    assert_same_bits(teacher.state_dict(), of_teacher)
    assert_clean(student)


@EVERY_NORM
@pytest.mark.parametrize("policy", ["raise", "restore"])
def test_check_writes_to_nobody_elses_memory(policy: str, norm: str) -> None:
    """Nor does the end of the block after it."""
    student, teacher = pair(norm)
    before, of_teacher = values(statistics(student)), state_of(teacher)
    with told(), bnguard.frozen(student, policy) as guard:
        lend(teacher, student)
        with told():
            guard.check()
        assert_same_bits(statistics(student), before)
        lend(teacher, student)
    assert_same_bits(teacher.state_dict(), of_teacher)
    assert_same_bits(statistics(student), before)


def test_part_of_a_backup_is_left_alone() -> None:
    """Memory of another one may also be a view: one flat backup of a whole net, as sharded optimizers have."""
    net = warmed(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))).eval()
    backup = torch.arange(8.0)
    before = values(statistics(net))
    with told(), bnguard.frozen(net, "restore"):
        for number, layer in enumerate(net):
            layer.running_mean.data = backup[4 * number : 4 * number + 2]
            layer.running_var.data = backup[4 * number + 2 : 4 * number + 4]
    assert_same_bits(backup, torch.arange(8.0))
    assert_same_bits(statistics(net), before)


def test_parameters_that_are_lent_are_left_alone() -> None:
    """``affine=True`` puts weights and biases back, too."""
    student, teacher = nn.BatchNorm2d(2).eval(), nn.BatchNorm2d(2).eval()
    nn.init.normal_(teacher.weight)
    before, of_teacher = state_of(student), state_of(teacher)
    with told(), bnguard.frozen(student, "restore", affine=True):
        student.weight.data = teacher.weight.data
    assert_same_bits(teacher.state_dict(), of_teacher)
    assert_same_bits(student.state_dict(), before)


def test_layer_that_takes_memory_in_its_forward() -> None:
    """Stopped after its forward, it gets its values back; the memory that it took is not written to."""
    lent = torch.full((2,), 7.0)

    class Taking(OwnForward):
        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                self.running_mean.data = lent
            return input

    layer = warmed(Taking(2))
    before = values(statistics(layer))
    with told() as said, bnguard.frozen(layer):
        layer(images())
    assert said.error is not None
    assert_same_bits(lent, torch.full((2,), 7.0))
    assert_same_bits(statistics(layer), before)


def test_own_memory_is_written_in_place() -> None:
    """What has the memory of the beginning keeps it: somebody may hold a view of it."""
    layer = warmed(nn.BatchNorm2d(2)).eval()
    view = layer.running_mean[:1]
    before = view.clone()
    with told(), bnguard.frozen(layer, "restore"):
        layer.running_mean.data.add_(1)
    assert_same_bits(view, before)
