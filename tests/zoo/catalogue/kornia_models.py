"""kornia: its networks that can be made without downloaded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from kornia import feature
from kornia.feature.defmo import DeFMO
from kornia.feature.disk._unets import Unet
from kornia.feature.loftr.backbone.resnet_fpn import ResNetFPN_8_2, ResNetFPN_16_4
from kornia.feature.sold2.backbones import SOLD2Net
from kornia.feature.sold2.sold2_detector import DetectorCfg, dataclass_to_dict
from kornia.feature.xfeat import XFeatModel
from kornia.models.dexined import DexiNed
from kornia.models.efficient_vit import backbone as efficient_vit
from kornia.models.rt_detr import RTDETR, RTDETRConfig
from kornia.models.rt_detr.architecture.hgnetv2 import PPHGNetV2
from kornia.models.rt_detr.architecture.resnet_d import ResNetD
from kornia.models.tiny_vit import TinyViT
from kornia.models.vit import VisionTransformer
from kornia.models.vit_mobile import MobileViT
from kornia.models.yunet.model import YuNet
from torch import nn

from tests.zoo.case import Case, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """Descriptors on patches, detectors and backbones on images."""
    for cls in (feature.HardNet, feature.HardNet8, feature.HyNet, feature.SOSNet, feature.TFeat):
        yield _case(cls.__name__, partial(cls, pretrained=False), (4, 1, 32, 32))
    yield _case("OriNet", partial(feature.OriNet, pretrained=False), (4, 1, 32, 32))
    yield _case("KeyNet", partial(feature.KeyNet, pretrained=False), (2, 1, 32, 32))
    yield _case("LAFAffNetShapeEstimator", _affnet, (4, 1, 32, 32))
    yield _case("DeFMO", partial(DeFMO, pretrained=False), (2, 6, 32, 32), (2, 6, 64, 64))
    yield _case("DexiNed", partial(DexiNed, pretrained=False), (2, 3, 64, 64))
    yield _case("XFeatModel", XFeatModel, (2, 3, 64, 64), (2, 1, 64, 64))
    yield _case("DISK Unet", partial(Unet, in_features=3, up=[16, 16, 8], down=[8, 16, 16, 16]), (2, 3, 64, 64))
    yield _case("DISK", feature.DISK, (2, 3, 64, 64))
    loftr = {"initial_dim": 8, "block_dims": [8, 12, 16], "pe": False}
    yield _case("LoFTR ResNetFPN_8_2", partial(ResNetFPN_8_2, loftr), (2, 1, 64, 64))
    yield _case(
        "LoFTR ResNetFPN_16_4", partial(ResNetFPN_16_4, {**loftr, "block_dims": [8, 12, 16, 20]}), (2, 1, 64, 64)
    )
    yield _case("LoFTR", partial(feature.LoFTR, pretrained=None), None)
    yield _case("SOLD2Net", partial(SOLD2Net, dataclass_to_dict(DetectorCfg())), (2, 1, 64, 64), (2, 1, 128, 128))
    yield _case("ALIKED", partial(feature.ALIKED, "aliked-t16"), (1, 3, 64, 64))
    yield _case("DeDoDe", partial(feature.DeDoDe, "L", "B", torch.float32), (1, 3, 56, 56))
    for name in ("b0", "b1", "b2", "b3", "l0", "l1"):
        yield _case(f"EfficientViT {name}", getattr(efficient_vit, f"efficientvit_backbone_{name}"), (2, 3, 64, 64))
    for size in (18, 34, 50, 101):
        yield _case(f"ResNetD {size}", partial(ResNetD.from_config, size), (2, 3, 64, 64))
    for variant in ("L", "X"):
        yield _case(f"PPHGNetV2 {variant}", partial(PPHGNetV2.from_config, variant), (2, 3, 64, 64))
    for name in ("resnet18d", "resnet50d", "hgnetv2_l"):
        config = RTDETRConfig(name, 8, head_num_queries=20)
        yield _case(f"RTDETR {name}", partial(RTDETR.from_config, config), (2, 3, 64, 64), (2, 3, 128, 128))
    for variant in ("5m", "11m", "21m"):
        yield _case(f"TinyViT {variant}", partial(TinyViT.from_config, variant), (2, 3, 224, 224))
    for mode in ("xxs", "xs", "s"):
        yield _case(f"MobileViT {mode}", partial(MobileViT, mode), (2, 3, 256, 256))
    yield _case("VisionTransformer", partial(VisionTransformer, image_size=32, patch_size=8, depth=2), (2, 3, 32, 32))
    yield _case("YuNet", partial(YuNet, "train", pretrained=False), (2, 3, 64, 64))


def _affnet() -> nn.Module:
    return feature.LAFAffNetShapeEstimator(pretrained=False).features


def _case(name: str, build: Callable[[], nn.Module], *shapes: tuple[int, ...] | None) -> Case:
    def inputs(model: nn.Module) -> Iterator[Any]:
        for shape in shapes:
            if shape is None:
                yield lambda: call({"image0": torch.rand(1, 1, 64, 64), "image1": torch.rand(1, 1, 64, 64)})
            else:
                yield lambda shape=shape: call(torch.rand(shape))

    return Case(name, build, inputs)
