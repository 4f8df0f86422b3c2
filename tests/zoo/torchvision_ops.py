"""torchvision without its compiled part, of which there is no build for a torch without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["import_torchvision"]

_libraries: list[torch.library.Library] = []  # a library that nobody holds takes its operators with it


def import_torchvision() -> None:
    """Imports torchvision, with ``nms`` in Python. Before anything else imports it; once is enough."""
    if _libraries:
        return
    library = torch.library.Library("torchvision", "DEF")
    _libraries.append(library)
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")

    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    from torchvision.ops import box_iou

    waiting = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes, boxes) > iou_threshold
    kept = []
    while waiting.numel():
        best = waiting[0]
        kept.append(best)
        waiting = waiting[1:][~overlaps[best, waiting[1:]]]
    return torch.stack(kept) if kept else waiting
