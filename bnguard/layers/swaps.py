"""Swap a layer's statistics for others during a forward.

Note [Swapped statistics]
~~~~~~~~~~~~~~~~~~~~~~~~~
The statistics of a layer with a forward of its own are kept fixed by swapping entries of its ``_buffers`` during that
forward. The layer itself runs, so whatever else the layer, its hooks or its children store on it is kept. Meanwhile
``module._buffers`` does not contain the layer's own statistics: the ``Swap`` does. So code that compares, restores or
copies statistics uses ``own_tensors`` and ``put_tensor``, never ``_buffers``; or it reads ``own_tables`` while it holds
``swap_lock``.

Overlapping forwards of one layer, in several threads, share one swap; the last forward to end restores the originals. A
user of a swap is an entry in a tuple. Removing it twice does nothing, so an interrupted end can be run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Final, Literal

from torch import Tensor, nn
from torch.jit import ScriptModule as _ScriptModule

from bnguard.layers.kinds import StatsLayer
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock

NO_FLAGS: Final[Mapping[str, bool]] = {}
Table = Literal["_buffers", "_parameters"]
_GETTERS: Final = {table: attrgetter(table) for table in ("_buffers", "_parameters")}


class Swap:
    """The own statistics and flags of a layer while forwards run with other ones.

    Attributes:
        module: The layer.
        originals: The layer's own statistics, by buffer name.
        flags: The layer's own flags, such as ``training``, as far as others are in their place.
        users: The forwards that run with other statistics.
    """

    __slots__ = ("flags", "module", "originals", "users")

    def __init__(self, module: nn.Module, originals: dict[str, Tensor | None]) -> None:
        self.module = module
        self.originals = originals
        self.flags: dict[str, Any] = {}
        self.users: tuple[object, ...] = ()


swaps: Final[dict[int, Swap]] = {}  # by id of the layer
swap_lock: Final = RLock()  # no swap begins or ends while a thread holds it
renew_after_fork(swap_lock)


@contextmanager
def swapped(
    module: nn.Module, statistics: Mapping[str, Tensor], flags: Mapping[str, bool] = NO_FLAGS
) -> Iterator[None]:
    """Runs a block with ``statistics`` and ``flags`` in place of the layer's own."""
    user = object()
    try:
        begin_swap(module, statistics, flags, user)
        yield
    finally:
        try:
            end_swap(module, user)
        except BaseException:  # for example KeyboardInterrupt
            end_swap(module, user)
            raise


def begin_swap(module: nn.Module, statistics: Mapping[str, Tensor], flags: Mapping[str, object], user: object) -> None:
    """Puts ``statistics`` and ``flags`` in place of the layer's own, until ``user`` ends the swap."""
    with swap_lock:
        swap = swaps.get(id(module))
        if swap is not None:
            swap.users = (*swap.users, user)
            return
        swap = Swap(module, {name: module._buffers[name] for name in statistics})
        swap.users = (user,)
        swaps[id(module)] = swap
        attributes = module.__dict__
        swap.flags = {name: attributes[name] for name in flags if name in attributes}
        attributes.update(flags)
        module._buffers.update(statistics)


def end_swap(module: nn.Module, user: object) -> None:
    """Ends the swap of ``user``; the last one restores the layer's own. May be done any number of times."""
    with swap_lock:
        swap = swaps.get(id(module))
        if swap is None or user not in swap.users:
            return
        if swap.users == (user,):
            module._buffers.update(swap.originals)
            module.__dict__.update(swap.flags)
            del swaps[id(module)]
        swap.users = tuple([other for other in swap.users if other is not user])


def is_swapped(module: nn.Module) -> bool:
    """Whether a forward currently runs with other statistics in place of the module's own, or in another mode."""
    return id(module) in swaps


def own_mode(module: nn.Module) -> bool:
    """The module's own ``training`` flag."""
    swap = swaps.get(id(module))
    mode: bool = module.training if swap is None else swap.flags.get("training", module.training)
    return mode


def own_tensors(module: nn.Module, table: Table) -> dict[str, Tensor | None]:
    """The module's own current buffers or parameters by name, even while statistics are swapped."""
    with swap_lock:
        return dict(_own(module, table))


def own_values(layers: Sequence[StatsLayer]) -> list[tuple[Tensor | None, ...]]:
    """The own statistics of each layer, even while they are swapped; None for a missing one."""
    with swap_lock:
        tables = own_tables([layer.module for layer in layers], "_buffers")
        return [tuple(map(table.get, layer.buffers)) for table, layer in zip(tables, layers, strict=True)]


def own_tables(modules: Sequence[nn.Module], table: Table) -> list[Mapping[str, Tensor | None]]:
    """The own buffers or parameters of each module by name; the caller must hold ``swap_lock`` while reading them."""
    if swaps or any([issubclass(cls, _ScriptModule) for cls in set(map(type, modules))]):
        return [_own(module, table) for module in modules]
    return list(map(_GETTERS[table], modules))


def _own(module: nn.Module, table: Table) -> Mapping[str, Tensor | None]:
    if isinstance(module, _ScriptModule):
        named = module.named_buffers if table == "_buffers" else module.named_parameters
        return dict(named(recurse=False))
    tensors: dict[str, Tensor | None] = module.__dict__[table]
    swap = swaps.get(id(module)) if table == "_buffers" else None
    return tensors if swap is None else {**tensors, **swap.originals}


def put_tensor(module: Any, table: Table, name: str, tensor: Tensor, before: Sequence[str] = ()) -> None:
    """Sets the module's own buffer or parameter ``name``, even while statistics are swapped.

    Args:
        module: The module.
        table: The dictionary that the tensor belongs to.
        name: Its name; any other attribute with this name is removed.
        tensor: The tensor.
        before: Names that come after it in the dictionary, if it has to be inserted.
    """
    if isinstance(module, _ScriptModule):
        setattr(module, name, tensor)
        return
    with swap_lock:
        swap = swaps.get(id(module)) if table == "_buffers" else None
        if swap is not None and name in swap.originals:
            swap.originals[name] = tensor
            return
        own = module.__dict__[table]
        is_missing = name not in own
        for other in (module._buffers, module._parameters, module._modules, module.__dict__):
            if other is not own:
                other.pop(name, None)
        own[name] = tensor
        if is_missing:
            for later in before:
                if later in own:
                    own[later] = own.pop(later)
