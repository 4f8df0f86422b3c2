"""torch's own forwards are known by their syntax trees."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from bnguard.torch_internals import known_forwards
from bnguard.torch_internals.known_forwards import digest_of

SOURCE = '''
    def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
        """Scales the input."""
        # without a copy
        factor: float = scale
        if input is None:
            raise ValueError(f"expected {factor!r:>{4}}, got none")
        return input * factor
'''


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('        """Scales the input."""\n', ""),
        ('"""Scales the input."""', '"""Scales\n        it."""\n        "or so"'),
        ("        # without a copy\n", "\n\n"),
        (" -> Tensor", ""),
        ("input: Tensor, scale: float = 2.0", "input, scale=2.0"),
        ("factor: float = scale", 'factor: "torch.float" = (scale)  # a number'),
        ('f"expected {factor!r:>{4}}, got none"', "f'expected '\n                f'{factor!r:>{4}}, got none'"),
    ],
)
def test_digest_ignores_what_has_no_effect(before: str, after: str) -> None:
    """Docstrings, comments, annotations, quotes and layout."""
    assert before in SOURCE
    assert digest_of(SOURCE.replace(before, after)) == digest_of(SOURCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("= 2.0", "= 2"),
        ("input * factor", "factor * input"),
        ("input * factor", "input"),
        ("input * factor", ""),
        ("input * factor", "None"),
        ("input is None", "input is not None"),
        ("!r", "!s"),
        ("{4}", "{5}"),
        ("got none", "got nothing"),
        ("def forward(self, ", "def forward(self, /, "),
        ("scale: float", "*, scale: float"),
        ("def forward", "async def forward"),
        ("    def forward", "    @wrapped\n    def forward"),
    ],
)
def test_digest_depends_on_everything_else(before: str, after: str) -> None:
    """Whatever could change what the function does."""
    assert before in SOURCE
    assert digest_of(SOURCE.replace(before, after)) != digest_of(SOURCE)


def test_digest_is_that_of_every_python() -> None:
    """The list holds for each version, although ``ast.dump`` and the fields of nodes do not stay."""
    assert digest_of(SOURCE) == "0dbbec7681a2ba3d"


@pytest.mark.parametrize(
    "function",
    [
        nn.BatchNorm2d.forward,
        nn.SyncBatchNorm.forward,
        nn.InstanceNorm2d.forward,
        nn.InstanceNorm2d._apply_instance_norm,
    ],
    ids=lambda function: function.__qualname__,
)
def test_installed_torch_is_known(function: Any) -> None:
    """The torch that the suite runs with is one that has been read."""
    assert known_forwards.is_known(function)


def test_other_functions_are_unknown() -> None:
    """One of torch's that nobody has read, one without source, and what is no function."""
    assert not known_forwards.is_known(nn.GroupNorm.forward)
    assert not known_forwards.is_known(len)
    assert not known_forwards.is_known(int)


def test_source_that_cannot_be_parsed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file has changed since it was imported, the lines may be those of something else."""

    def forward() -> None: ...

    monkeypatch.setattr(inspect, "getsource", lambda thing: "    )]\n")
    assert not known_forwards.is_known(forward)
