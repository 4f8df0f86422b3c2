"""ultralytics: every model file, at its smallest scale."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ultralytics
from torch import nn
from ultralytics.nn import tasks

from tests.zoo.case import Case, images

__all__ = ["cases"]

_MODELS = {
    "classify": tasks.ClassificationModel,
    "depth": tasks.DepthModel,
    "obb": tasks.OBBModel,
    "pose": tasks.PoseModel,
    "segment": tasks.SegmentationModel,
    "semantic": tasks.SemanticSegmentationModel,
}


def cases() -> Iterator[Case]:
    """All files in its ``cfg/models``."""
    for path in sorted(Path(ultralytics.__file__).parent.glob("cfg/models/**/*.yaml")):
        yield Case(path.stem, partial(_build, path), images(64, 128, 224))


def _build(path: Path) -> nn.Module:
    content: dict[str, Any] = tasks.yaml_model_load(path)
    scales = content.get("scales")
    content["scale"] = next(iter(scales)) if scales else ""
    name = path.stem
    if name.startswith("yoloe"):
        cls = tasks.YOLOESegModel if name.endswith("-seg") else tasks.YOLOEModel
    elif "rtdetr" in name:
        cls = tasks.RTDETRDetectionModel
    elif "world" in name:
        cls = tasks.WorldModel
    else:
        cls = _MODELS.get(tasks.guess_model_task(content), tasks.DetectionModel)
    return cls(content, verbose=False)
