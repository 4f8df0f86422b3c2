"""torchvision: every model it lists, with losses where its detectors compute them in train mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from tests.zoo.case import Case, Inputs, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """All of ``torchvision.models.list_models()``."""
    for name in torchvision.models.list_models():
        options: dict[str, Any] = {"weights_backbone": None} if _has_backbone(name) else {}
        if any(word in name for word in ("rcnn", "retinanet", "fcos")):
            options.update(min_size=64, max_size=64, trainable_backbone_layers=6 if "mobilenet" in name else 5)
        yield Case(name, partial(torchvision.models.get_model, name, weights=None, **options), partial(_inputs, name))


def _has_backbone(name: str) -> bool:
    return any(word in name for word in ("rcnn", "retinanet", "fcos", "ssd", "keypoint", "deeplab", "fcn_", "lraspp"))


def _inputs(name: str, model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    if any(word in name for word in ("rcnn", "retinanet", "fcos", "ssd")):
        yield lambda: _detection(name)
    elif name.startswith("raft"):
        yield lambda: call(torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), num_flow_updates=2)
    elif any(word in name for word in ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        for frames, size in ((8, 32), (16, 64), (16, 112), (16, 224)):
            yield lambda frames=frames, size=size: call(torch.randn(2, 3, frames, size, size))
    else:
        for size in (64, 96, 128, 224, 299):
            yield lambda size=size: call(torch.randn(2, 3, size, size))


def _detection(name: str) -> Inputs:
    size = 64
    pictures = [torch.rand(3, size, size) for _ in range(2)]
    targets = []
    for _ in pictures:
        target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
        if "mask" in name:
            target["masks"] = torch.ones(1, size, size, dtype=torch.uint8)
        if "keypoint" in name:
            target["keypoints"] = torch.tensor([[[10.0, 10.0, 1.0]] * 17])
        targets.append(target)
    return call(pictures, targets)
