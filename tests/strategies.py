"""Hypothesis strategies for small nets with running statistics, and the profiles that the property tests run under.

Profiles, chosen with the environment variable ``HYPOTHESIS_PROFILE``:

``quick`` (the default)
    Derandomised; 20 programs of the state machine, 20 examples of each property.
``ci`` (where slow tests are selected)
    Derandomised; 200 programs of the state machine, 100 examples of each property.
``long``
    20,000 random programs of the state machine and 5,000 examples of each property::

        HYPOTHESIS_PROFILE=long pytest --timeout 0 tests/guard/test_state_machine.py
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.old_torch import RELEASE

__all__ = [
    "DTYPES",
    "ODD",
    "PROFILE",
    "Bomb",
    "HandmadeNorm",
    "NetSpec",
    "NormSpec",
    "OwnForward",
    "PatchedForward",
    "Seen",
    "batch",
    "differing",
    "eager_switching",
    "machine_settings",
    "nets",
    "norm_layers",
    "odd_batch",
    "property_settings",
    "random_state",
    "same",
    "seeds",
    "set_random_state",
]

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
_IS_LONG = PROFILE == "long"
_COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "report_multiple_bugs": False,
    "derandomize": not _IS_LONG,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
}
_PROPERTIES, _PROGRAMS = {"quick": (20, 20), "ci": (100, 200), "long": (5_000, 20_000)}[PROFILE]
_EXAMPLES = os.environ.get("BNGUARD_EXAMPLES")  # any other number, for a run in between

property_settings = settings(max_examples=int(_EXAMPLES or _PROPERTIES), **_COMMON)
machine_settings = settings(
    max_examples=int(_EXAMPLES or _PROGRAMS),
    stateful_step_count=40 if _IS_LONG else 30,
    # Explaining a failed program costs more than it tells.
    phases=[phase for phase in Phase if phase is not Phase.explain],
    **_COMMON,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MOMENTA = (0.1, None, 0.0, 0.5, 1.0)
KINDS = ("batch", "batch", "batch", "sync", "instance", "own", "handmade", "patched", "untracked", "instance-off")


class OwnForward(_BatchNorm):
    """A subclass of torch's layer with a forward of its own, as timm's ``BatchNormAct2d``."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class HandmadeNorm(nn.Module):
    """No relative of torch's layers: counts, writes and, if ``noise`` is set, draws random numbers by itself."""

    def __init__(self, channels: int, momentum: float | None, *, reassign: bool = False, noise: bool = False) -> None:
        super().__init__()
        self.momentum = 0.3 if momentum is None else momentum
        self.eps = 1e-5
        self.reassign = reassign
        self.noise = noise
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (input.dim() - 2)
        if self.training:
            with torch.no_grad():
                if self.reassign:
                    self.num_batches_tracked = self.num_batches_tracked + 1
                else:
                    self.num_batches_tracked += 1
            dims = [0, *range(2, input.dim())]
            mean, var = input.mean(dims), input.var(dims, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        output = (input - mean.view(shape)) / (var.view(shape) + self.eps).sqrt() * self.weight.view(shape)
        return F.dropout(output, 0.5, self.training) if self.noise else output


class PatchedForward:
    """A forward that somebody put on one instance of a layer, as accelerate does."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, input) * 0.5


class Bomb(nn.Module):
    """Fails in the middle of a forward when armed."""

    armed = False

    def forward(self, input: Tensor) -> Tensor:
        if self.armed:
            raise RuntimeError("boom")
        return input


class Seen:
    """A user's forward hook: what the statistics of its layer look like right after the forward."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.log: list[dict[str, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.log.append({name: b.detach().clone() for name, b in module._buffers.items() if b is not None})


@dataclass(frozen=True, slots=True)
class NormSpec:
    """One layer that normalises."""

    kind: str
    momentum: float | None
    affine: bool
    extra: bool  # HandmadeNorm: counts in a new tensor each time

    def build(self, dim: int, channels: int, noise: bool) -> nn.Module:
        """The layer, for inputs with ``dim`` dimensions after the channels."""
        number = max(dim, 1)
        if self.kind == "handmade":
            return HandmadeNorm(channels, self.momentum, reassign=self.extra, noise=noise)
        options: dict[str, Any] = {"momentum": self.momentum, "affine": self.affine}
        if self.kind == "own":
            return OwnForward(channels, **options)
        if self.kind == "sync":
            return nn.SyncBatchNorm(channels, **options)
        if self.kind.startswith("instance"):
            layer = getattr(nn, f"InstanceNorm{number}d")(channels, track_running_stats=True, **options)
            layer.track_running_stats = self.kind == "instance"
            return layer
        layer = getattr(nn, f"BatchNorm{number}d")(channels, track_running_stats=self.kind != "untracked", **options)
        if self.kind == "patched":
            layer.forward = PatchedForward(layer)
        return layer


@dataclass(frozen=True, slots=True)
class NetSpec:
    """A small net: what ``build`` makes of it is a function of the spec alone.

    Attributes:
        stages: Two lists of normalising layers, ``stem`` and ``body``.
        dim: Dimensions after the channels: 0 to 3.
        channels: Channels everywhere.
        dtype: Of parameters, statistics and inputs.
        mixed: Whether the normalising layers stay in float32, as under autocast.
        linear: Whether something with weights stands before each layer.
        noise: Whether the net draws random numbers in train mode.
        shared: Whether the last layer of ``body`` is used a second time, under a second name.
        channels_last: Memory format of parameters and inputs, where ``dim`` is 2.
        seed: Of the initial values.
    """

    stages: tuple[tuple[NormSpec, ...], tuple[NormSpec, ...]]
    dim: int
    channels: int
    dtype: torch.dtype
    mixed: bool
    linear: bool
    noise: bool
    shared: bool
    channels_last: bool
    seed: int

    def build(self, device: str = "cpu") -> nn.Sequential:
        """Makes the net, with statistics that are not the initial ones."""
        torch.manual_seed(self.seed)
        parts = OrderedDict()
        for name, norms in zip(("stem", "body"), self.stages, strict=True):
            layers: list[nn.Module] = []
            for norm in norms:
                layers += self._mixer()
                layers.append(norm.build(self.dim, self.channels, self.noise))
                layers.append(nn.Tanh())
            layers.append(Bomb())
            if self.noise:
                layers.append(nn.Dropout(0.5))
            if self.shared and norms and name == "body":
                layers.append(layers[layers.index(next(layer for layer in layers if isinstance(layer, nn.Tanh))) - 1])
            parts[name] = nn.Sequential(*layers)
        net = nn.Sequential(parts)
        with torch.no_grad():
            for tensor in [*net.parameters(), *net.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape) + 0.25)
        net.to(dtype=self.dtype, device=device)
        if self.mixed:
            for layer in norm_layers(net):
                layer.float()
        return net.to(memory_format=torch.channels_last) if self.channels_last and self.dim == 2 else net

    def _mixer(self) -> list[nn.Module]:
        if not self.linear:
            return []
        if self.dim == 0:
            return [nn.Linear(self.channels, self.channels)]
        return [getattr(nn, f"Conv{self.dim}d")(self.channels, self.channels, 1)]

    def shape(self, size: int, side: int = 2) -> list[int]:
        """The shape of a batch of ``size`` with ``side`` points along each dimension."""
        return [size, self.channels] + [side] * self.dim


