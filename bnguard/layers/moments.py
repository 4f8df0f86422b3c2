"""Mean and variance of all values that a layer has normalised, pooled over batches and ranks in float64.

Note [Pooled variance]
~~~~~~~~~~~~~~~~~~~~~~
The variance of all values is not the mean of the batches' variances: each of these is about the mean of its own batch,
and batches differ in size. So of each batch the count, the mean and the sum of squared deviations from that mean are
kept, and pairs of them are merged. Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance"
(1983).

An InstanceNorm is another matter. Its ``running_var`` is by definition the mean of the variances within instances, each
of which weighs the same. Source: ``instance_norm`` in ``aten/src/ATen/native/Normalization.cpp``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bnguard.errors import BNGuardError


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the values of each channel, ``C`` of them.

    Attributes:
        count: How many values there are; of an InstanceNorm, how many instances.
        mean: Shape ``(C,)``, float64.
        spread: Shape ``(C,)``, float64: the sum of squared deviations from ``mean``; of an InstanceNorm, the sum of the
            unbiased variances of the instances.
        is_per_instance: Whether these are those of an InstanceNorm.
    """

    count: int
    mean: Tensor
    spread: Tensor
    is_per_instance: bool

    @property
    def variance(self) -> Tensor:
        """Shape ``(C,)``: what torch keeps as ``running_var``, which is the unbiased variance."""
        return self.spread / (self.count if self.is_per_instance else self.count - 1)

    def merged(self, other: Moments) -> Moments:
        """Those of both together. Does not wait for the device."""
        if not other.count:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        spread = self.spread + other.spread
        if not self.is_per_instance:
            spread = spread + delta.square() * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), spread, self.is_per_instance)


def no_moments(channels: int, device: torch.device, *, is_per_instance: bool) -> Moments:
    """Those of no values at all."""
    device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    zeros = torch.zeros(channels, dtype=torch.float64, device=device)
    return Moments(0, zeros, zeros, is_per_instance)


def moments_of(input: Tensor, *, is_per_instance: bool) -> Moments:
    """Computes the moments of one input of shape ``(N, C, ...)``. Does not wait for the device."""
    if not input.numel():
        return no_moments(input.shape[1], input.device, is_per_instance=is_per_instance)
    values = input.detach()
    values = (values.cpu() if values.device.type == "mps" else values).double()
    within = list(range(2, values.dim()))
    if is_per_instance:
        variances, means = torch.var_mean(values, within, correction=1)
        return Moments(values.shape[0], means.mean(0), variances.sum(0), is_per_instance)
    count = values.numel() // values.shape[1]
    variance, mean = torch.var_mean(values, [0, *within], correction=0)
    return Moments(count, mean, variance * count, is_per_instance)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank knows of one layer.

    Attributes:
        moments: Its moments, with a count of 0 if the layer has not run.
        forwards: How many forwards it has run.
    """

    moments: Moments
    forwards: int


def summed_over_ranks(shares: Sequence[Share], names: Sequence[str], batches: int) -> tuple[list[Share], int]:
    """Sums what all ranks of the default process group know. Every rank has to call this.

    The mean over all ranks is computed first, and then the deviations from it.

    Args:
        shares: What this rank knows of each layer.
        names: The names of the layers.
        batches: How many batches this rank has had.

    Returns:
        What all ranks together know of each layer, and how many batches there were.

    Raises:
        BNGuardError: The ranks have selected different layers.
    """
    own = [share.moments for share in shares]
    sizes = [moments.mean.numel() for moments in own]
    device = own[0].mean.device
    _check_same_layers(zlib.crc32(repr([*zip(names, sizes, strict=True)]).encode()), device)
    heads = torch.tensor([[share.moments.count, share.forwards] for share in shares], dtype=torch.float64)
    heads = torch.cat([heads.reshape(-1), heads.new_tensor([batches])]).to(device)
    sums = torch.cat([heads, *[(moments.mean * moments.count).to(device) for moments in own]])
    dist.all_reduce(sums)
    numbers, *totals = sums.split([len(heads), *sizes])
    *pairs, all_batches = [int(number) for number in numbers.tolist()]
    counts, forwards = pairs[::2], pairs[1::2]
    means = [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]
    spreads = []
    for moments, mean in zip(own, means, strict=True):
        between = 0 if moments.is_per_instance else moments.count * (moments.mean.to(device) - mean).square()
        spreads.append(moments.spread.to(device) + between)
    spread = torch.cat(spreads)
    dist.all_reduce(spread)
    return [
        Share(Moments(count, mean, part, moments.is_per_instance), number)
        for count, mean, part, moments, number in zip(counts, means, spread.split(sizes), own, forwards, strict=True)
    ], all_batches


def _check_same_layers(digest: int, device: torch.device) -> None:
    """Compares a number among all ranks: ``all_reduce`` of tensors of other sizes would hang or mix layers up."""
    largest = torch.tensor([digest, -digest], dtype=torch.float64).to(device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    highest, lowest = largest.tolist()
    if highest != -lowest:
        raise BNGuardError(
            "the ranks have selected different layers to recalibrate: give each rank the same model, include= and "
            "exclude=, and the same open blocks of frozen(). The original statistics have been restored"
        )
