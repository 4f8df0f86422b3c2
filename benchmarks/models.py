"""The networks that are measured, written out so that nothing but torch is needed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETS", "BatchNormAct2d", "bn_chain", "make_step", "sample"]


class Bottleneck(nn.Module):
    """A residual block of ResNet-50: 1x1, 3x3 and 1x1 convolutions, each with BatchNorm."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50(classes: int = 10) -> nn.Sequential:
    """ResNet-50 (He et al. 2015): 53 BatchNorm layers."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: expand, filter by channel, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        expand = [*_conv_bn(inputs, width, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        filtering = [*_conv_bn(width, width, 3, stride, groups=width), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *filtering, *_conv_bn(width, outputs, 1))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.is_residual else y


def mobilenet_v2(classes: int = 10) -> nn.Sequential:
    """MobileNetV2 (Sandler et al. 2018): 52 BatchNorm layers, between convolutions that cost little."""
    layers: list[nn.Module] = [*_conv_bn(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    inputs = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, depth, stride in table:
        for index in range(depth):
            layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    head = [*_conv_bn(inputs, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(1280, classes))


class DenseLayer(nn.Module):
    """A layer of DenseNet: its output is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def densenet121(classes: int = 10) -> nn.Sequential:
    """DenseNet-121 (Huang et al. 2016): 121 BatchNorm layers."""
    growth, channels = 32, 64
    layers: list[nn.Module] = [*_conv_bn(3, channels, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    for number, depth in enumerate((6, 12, 24, 16)):
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if number < 3:
            transition = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels // 2, 1)]
            layers += [*transition, nn.AvgPool2d(2)]
            channels //= 2
    head = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(channels, classes))


def small_cnn(classes: int = 10) -> nn.Sequential:
    """A plain convolutional net with 17 BatchNorm layers."""
    layers: list[nn.Module] = []
    widths = [3, *[16] * 6, *[32] * 6, *[64] * 5]
    for inputs, outputs in pairwise(widths):
        stride = 2 if outputs > inputs > 3 else 1
        layers += [*_conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def bn_mlp(classes: int = 10) -> nn.Sequential:
    """Three linear layers, two of them with BatchNorm1d: a step so short that every call shows."""
    hidden = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, classes))


def bn_chain(layers: int, channels: int = 256) -> nn.Sequential:
    """Nothing but BatchNorm2d."""
    return nn.Sequential(*[nn.BatchNorm2d(channels) for _ in range(layers)])


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm and ReLU in a layer with a forward of its own, after timm's layer of that name."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 0.0 if self.momentum is None else self.momentum
        mean, var = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps))


# By name: what makes the net, and the shape of a batch.
NETS: Final[dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]]] = {
    "resnet50": (resnet50, (4, 3, 64, 64)),
    "mobilenet_v2": (mobilenet_v2, (4, 3, 64, 64)),
    "densenet121": (densenet121, (4, 3, 64, 64)),
    "small_cnn": (small_cnn, (8, 3, 32, 32)),
    "bn_mlp": (bn_mlp, (32, 32)),
}


def sample(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The net of this name with random weights, a batch for it, and the classes of that batch."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make(), torch.randn(shape), torch.randint(10, shape[:1])


def make_step(forward: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step of ``net``, as ``forward`` runs it, with SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step
