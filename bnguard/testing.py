"""For test suites: an assertion, the type of the fixture, and Hypothesis strategies for layers and nets.

The strategies need the extra ``testing`` (``pip install 'bnguard[testing]'``). The fixture and the markers for pytest
need no import: the plugin provides them.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bnguard.guard import messages
from bnguard.guard.coverage import refuse_unreadable
from bnguard.guard.frozen import frozen
from bnguard.guard.hold import copies_outside_modes
from bnguard.guard.options import OnChange
from bnguard.layers.bits import same_bits
from bnguard.layers.drift import eps_of, largest_mean_shift
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.select import Selector
from bnguard.layers.tree import find_layers
from bnguard.records import StatsChange
from bnguard.words import layer_text

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["BNFrozen", "assert_stats_unchanged", "batches", "bn_layers", "bn_nets"]

T = TypeVar("T")

_MOMENTA: Final = (0.1, None, 0.0, 0.5, 1.0)
_DTYPES: Final = (torch.float32, torch.float64)


class BNFrozen(Protocol):
    """The type of the fixture ``bn_frozen``, for annotations in a test suite.

    ::

        def test_validation(model: nn.Module, bn_frozen: BNFrozen) -> None:
            bn_frozen(model, include="backbone")
            validate(model)
    """

    def __call__(
        self,
        model: nn.Module,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = ...,
        affine: bool = ...,
        updates: int = ...,
        include: Selector | Iterable[Selector] | None = ...,
        exclude: Selector | Iterable[Selector] | None = ...,
        buffers: str | Iterable[str] | None = ...,
    ) -> frozen:
        """Guards ``model`` to the end of the test, or of a ``with`` block. See ``bnguard.frozen`` for the options."""


def assert_stats_unchanged(model: nn.Module, fn: Callable[[], T]) -> T:
    """Runs ``fn()`` and asserts that no running statistic of ``model`` has other bits afterwards.

    Compares without a guard: a change is kept. NaN equals itself, and -0.0 is not 0.0.

    Args:
        model: The model, or one layer.
        fn: What to run, without arguments: ``lambda: model(images)``.

    Returns:
        What ``fn`` returns.

    Raises:
        AssertionError: Statistics changed, or were removed; names the layers, and the shifts of their means.
        TypeError: ``model`` is not a module; ``fn`` cannot be called, or returns a coroutine, which has not run.
        ValueError: The model has no layer with running statistics, or they have no values, so the assertion could not
            fail.
        BNGuardError: A statistic is a quantised, sparse or nested tensor, which cannot be compared bit by bit.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    if not isinstance(model, nn.Module):
        raise TypeError(f"assert_stats_unchanged() takes a torch.nn.Module first, got {type(model).__name__}")
    if not callable(fn):
        raise TypeError(f"assert_stats_unchanged() takes a function second, as lambda: model(images), got {fn!r}")
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with running statistics: the assertion could not fail")
    refuse_unreadable(layers, None)
    before = [_statistics(layer) for layer in layers]
    missing = [layer for layer, then in zip(layers, before, strict=True) if len(then) < len(layer.buffers)]
    if missing:
        first = layer_text(missing[0].names, type(missing[0].module).__name__)
        raise ValueError(f"{first} has statistics without values (lazy, meta or fake): the assertion could not fail")
    result = fn()
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("fn returned a coroutine, which has not run: pass lambda: asyncio.run(fn())")
    changes = [change for layer, then in zip(layers, before, strict=True) if (change := _change(layer, then))]
    if changes:
        raise AssertionError(messages.assertion_text(changes, getattr(fn, "__name__", type(fn).__name__)))
    return result


def _statistics(layer: StatsLayer) -> dict[str, Tensor]:
    buffers = dict(layer.module.named_buffers(recurse=False))
    return copies_outside_modes({name: buffers[name] for name in layer.buffers if name in buffers})


def _change(layer: StatsLayer, before: dict[str, Tensor]) -> StatsChange | None:
    now = _statistics(layer)
    differing = tuple([name for name in before if name not in now or not _is_same(before[name], now[name])])
    if not differing:
        return None
    shift = largest_mean_shift(before, now, eps_of(layer.module))
    return StatsChange(layer.names, type(layer.module).__name__, differing, 0, None, shift)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and same_bits(one, other)


def bn_layers(*, dims: Sequence[int] = (0, 1, 2, 3), channels: tuple[int, int] = (1, 4)) -> SearchStrategy[nn.Module]:
    """Layers in train mode, whose running statistics do not have their initial values.

    Drawn from ``BatchNorm1d`` to ``3d``, ``SyncBatchNorm`` and ``InstanceNorm1d`` to ``3d`` with
    ``track_running_stats=True``, with several momenta (None included), with and without ``affine``, in float32 and
    float64.

    Args:
        dims: Dimensions of the input after ``(N, C)``: 0 is a batch of vectors.
        channels: Fewest and most channels ``C``.

    Raises:
        ImportError: Hypothesis is not installed.
    """
    st = _hypothesis()
    return st.composite(_layer)(tuple(dims), channels, _DTYPES)  # type: ignore[no-any-return]  # imported late


