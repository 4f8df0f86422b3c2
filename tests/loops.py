"""What the tests of other people's training loops share: a tiny task, reads counted, examples run."""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bnguard.layers.usual_copy import UsualTensors
from tests import forks
from tests.nets import warmed

__all__ = [
    "backbone_norms",
    "counted_reads",
    "data",
    "drifted",
    "error_without",
    "examples_of",
    "little_waiting",
    "make_model",
    "quiet_imports",
    "run_code",
]


@pytest.fixture(autouse=True, scope="module")
def little_waiting() -> Iterator[None]:
    """Runs take the time of their work: threads do not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Libraries that are imported in here may warn while they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data(number: int = 48) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)``, and their labels."""
    digits = load_digits()
    return torch.tensor(digits.images[:number], dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target[:number])


def make_model() -> nn.Sequential:
    """A backbone with two BatchNorms, dropout and a head; the same each time."""
    backbone = nn.Sequential(
        OrderedDict(conv1=nn.Conv2d(1, 4, 3), bn1=nn.BatchNorm2d(4), relu=nn.ReLU(), bn2=nn.BatchNorm2d(4))
    )
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(4 * 36, 10))
    return warmed(nn.Sequential(OrderedDict(backbone=backbone, head=head)))


def backbone_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The BatchNorms of ``make_model()``."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def drifted(model: nn.Module) -> bool:
    """Whether a net of ``make_model()`` no longer has its first statistics."""
    return any([not torch.equal(b, a) for a, b in zip(make_model().buffers(), model.buffers(), strict=True)])


class Reads:
    """What waited for the device; ``count`` once the block is over."""

    count = 0


@contextmanager
def counted_reads() -> Iterator[Reads]:
    """Counts ``item()``, ``bool()`` and ``equal()`` in a block, and what bnguard reads past torch."""
    reads, read = Reads(), UsualTensors.read
    past_torch: list[UsualTensors] = []
    with torch.autograd.profiler.profile() as profile, pytest.MonkeyPatch.context() as patch:
        patch.setattr(UsualTensors, "read", lambda tensors: past_torch.append(tensors) or read(tensors))
        yield reads
    read_by_torch = [each.name in ("aten::_local_scalar_dense", "aten::equal") for each in profile.function_events]
    reads.count = sum(read_by_torch) + len(past_torch)


def examples_of(module: ModuleType) -> list[str]:
    """The code blocks of a module's docstring."""
    text = inspect.getdoc(module) or ""
    return [textwrap.dedent(block) for block in re.findall(r"::\n\n((?:    .*\n|\n)+)", text)]


def run_code(code: str, names: dict[str, Any]) -> None:
    """Runs an example among ``names``, and leaves there what it defines."""
    exec(compile(code, "example.py", "exec"), names)


def error_without(package: str, module: str) -> str:
    """The last line of what ``import module`` says where a package is not installed."""
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import bnguard.integrations
import {module}
"""
    return forks.run("-c", code).stderr.splitlines()[-1]
