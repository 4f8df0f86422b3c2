"""A script as people write them, with a validation that forgets ``eval()``; ``benchmarks.transcript`` runs it."""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn


def conv(channels, width, stride=1):
    """Convolution, BatchNorm, ReLU."""
    layers = {"conv": nn.Conv2d(channels, width, 3, stride, 1, bias=False), "bn": nn.BatchNorm2d(width)}
    return nn.Sequential(OrderedDict(layers, relu=nn.ReLU()))


def make_net():
    """Six convolutions, and a linear layer."""
    return nn.Sequential(
        OrderedDict(
            stem=conv(1, 16), layer1=nn.Sequential(conv(16, 16), conv(16, 16)),
            layer2=nn.Sequential(conv(16, 32, stride=2), conv(32, 32)), layer3=conv(32, 64, stride=2),
            pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(64, 10),
        )
    )  # fmt: skip


def train_epoch(net, optimizer, images, labels):
    """One pass over the training images."""
    net.train()
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def validate(net, images, labels):
    """Accuracy on images that are a little darker than those of the training."""
    hits = [net(batch).argmax(1) == label for batch, label in zip(images.split(64), labels.split(64), strict=True)]
    return torch.cat(hits).float().mean().item()


def main():
    """Trains, and prints the accuracy after each epoch."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(5):
        train_epoch(net, optimizer, images[:1280], labels[:1280])
        print(f"epoch {epoch}: {validate(net, 0.6 * images[1280:], labels[1280:]):.1%}")


if __name__ == "__main__":
    main()
