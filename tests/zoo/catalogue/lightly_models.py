"""lightly: heads, residual networks, batch normalisations, prototypes, memory banks, losses that keep state."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightly import loss
from lightly.loss.wmse_loss import Whitening2d
from lightly.models import ResNetGenerator
from lightly.models.batchnorm import SplitBatchNorm
from lightly.models.modules import heads
from lightly.models.modules.center import Center
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.modules.nn_memory_bank import NNMemoryBankModule
from torch import nn

from tests.zoo.case import Case, call, images

__all__ = ["cases"]

_SIZES = {"input_dim": 32, "hidden_dim": 48, "output_dim": 16, "bottleneck_dim": 24}


def cases() -> Iterator[Case]:
    """Each head plain and with each of its switches on."""
    for name, cls in vars(heads).items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or name in ("ProjectionHead", "SMoGPrototypes"):
            continue
        parameters = inspect.signature(cls).parameters
        sizes = {key: size for key, size in _SIZES.items() if key in parameters}
        for options in ({}, *({key: True} for key in ("batch_norm", "use_bias", "weight_norm") if key in parameters)):
            label = "".join(f", {key}" for key in options)
            yield _vectors(f"{name}{label}", partial(cls, **sizes, **options))
    yield _vectors("SMoGPrototypes", partial(_smog_prototypes))
    for name in ("resnet-9", "resnet-18", "resnet-34", "resnet-50", "resnet-101", "resnet-152"):
        for splits in (0, 2):
            build = partial(ResNetGenerator, name, width=0.25, num_splits=splits)
            yield Case(f"{name}, {splits} splits", build, images(32, batch=4))
    yield Case("SplitBatchNorm", lambda: nn.Sequential(SplitBatchNorm(3, 2)), images(8, batch=4))
    yield Case(
        "SplitBatchNorm, no affine", lambda: nn.Sequential(SplitBatchNorm(3, 2, affine=False)), images(8, batch=4)
    )
    yield Case("Whitening2d", lambda: nn.Sequential(Whitening2d(4)), lambda _: [lambda: call(torch.randn(32, 4))])
    yield Case("WMSELoss", lambda: loss.WMSELoss(embedding_dim=4, w_size=16), _vectors_of(32, 4))
    yield Case("Center", lambda: Center((1, 8)), lambda _: [], "has an update() and no forward")
    yield Case("MemoryBankModule", lambda: MemoryBankModule((16, 8)), _updating(8))
    yield Case("NNMemoryBankModule", lambda: NNMemoryBankModule((16, 8)), _updating(8))
    yield Case("NTXentLoss, memory bank", lambda: loss.NTXentLoss(memory_bank_size=(16, 8)), _pair(8, 8))
    yield Case("DINOLoss", lambda: loss.DINOLoss(output_dim=8), _views(8))
    yield Case("IBOTPatchLoss", lambda: loss.IBOTPatchLoss(output_dim=8), _patches(8))
    yield Case("TiCoLoss", loss.TiCoLoss, _pair(8, 8))
    yield Case("BarlowTwinsLoss", loss.BarlowTwinsLoss, _pair(8, 8))


def _vectors(name: str, build: Any) -> Case:
    return Case(name, build, lambda _: [lambda size=size: call(torch.randn(4, size)) for size in (32, 16)])


def _smog_prototypes() -> nn.Module:
    return heads.SMoGPrototypes(torch.rand(6, 16), 0.99)


def _vectors_of(batch: int, size: int) -> Any:
    return lambda _: [lambda: call(torch.randn(batch, size))]


def _pair(batch: int, size: int) -> Any:
    return lambda _: [lambda: call(torch.randn(batch, size), torch.randn(batch, size))]


def _updating(size: int) -> Any:
    return lambda _: [lambda: call(torch.randn(4, size), update=True), lambda: call(torch.randn(4, size))]


def _views(size: int) -> Any:
    makes = [torch.randn, lambda *s: [torch.randn(*s[1:]) for _ in range(s[0])]]
    return lambda _: (
        [lambda make=make: call(make(2, 4, size), make(3, 4, size), epoch=1) for make in makes]
        + [lambda make=make: call(make(2, 4, size), make(3, 4, size)) for make in makes]
    )


def _patches(size: int) -> Any:
    def make() -> Any:
        mask = torch.zeros(2, 4, 4, dtype=torch.bool)
        mask[:, :2] = True
        return call(torch.randn(16, size), torch.randn(16, size), mask)

    return lambda _: [make]
