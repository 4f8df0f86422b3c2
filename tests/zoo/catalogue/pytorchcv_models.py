"""pytorchcv: every model of its provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from pytorchcv.model_provider import _models, get_model
from torch import nn

from tests.zoo.case import Case, Inputs, by_turns, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """All of ``pytorchcv.model_provider``."""
    for name in by_turns(_models, lambda name: _models[name].__module__):
        yield Case(name, partial(get_model, name, pretrained=False), _inputs)


def _inputs(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    own = getattr(model, "in_size", None) or (224, 224)
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if isinstance(first, nn.Conv1d):
        length = torch.tensor([128, 128])
        yield lambda: call(torch.randn(2, first.in_channels, 128), length)
        yield lambda: call(torch.randn(2, first.in_channels, 128))
        return
    channels = getattr(model, "in_channels", 3)
    for height, width in ((64, 64), (96, 96), (128, 128), own):
        yield lambda height=height, width=width: call(torch.randn(2, channels, height, width))
    for pair in (2, 3):
        yield lambda pair=pair: call(*(torch.randn(2, channels, 64, 64) for _ in range(pair)))
