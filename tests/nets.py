"""Small nets with running statistics, as after some training: each function builds the same net every time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "NORMS",
    "FrozenNorm",
    "MovingNorm",
    "OwnForward",
    "PlainSubclass",
    "ReassigningNorm",
    "ScaledNorm",
    "SharedNet",
    "TwoPasses",
    "batch_norms",
    "conv_net",
    "deep_net",
    "images",
    "mlp",
    "rows",
    "warmed",
]


class OwnForward(nn.Module):
    """A layer of its own making: owns running statistics, and moves them in its own way."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (input.dim() - 2))
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(input, [0, *range(2, input.dim())], correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), 0.3)
                self.running_var.lerp_(var.to(self.running_var.dtype), 0.3)
        output = (input - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
        return output * self.weight.view(shape) + self.bias.view(shape)


class ReassigningNorm(OwnForward):
    """Counts in a new tensor each time, as inplace_abn's ABN."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        return super().forward(input)


class MovingNorm(nn.Module):
    """Names its statistics as other libraries do."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.moving_mean.mul_(0.5).add_(input.mean((0, 2, 3)), alpha=0.5)
                self.moving_variance.mul_(0.5).add_(input.var((0, 2, 3)), alpha=0.5)
        return input - self.moving_mean[:, None, None]


class FrozenNorm(nn.Module):
    """Owns statistics and never moves them, as torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, input: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return input * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class FrozenNormOfTorchvision(FrozenNorm):
    """The forward that torchvision's FrozenBatchNorm2d has, which bnguard knows."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class NearlyFrozenNorm(FrozenNormOfTorchvision):
    """The same forward, but for one line: in the end it learns."""

    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        self.forwards += 1
        if self.forwards > 3:
            self.running_mean += 1
        return x * scale + bias


class PlainSubclass(nn.BatchNorm2d):
    """A subclass without a forward of its own."""


class ScaledNorm(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu() * 1.5


class SharedNet(nn.Module):
    """One layer under two names, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 1)
        self.again = self.norm

    def forward(self, input: Tensor) -> Tensor:
        return self.again(self.second(self.norm(self.first(input)).relu()))


class TwoPasses(nn.Module):
    """Runs its one layer as often in a forward as it is told."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times = times
        self.bn = nn.BatchNorm2d(2)

    def forward(self, input: Tensor) -> Tensor:
        for _ in range(self.times):
            input = self.bn(input)
        return input


def warmed(module: Any) -> Any:
    """``module`` with parameters and statistics as after some training, the same ones each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if nn.parameter.is_lazy(tensor):
                continue
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.25)
            else:
                tensor.fill_(3)
    return module


def conv_net() -> nn.Sequential:
    """Two stages of Conv, BatchNorm and an activation, with dropout and a linear head; takes ``images()``."""
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 3, 3), bn=nn.BatchNorm2d(3), act=nn.ReLU()))
    body = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4, momentum=None), act=nn.Tanh()))
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 9, 2))
    return warmed(nn.Sequential(OrderedDict(stem=stem, body=body, head=head)))


def mlp() -> nn.Sequential:
    """Linear layers with BatchNorm1d; takes ``rows()``."""
    return warmed(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2), nn.BatchNorm1d(2)))


def deep_net(layers: int) -> nn.Sequential:
    """Nothing but ``layers`` BatchNorms; takes ``images()``."""
    return nn.Sequential(*[nn.BatchNorm2d(2) for _ in range(layers)])


def images(number: int = 4, seed: int = 1) -> Tensor:
    """A batch of images with two channels, 5 x 5."""
    return torch.randn(number, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def rows(number: int = 4, seed: int = 1) -> Tensor:
    """A batch of rows with four features."""
    return torch.randn(number, 4, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """The layers of torch's own BatchNorm family in ``net``, each once."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# By name, with two channels: what the tests of every kind of layer run through.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(2),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(2),
    "InstanceNorm": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "own-forward": lambda: OwnForward(2),
    "subclass": lambda: ScaledNorm(2),
}
