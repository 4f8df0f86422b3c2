"""``recalibrate``: learn the running statistics of a model anew, in one pass over data.

Note [Recalibration]
~~~~~~~~~~~~~~~~~~~~
1. While the pass runs, each selected layer has copies of its buffers for its own (see Note [Swapped statistics]) and is
   in train mode. So its forward is torch's own, normalises with its batch, and writes to the copies. A forward pre-hook
   computes the moments of the input. The statistics themselves are written once, after the last batch.
2. A subclass of BatchNorm with a forward of its own, as timm's BatchNormAct2d, mostly normalises its input as BatchNorm
   does. That is checked: with momentum 1 it writes the statistics of its batch to the copies, and these must be those
   of the input. The answer stays on the device until the pass is over.
3. Whatever else the pass moves is put back: all buffers and modes are saved before it.
4. An open block of ``frozen`` may hold a layer that is left out, which stops its update with an error or hides it. So
   that such a layer may run in train mode, the pass has a block under ``"rollback"`` of its own around it.
5. Ctrl-C: what the pass undoes is registered before it is done, and may be undone twice. See Note [Ctrl-C].
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError, BNGuardWarning
from bnguard.guard.frozen import frozen
from bnguard.guard.hold import cloned
from bnguard.guard.hooks import guard_of
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.pool import RESTORED, LayerPool, name_of, text_of, unknown_text
from bnguard.layers.bits import has_values, is_valueless, put_back, what_is_unreadable, write
from bnguard.layers.kinds import (
    BATCH_NORM,
    FROZEN,
    INSTANCE_NORM,
    OWN_FORWARD,
    SYNC_BATCH_NORM,
    StatsLayer,
    is_batch_norm,
)
from bnguard.layers.moments import Share, summed_over_ranks
from bnguard.layers.select import Selector, as_selectors, select_layers
from bnguard.layers.snapshot import Snapshot
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import find_layers
from bnguard.records import Recalibration
from bnguard.torch_internals.callsite import CALIBRATES, call_site
from bnguard.torch_internals.compile import outside_graphs, refuse_compiled, run_eagerly
from bnguard.torch_internals.distributed import is_distributed, rank_prefix
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.wrappers import ONLY_CALL, WRAPPERS
from bnguard.words import short_repr

TORCHS: Final = (BATCH_NORM, SYNC_BATCH_NORM, INSTANCE_NORM)
_STILL: Final = ("hold", "running")


@outside_graphs
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    reduce: bool = False,
) -> Recalibration:
    """Learns the running statistics anew, in one pass over a loader, from all values that each layer gets.

    ``running_mean`` and ``running_var`` of shape ``(C,)`` become the mean and the unbiased variance of all values that
    the layer gets in the pass, pooled in float64. ``torch.optim.swa_utils.update_bn`` averages the variances of batches
    instead: that leaves out how the means of batches differ, and gives a small last batch the weight of a full one.
    ``num_batches_tracked`` becomes the number of forwards. For an InstanceNorm torch defines mean and variance as means
    over instances, and counts nothing; so does this function.

    During the pass the selected layers normalise with their batch, as in training. All other modules stay in their
    mode: call ``model.eval()`` before to leave dropout out, or ``model.train()`` to have it. Afterwards modes, momentum
    and all other buffers are bit for bit what they were. After an exception, or Ctrl-C, the statistics are, too.

    Selected layers keep their statistics, and are named in the result, if an open block of ``frozen`` holds them, or if
    they never update, as torchvision's FrozenBatchNorm2d. A block under ``"warn"`` or ``"rollback"`` lets statistics
    change: its layers are recalibrated, and at its end reported or rolled back.

    ::

        bnguard.recalibrate(model, loader)
        bnguard.recalibrate(model, loader, forward=lambda model, batch: model(batch["image"].cuda(), batch["length"]))

    Of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` the model inside runs, in eager mode and in
    this process alone. A SyncBatchNorm normalises with the batches of all ranks, as in training.

    For a moment each layer needs a copy of its input in float64. Not covered: a forward that fails and whose error
    ``forward`` catches, as the layers before the failure have pooled the batch; other threads that use the model
    meanwhile.

    Args:
        model: The model, or one layer.
        loader: Yields batches: tensors, lists or tuples whose first element is the input, or dicts of keyword
            arguments. Their tensors are moved to the device of the model's first parameter.
        include: Recalibrate these layers only; as in ``frozen``.
        exclude: Do not recalibrate these layers; as in ``frozen``.
        forward: Called with the model and each batch, as the loader yields it, to run any other kind of batch.
        reduce: Pool the values of all ranks of the default process group. Each rank calls this function with its share
            of the data, which may be empty, and gets the same statistics. Without several ranks this changes nothing.
            If one rank fails, the others wait for it, as in any collective operation.

    Returns:
        Which layers have new statistics and which have not, and the number of batches.

    Raises:
        TypeError: ``model`` is no module, ``loader`` is not iterable or a single batch, ``forward`` is not callable,
            ``reduce`` is no bool, or a batch has another form and there is no ``forward``.
        ValueError: The model has no layer with running statistics, a selector matches none, or the loader is empty.
        BNGuardError: Open blocks hold all selected layers; a layer does not normalise its input as BatchNorm does; its
            statistics have no values yet, or are no ordinary tensors; new statistics would not be finite; no selected
            layer has run; ranks have selected different layers; parts of the model are compiled, and torch is older
            than 2.6.

    Warns:
        BNGuardWarning: Some of the selected layers have not run. They keep their statistics.
    """
    _check_arguments(model, loader, forward, reduce)
    layers, held = _selected(model, as_selectors("include", include), as_selectors("exclude", exclude))
    runs = _without_wrappers(model)
    refuse_compiled(runs)
    step = partial(_call, _device_of(runs, layers[0])) if forward is None else forward
    pools = [LayerPool(layer) for layer in layers]
    undo: list[Callable[[], object]] = []
    try:
        batches = _run(model, runs, loader, step, pools, undo)
    finally:
        try:  # see rule 2 of Note [Ctrl-C]
            _undo_all(undo)
        except BaseException:
            _undo_all(undo)
            raise
    for pool in pools:
        pool.refuse_other_statistics()
    shares = [pool.share for pool in pools]
    if reduce and is_distributed():
        shares, batches = summed_over_ranks(shares, [layer.names[0] for layer in layers], batches)
    if not batches:
        raise ValueError("the loader is empty: it has yielded no batch. The statistics are unchanged")
    learned = [(layer, share) for layer, share in zip(layers, shares, strict=True) if share.moments.count]
    unused = [layer for layer, share in zip(layers, shares, strict=True) if not share.moments.count]
    if not learned:
        raise BNGuardError(f"{text_of(unused)} did not run in {_batches_text(batches)}. The statistics are unchanged")
    _write([(layer, _new_statistics(layer, share)) for layer, share in learned], batches)
    if unused:
        text = f"{rank_prefix()}{text_of(unused)} did not run in {_batches_text(batches)}. The statistics are unchanged"
        warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
    return Recalibration(_names([layer for layer, _ in learned]), _names(held), _names(unused), batches)


def _check_arguments(model: Any, loader: Any, forward: Any, reduce: Any) -> None:
    if not isinstance(model, nn.Module):
        is_swapped = isinstance(loader, nn.Module)
        hint = "; the model comes first, unlike in update_bn()" if is_swapped else ""
        raise TypeError(f"recalibrate() takes a torch.nn.Module, got {type(model).__name__}{hint}")
    is_one_batch = isinstance(loader, (Tensor, Mapping, str))
    if is_one_batch or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        hint = "; put a single batch in a list" if is_one_batch else ""
        raise TypeError(f"loader must yield batches, as a DataLoader does, got {type(loader).__name__}{hint}")
    if forward is not None and not callable(forward):
        raise TypeError(
            f"forward must be callable, as in forward=lambda model, batch: model(batch), got {short_repr(forward)}"
        )
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be True or False, got {short_repr(reduce)}")


def _selected(
    model: nn.Module, include: tuple[Selector, ...], exclude: tuple[Selector, ...]
) -> tuple[list[StatsLayer], list[StatsLayer]]:
    """The layers to recalibrate, and those that are selected and never update or are held by an open block."""
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"recalibrate() found no layer with running statistics in {type(model).__name__}")
    selected = select_layers(model, layers, include, exclude)
    held: list[StatsLayer] = []
    left: list[StatsLayer] = []
    for layer in selected:
        (held if layer.kind is FROZEN or _is_held(layer.module) else left).append(layer)
    if not left:
        raise BNGuardError(
            f"{text_of(held)} cannot be recalibrated: an open block of frozen() holds the statistics, or the layer "
            "never updates.\nCall recalibrate() outside of the block, or open the block with exclude="
        )
    for layer in left:
        _refuse_unknown(layer)
    return left, held


CALIBRATES.add(inspect.unwrap(recalibrate).__code__)  # unwrapped: not the code of the decorator's wrapper


def _is_held(module: nn.Module) -> bool:
    """Whether an open block keeps updates of a layer from happening, whether or not it allows some."""
    guard = guard_of(module)
    policies = [] if guard is None else [entry.policy for entry in guard.ruling.entries]
    return any(
        [
            (policy.stops or policy.holds) and not (policy.only_in_backward or policy.only_without_grad)
            for policy in policies
        ]
    )


def _refuse_unknown(layer: StatsLayer) -> None:
    """Refuses a layer of which it is not known what its statistics are, or whose statistics cannot be written."""
    statistics = own_tensors(layer.module, "_buffers")
    pair = [statistics.get(name) for name in ("running_mean", "running_var") if name in layer.buffers]
    is_like_torchs = layer.kind in TORCHS or (layer.kind is OWN_FORWARD and is_batch_norm(layer.module))
    if not is_like_torchs or len(pair) < 2:
        raise BNGuardError(unknown_text(layer))
    for tensor in pair:
        if is_valueless(tensor):
            what = "have no values yet, as it is lazy or on the meta device: run a batch through the model first"
        elif not has_values(tensor):
            what = f"are in {what_is_unreadable(tensor)}"
        else:
            continue
        raise BNGuardError(f"{text_of([layer])}: the running statistics {what}, or use exclude={name_of(layer)!r}")


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The model in wrappers that change nothing about what one process computes, such as DDP."""
    inner: Any = model
    while isinstance(inner, nn.Module) and type(inner).__name__ in ONLY_CALL:
        model, inner = inner, getattr(inner, WRAPPERS[type(inner).__name__][-1], None)
    return inner if isinstance(inner, nn.Module) else model


def _device_of(model: nn.Module, layer: StatsLayer) -> torch.device | None:
    """Where the model takes its input; None if that is not known."""
    tensor = next(model.parameters(), own_tensors(layer.module, "_buffers")["running_mean"])
    return None if tensor is None or tensor.is_meta else tensor.device


def _call(device: torch.device | None, model: nn.Module, batch: Any) -> None:
    """Runs a batch of one of the usual forms."""
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        model(_moved(batch, device))
    elif isinstance(batch, Mapping):
        model(**{key: _moved(value, device) for key, value in batch.items()})
    else:
        raise TypeError(
            f"the input in a batch must be a tensor or a dict, got {type(batch).__name__}: say how to run a batch, as "
            f"in forward=lambda model, batch: model(batch.x). {RESTORED}"
        )


def _moved(value: Any, device: torch.device | None) -> Any:
    return value if device is None or not isinstance(value, Tensor) else value.to(device)


def _run(
    model: nn.Module,
    runs: nn.Module,
    loader: Iterable[Any],
    step: Callable[[nn.Module, Any], object],
    pools: Sequence[LayerPool],
    undo: list[Callable[[], object]],
) -> int:
    """Runs all batches; how many there were. ``undo`` receives what puts the model back, in the order of doing."""
    modules = list(model.modules())
    undo.append(partial(_put_modes_back, [(module, module.training) for module in modules]))
    undo.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    undo.append(_buffers_of(modules).restore)
    beside = _guarded_beside(model, pools)
    if beside:
        settings = Settings("rollback", include=(beside,), frontend=Frontend(has_coverage_warnings=False))
        guard = frozen._with(model, settings)
        undo.append(guard.stop)
        guard.start()
    for pool in pools:
        undo.append(pool.stop)
        pool.start()
    torch.set_grad_enabled(False)
    batches = 0
    with run_eagerly():
        for batch in loader:
            step(runs, batch)
            batches += 1
    return batches


def _guarded_beside(model: nn.Module, pools: Sequence[LayerPool]) -> Callable[[str, nn.Module], bool] | None:
    """Selects the layers of rule 4 of Note [Recalibration]; None if there are none."""
    selected = {id(pool.layer.module) for pool in pools}
    found = {
        id(layer.module)
        for layer in find_layers(model)
        if id(layer.module) not in selected
        and (guard := guard_of(layer.module)) is not None
        and guard.ruling.action not in _STILL
    }
    return (lambda _, module: id(module) in found) if found else None


def _undo_all(undo: list[Callable[[], object]]) -> None:
    """Undoes everything, the latest first, and raises the first of what went wrong. May be run again."""
    failure: BaseException | None = None
    while undo:
        try:
            undo[-1]()
            undo.pop()
        except Exception as error:
            undo.pop()
            failure = failure or error
        except BaseException as error:  # KeyboardInterrupt: undone again
            failure = failure or error
    if failure is not None:
        raise failure


def _buffers_of(modules: Sequence[nn.Module]) -> Snapshot:
    """All buffers of modules, and their values."""
    present = [
        (module, tuple([name for name, tensor in own_tensors(module, "_buffers").items() if tensor is not None]))
        for module in modules
    ]
    owners = [(module, names) for module, names in present if names]
    return Snapshot([module for module, _ in owners], [names for _, names in owners])


def _put_modes_back(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        if module.training is not mode:
            module.training = mode


_New = tuple[tuple[Tensor, Tensor], ...]


@outside_modes
def _new_statistics(layer: StatsLayer, share: Share) -> _New:
    """Each statistic with its new value, in the dtype and on the device of the statistic."""
    own = own_tensors(layer.module, "_buffers")
    moments = share.moments
    values = {"running_mean": moments.mean, "running_var": moments.variance}
    if layer.kind is not INSTANCE_NORM:
        values["num_batches_tracked"] = torch.tensor(share.forwards, device="cpu")
    return tuple(
        [
            (tensor, value.to(tensor.device, tensor.dtype))
            for name, value in values.items()
            if (tensor := own.get(name)) is not None
        ]
    )


@outside_modes
def _write(new: Sequence[tuple[StatsLayer, _New]], batches: int) -> None:
    """Writes all of the statistics, or none."""
    broken = [layer for layer, pairs in new if not all([bool(value.isfinite().all()) for _, value in pairs])]
    if broken:
        raise BNGuardError(
            f"{text_of(broken)} would get running statistics that are not finite, from {_batches_text(batches)}: look "
            f"for NaN and infinite values in the data and in the weights. {RESTORED}"
        )
    pairs = [pair for _, pairs in new for pair in pairs]
    before = [(tensor, cloned(tensor), tensor.data_ptr()) for tensor, _ in pairs]
    try:
        for tensor, value in pairs:
            write(tensor, value)
    except BaseException:
        for tensor, value, place in before:
            put_back(tensor, value, place)
        raise


def _names(layers: Sequence[StatsLayer]) -> tuple[str, ...]:
    return tuple([layer.names[0] for layer in layers])


def _batches_text(batches: int) -> str:
    return f"{batches} batch" if batches == 1 else f"{batches} batches"