def bn_nets(*, dims: Sequence[int] = (0, 1, 2, 3), dropout: bool = False) -> SearchStrategy[nn.Sequential]:
    """Small nets with one to three layers from ``bn_layers()``, in train mode. ``batches(net)`` has inputs for them.

    Each layer follows a linear layer or a convolution and is followed by a ``Tanh``. Some nets use one of their layers
    twice, under two names.

    Args:
        dims: Dimensions of the input after ``(N, C)``: 0 is a batch of vectors.
        dropout: Whether there is a ``Dropout``, so that outputs are random in train mode.

    Raises:
        ImportError: Hypothesis is not installed.
    """
    st = _hypothesis()
    return st.composite(_net)(tuple(dims), dropout)  # type: ignore[no-any-return]  # imported late


def batches(
    net: nn.Module, *, sizes: tuple[int, int] = (2, 6), shape: Sequence[int] | None = None
) -> SearchStrategy[Tensor]:
    """Batches of normally distributed inputs for a net, on its device and in its dtype: shape ``(N, *shape)``.

    Args:
        net: The net; one from ``bn_nets()``, or any other.
        sizes: Smallest and largest ``N``. One value per channel is too few for train mode.
        shape: The shape of one input, without ``N``. If None, it is that of an input of the first linear layer,
            convolution or BatchNorm in the order of registration, with 8 points along each dimension of a convolution.

    Raises:
        ImportError: Hypothesis is not installed.
        ValueError: ``shape`` is None, and the net has no such layer.
    """
    st = _hypothesis()
    example = _shape_of_input(net) if shape is None else tuple(shape)
    like = next(
        (tensor for tensor in [*net.parameters(), *net.buffers()] if tensor.is_floating_point()), torch.empty(0)
    )

    def batch(size: int, seed: int) -> Tensor:
        values = torch.randn((size, *example), generator=torch.Generator().manual_seed(seed))
        return values.to(like.device, like.dtype)

    return st.builds(batch, st.integers(*sizes), _seeds())  # type: ignore[no-any-return]  # imported late


_SIDE: Final = 8


def _shape_of_input(net: nn.Module) -> tuple[int, ...]:
    for module in net.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        dims = next((number for number in (1, 2, 3) if type(module).__name__.endswith(f"{number}d")), None)
        channels = getattr(module, "in_channels", getattr(module, "num_features", None))
        if isinstance(channels, int) and channels > 0:
            if isinstance(module, nn.BatchNorm1d) or dims is None:
                return (channels,)
            return (channels, *[_SIDE] * dims)
    raise ValueError(
        f"the shape of an input is not known from the layers of this {type(net).__name__}: pass it, as in "
        "batches(net, shape=(3, 32, 32))"
    )


def _layer(draw: DrawFn, dims: tuple[int, ...], channels: tuple[int, int], dtypes: Sequence[torch.dtype]) -> nn.Module:
    st = _hypothesis()
    dim = draw(st.sampled_from(dims))
    # An InstanceNorm would take a batch of vectors for one input.
    family = draw(st.sampled_from(["BatchNorm", "SyncBatchNorm", *(["InstanceNorm"] if dim else [])]))
    name = family if family == "SyncBatchNorm" else f"{family}{max(dim, 1)}d"
    layer: nn.Module = getattr(nn, name)(
        draw(st.integers(*channels)),
        momentum=draw(st.sampled_from(_MOMENTA)),
        affine=draw(st.booleans()),
        track_running_stats=True,
        dtype=draw(st.sampled_from(dtypes)),
    )
    generator = torch.Generator().manual_seed(draw(_seeds()))
    with torch.no_grad():
        for tensor in [*layer.parameters(), layer.get_buffer("running_mean"), layer.get_buffer("running_var")]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.25)
    return layer


def _net(draw: DrawFn, dims: tuple[int, ...], dropout: bool) -> nn.Sequential:
    st = _hypothesis()
    dim = draw(st.sampled_from(dims))
    channels = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(_DTYPES))
    generator = torch.Generator().manual_seed(draw(_seeds()))
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    number = draw(st.integers(1, 3))
    for place in range(number):
        with torch.random.fork_rng(devices=[]):  # initial weights leave the generator of the user alone
            mixer = nn.Linear(channels, channels) if dim == 0 else _CONVS[dim](channels, channels, 1)
        parts[f"mix{place}"] = mixer
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mixer.to(dtype)
        parts[f"norm{place}"] = draw(st.composite(_layer)((dim,), (channels, channels), (dtype,)))
        parts[f"tanh{place}"] = nn.Tanh()
    if dropout:
        parts["dropout"] = nn.Dropout(0.5)
    if draw(st.booleans()):
        parts["again"] = parts[f"norm{draw(st.integers(0, number - 1))}"]
    return nn.Sequential(parts)


_CONVS: Final = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _seeds() -> Any:
    return _hypothesis().integers(0, 2**16)


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError:
        raise ImportError("The strategies of bnguard.testing need hypothesis: pip install 'bnguard[testing]'") from None
    return strategies
