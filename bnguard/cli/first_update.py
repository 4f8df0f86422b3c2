"""Say, in a process whose parent is watched, that it updates running statistics. See Note [Child processes]."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from bnguard.layers.kinds import StatsLayer
from bnguard.recording.layer_listener import LayerListener, SeenLayer
from bnguard.torch_internals import global_hook
from bnguard.torch_internals.callsite import call_site


def tell_updates(path: str) -> None:
    """Writes a line with the line of the user's code into a file at the first update of this process."""
    global_hook.listen(_FirstUpdate(path))


class _FirstUpdate(LayerListener[SeenLayer]):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def _met(self, model: nn.Module, layers: list[StatsLayer]) -> None:
        for layer in layers:
            self._add(SeenLayer(layer), layer)

    def _updates(self, log: SeenLayer, module: nn.Module, args: tuple[Any, ...], output: Any, call: Any) -> None:
        if getattr(module, "momentum", None) == 0:
            return  # moves nothing but the counter
        global_hook.unlisten(self)
        with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{call_site()}\n")
