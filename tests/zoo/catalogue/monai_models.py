"""monai: its networks, small, with batch normalisation where they can be asked for it, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from monai.networks import nets
from monai.networks.nets.resnet import ResNetBlock
from torch import nn

from tests.zoo.case import Case, call

__all__ = ["cases"]

_INSTANCE = ("instance", {"affine": True, "track_running_stats": True})


def cases() -> Iterator[Case]:
    """One case for each network, norm and number of dimensions."""
    for dims in (2, 3):
        for norm_name, norm in (("batch", "batch"), ("instance with statistics", _INSTANCE)):
            for name, build, channels, size in _networks(dims, norm):
                label = f"{name} {dims}d, {norm_name}"
                yield Case(label, build, partial(_inputs, channels, dims, size))
    for name, build, shapes in _others():
        yield Case(name, build, partial(_shaped, shapes))


def _networks(dims: int, norm: Any) -> Iterator[tuple[str, Callable[[], nn.Module], int, int]]:
    small: dict[str, Any] = {"channels": (4, 8, 16), "strides": (2, 2), "norm": norm}
    even = {**small, "strides": (2, 2, 2)}
    features = (8, 8, 8, 16, 16, 8)
    yield "UNet", partial(nets.UNet, dims, 1, 2, num_res_units=2, dropout=0.2, **small), 1, 32
    yield "AttentionUnet", partial(nets.AttentionUnet, dims, 1, 2, (4, 8, 16), (2, 2)), 1, 32
    yield "AutoEncoder", partial(nets.AutoEncoder, dims, 1, 2, num_res_units=2, **even), 1, 32
    yield "VarAutoEncoder", partial(nets.VarAutoEncoder, dims, (1, *[32] * dims), 1, 4, num_res_units=1, **even), 1, 32
    yield "BasicUNet", partial(nets.BasicUNet, dims, 1, 2, features, norm=norm, dropout=0.1), 1, 32
    yield "BasicUNetPlusPlus", partial(nets.BasicUNetPlusPlus, dims, 1, 2, features, norm=norm), 1, 32
    yield "DenseNet", partial(nets.DenseNet, dims, 1, 2, 8, 4, (2, 2, 2, 2), norm=norm, dropout_prob=0.1), 1, 64
    strides = (1, 2, 2)
    dyn = partial(
        nets.DynUNet, dims, 1, 2, (3, 3, 3), strides, strides[1:], (8, 16, 32), norm_name=norm, deep_supervision=False
    )
    yield "DynUNet", dyn, 1, 32
    yield "FlexibleUNet", partial(nets.FlexibleUNet, 1, 2, "efficientnet-b0", spatial_dims=dims, norm=norm), 1, 32
    yield "EfficientNetBN", partial(nets.EfficientNetBN, "efficientnet-b0", False, True, dims, 1, 2, norm), 1, 32
    yield "HighResNet", partial(nets.HighResNet, dims, 1, 2, norm), 1, 16
    yield "ResNet", partial(nets.ResNet, ResNetBlock, [1, 1, 1, 1], [8, 8, 16, 16], dims, 1, norm=norm), 1, 32
    yield "SegResNet", partial(nets.SegResNet, dims, 8, 1, 2, 0.2, norm=norm), 1, 32
    yield "SegResNetDS", partial(nets.SegResNetDS, dims, 8, 1, 2, norm=norm), 1, 32
    yield "UNETR", partial(nets.UNETR, 1, 2, 32, 8, 24, 48, 4, norm_name=norm, spatial_dims=dims), 1, 32
    yield (
        "SwinUNETR",
        partial(
            nets.SwinUNETR, 1, 2, depths=(1, 1, 1, 1), window_size=4, feature_size=12, norm_name=norm, spatial_dims=dims
        ),
        1,
        64,
    )
    yield "PatchDiscriminator", partial(nets.PatchDiscriminator, dims, 8, 1, norm=norm), 1, 32
    multi = partial(nets.MultiScalePatchDiscriminator, 2, 2, dims, 8, 1, norm=norm)
    yield "MultiScalePatchDiscriminator", multi, 1, 64
    yield "Discriminator", partial(nets.Discriminator, (1, *[16] * dims), **small), 1, 16
    yield "Critic", partial(nets.Critic, (1, *[16] * dims), **small), 1, 16
    yield "Classifier", partial(nets.Classifier, (1, *[16] * dims), 3, **small), 1, 16
    yield "Regressor", partial(nets.Regressor, (1, *[16] * dims), (1,), **small), 1, 16
    yield "RegUNet", partial(nets.RegUNet, dims, 1, 4, 2), 1, 32
    yield "LocalNet", partial(nets.LocalNet, dims, 1, 4, [0, 1]), 1, 32
    yield "GlobalNet", partial(nets.GlobalNet, [32] * dims, dims, 1, 4, 2), 1, 32
    if norm == "batch":
        yield "VNet", partial(nets.VNet, dims, 1, 2, dropout_dim=dims), 1, 32
        yield "AHNet", partial(nets.AHNet, spatial_dims=dims, in_channels=1, psp_block_num=2), 1, 64
        yield "SEResNet50", partial(nets.SEResNet50, spatial_dims=dims, in_channels=1, num_classes=2), 1, 32
        yield (
            "SENet154",
            partial(nets.SENet154, layers=(1, 1, 1, 1), spatial_dims=dims, in_channels=1, num_classes=2),
            1,
            32,
        )
        yield "VoxelMorphUNet", partial(nets.VoxelMorphUNet, dims, 2, 2, (8, 8, 8, 8), (8, 8)), 2, 32
        yield "MedNeXt", partial(nets.MedNeXt, dims, 8, 1, 2), 1, 32


def _others() -> Iterator[tuple[str, Callable[[], nn.Module], list[tuple[int, ...]]]]:
    for se_block in ("None", "CSE", "SSE", "CSSE"):
        yield (
            f"Quicknat, {se_block}",
            partial(nets.Quicknat, 3, 1, 8, se_block=se_block, drop_out=0.1),
            [(2, 1, 32, 32)],
        )
    yield "DAF3D", partial(nets.DAF3D, 1, 1), [(2, 1, 32, 32, 32)]
    yield "HoVerNet", nets.HoVerNet, [(2, 3, 256, 256)]
    yield "TorchVisionFCModel", partial(nets.TorchVisionFCModel, "resnet18"), [(2, 3, 64, 64), (2, 3, 224, 224)]
    yield "MILModel", partial(nets.MILModel, 2, "att_trans", False, "resnet18"), [(2, 3, 3, 64, 64)]
    yield "FullyConnectedNet", partial(nets.FullyConnectedNet, 4, 2, [8], adn_ordering="NDA"), [(4, 4)]
    vq: dict[str, Any] = {"channels": (8, 8), "num_res_channels": (8, 8), "num_res_layers": 1}
    steps = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    for dims in (2, 3):
        shape = [(2, 1, *[16] * dims)]
        yield f"VQVAE {dims}d", partial(nets.VQVAE, dims, 1, 1, embedding_dim=8, **vq, **steps), shape
        kl = partial(nets.AutoencoderKL, dims, 1, 1, (1, 1), (8, 8), (False, False), norm_num_groups=4)
        yield f"AutoencoderKL {dims}d", kl, shape
    yield "ViT", partial(nets.ViT, 1, (16, 16), (4, 4), 24, 48, 2, 4, spatial_dims=2), [(2, 1, 16, 16)]
    yield (
        "ViTAutoEnc",
        partial(nets.ViTAutoEnc, 1, (16, 16), (4, 4), 1, 8, 24, 48, 2, 4, spatial_dims=2),
        [(2, 1, 16, 16)],
    )


def _inputs(channels: int, dims: int, size: int, model: nn.Module) -> Iterator[Any]:
    for size_ in (size, 64, 128):
        yield lambda size_=size_: call(torch.randn(2, channels, *[size_] * dims))


def _shaped(shapes: list[tuple[int, ...]], model: nn.Module) -> Iterator[Any]:
    for shape in shapes:
        yield lambda shape=shape: call(torch.randn(shape))
