"""e3nn: its BatchNorm, and the networks built on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from e3nn.nn import BatchNorm
from torch import nn

from tests.zoo.case import Case, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """Its BatchNorm in each of its variants."""
    options = {
        "plain": {},
        "no affine": {"affine": False},
        "max": {"reduce": "max"},
        "instance": {"instance": True},
        "norm": {"normalization": "norm"},
        "component": {"normalization": "component"},
        "no bias": {"include_bias": False},
        "momentum 1": {"momentum": 1.0},
    }
    for name, option in options.items():
        for irreps in ("4x0e", "3x0e + 2x0o + 2x1o + 1x2e"):
            yield Case(
                f"BatchNorm {name}, {irreps}",
                lambda irreps=irreps, option=option: nn.Sequential(BatchNorm(irreps, **option)),
                lambda model: [lambda: call(torch.randn(6, model[0].irreps.dim))],
            )