def batch(spec: NetSpec, size: int, seed: int, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A batch of ``size`` inputs for the nets of ``spec``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(spec.shape(size), generator=generator) * 2 + 1
    values = values.to(dtype=dtype or spec.dtype, device=device)
    return values.contiguous(memory_format=torch.channels_last) if spec.channels_last and spec.dim == 2 else values


_MIXING = ("batch", "sync", "instance", "own", "patched")
ODD = ("one", "channels", "rank", "dtype", "empty")


def odd_batch(spec: NetSpec, kind: str, seed: int, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A batch that nets mostly turn down, ``kind`` says why."""
    dtype = dtype or spec.dtype
    shape = {
        "one": spec.shape(1, 1),
        "channels": [2, spec.channels + 1, *spec.shape(2)[2:]],
        "rank": [*spec.shape(2), 2],
        "empty": spec.shape(0),
        "dtype": spec.shape(2),
    }[kind]
    if kind == "dtype":
        dtype = torch.float32 if dtype == torch.float64 else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def norm_layers(net: nn.Module) -> list[nn.Module]:
    """The layers of a built net that own running statistics, each once."""
    return [module for module in net.modules() if module._buffers.get("running_mean") is not None]


def seeds() -> st.SearchStrategy[int]:
    """Seeds for values that Hypothesis need not shrink."""
    return st.integers(0, 2**16)


@st.composite
def _norms(draw: st.DrawFn, kinds: tuple[str, ...]) -> NormSpec:
    return NormSpec(
        draw(st.sampled_from(kinds)), draw(st.sampled_from(MOMENTA)), draw(st.booleans()), draw(st.booleans())
    )


@st.composite
def nets(
    draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, *, noise: bool | None = None, linear: bool | None = None
) -> NetSpec:
    """Specs of small nets with one to three normalising layers, at least one of them with running statistics."""
    dim = draw(st.integers(0, 3))
    if dim == 0:  # an InstanceNorm takes (N, C) for one unbatched input
        kinds = tuple(kind for kind in kinds if not kind.startswith("instance"))
    if RELEASE < (2, 11):  # torch rounds its statistics in eval mode: an unguarded twin moves where a guard holds
        kinds = tuple(kind for kind in kinds if kind != "instance")
    tracked = tuple(kind for kind in kinds if kind != "untracked")
    first = draw(_norms(tracked))
    stem = draw(st.lists(_norms(kinds), max_size=1))
    body = draw(st.lists(_norms(kinds), max_size=1))
    dtype = draw(st.sampled_from(DTYPES))
    can_mix = dtype == torch.bfloat16 and all(norm.kind in _MIXING for norm in (first, *stem, *body))
    return NetSpec(
        ((first, *stem), tuple(body)),
        dim,
        draw(st.integers(1, 4)),
        dtype,
        can_mix and draw(st.booleans()),
        draw(st.booleans()) if linear is None else linear,
        draw(st.booleans()) if noise is None else noise,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(seeds()),
    )


def random_state() -> list[Tensor]:
    """The state of the random number generators, those of GPUs included."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Takes the generators back to ``state``."""
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; the tests' own, so that the package is not its judge."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pair = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in (one, other)]
    if one.is_complex():
        pair = [torch.view_as_real(tensor).reshape(-1) for tensor in pair]
    return torch.equal(pair[0].view(torch.uint8), pair[1].view(torch.uint8))


def differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """The keys under which two state dicts differ."""
    assert list(one) == list(other)
    return (key for key in one if not same(one[key], other[key]))


@contextmanager
def eager_switching() -> Iterator[None]:
    """Lets threads alternate at every chance."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
