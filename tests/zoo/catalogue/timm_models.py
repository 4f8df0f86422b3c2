"""timm: every architecture it lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
from torch import nn

from tests.zoo.case import Case, Inputs, by_turns, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """All of ``timm.list_models()``."""
    for name in by_turns(timm.list_models(), lambda name: timm.model_entrypoint(name).__module__):
        yield Case(name, partial(timm.create_model, name, pretrained=False), _inputs)


def _inputs(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    config = model.pretrained_cfg
    channels, own = config["input_size"][0], config["input_size"][-1]
    for size in (own,) if config.get("fixed_input_size") else (64, 96, 128, own):
        yield lambda size=size: call(torch.randn(2, channels, size, size))
