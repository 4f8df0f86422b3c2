"""What a guard puts on a layer, and how it gets off again."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

from torch import nn

from bnguard._affine import unheld

__all__ = ["OWN_ATTRIBUTES", "Equipment"]

# In the layer's __dict__, where they go before the class's own.
OWN_ATTRIBUTES: Final = (
    "forward",
    "__getstate__",
    "__deepcopy__",
    "__prepare_scriptable__",
    "_replicate_for_data_parallel",
)


class Equipment(ABC):
    """A forward pre-hook, which is the object itself, and attributes in the ``__dict__`` of one layer.

    Every undo is known before the thing it undoes, and looks at the layer rather than at a handle: what fails half-way
    is taken off all the same, and what somebody else has put in the meantime stays.

    Args:
        module: The layer.
    """

    __slots__ = ("_installed", "_previous", "hooks_out", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.hooks_out = 0  # registered, and not removed
        self._installed: dict[str, Any] = {}
        # A forward that somebody put on the instance before.
        self._previous: Callable[..., Any] | None = module.__dict__.get("forward")

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook."""

    def install(self, name: str, value: Any) -> None:
        """Puts ``value`` on the layer, unless something of ours is there already."""
        if name not in self._installed:
            self._installed[name] = value
            self.module.__dict__[name] = value

    def uninstall(self, name: str) -> None:
        """Takes ours off, if it is still there: somebody may have wrapped it, and goes on calling it."""
        if name not in self._installed:
            return
        if self.module.__dict__.get(name) is self._installed[name]:
            if name == "forward" and self._previous is not None:
                self.module.__dict__[name] = self._previous
            else:
                del self.module.__dict__[name]
        del self._installed[name]

    def hook(self) -> None:
        """Registers the forward pre-hook, unless it is there."""
        if not self._hook_ids(self.module):
            self.hooks_out += 1
            self.module.register_forward_pre_hook(self)

    def has_foreign_hooks(self) -> bool:
        """Whether somebody else has forward pre-hooks on the layer."""
        hooks = self.module._forward_pre_hooks
        return bool(hooks) and len(hooks) > len(self._hook_ids(self.module))

    def unhook(self, module: nn.Module) -> None:
        """Removes the forward pre-hook from a module, if it is there: fusing moves it to another one."""
        for key in self._hook_ids(module):
            del module._forward_pre_hooks[key]
            self.hooks_out -= 1

    def remove(self) -> None:
        """Takes everything off."""
        self.unhook(self.module)
        for name in tuple(self._installed):
            self.uninstall(name)

    def getstate(self) -> Any:
        """The layer's state for a copy or a pickle: nothing of bnguard is in it."""
        cls: Any = type(self.module)
        state = cls.__getstate__(self.module)
        return self._without_ours(state) if isinstance(state, dict) else state

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the layer: nothing of bnguard is in it."""
        module = self.module
        cls: Any = type(module)
        if not hasattr(cls, "__deepcopy__"):
            return copy._reconstruct(module, memo, *module.__reduce_ex__(4))  # type: ignore[attr-defined]  # asks getstate
        # A class that copies __dict__ by itself, as that of a parametrized layer does: it gets a layer without ours.
        plain = cls.__new__(cls)
        plain.__dict__.update(self._without_ours(module.__dict__))
        memo[id(module)] = copied = copy.deepcopy(plain, memo)
        return copied

    def _without_ours(self, state: dict[str, Any]) -> dict[str, Any]:
        state = {name: value for name, value in state.items() if value is not self._installed.get(name, self)}
        if self._previous is not None and "forward" in self._installed:
            state["forward"] = self._previous
        hooks = state.get("_forward_pre_hooks")
        if hooks and self._hook_ids(self.module):  # else the handles of users' hooks go on knowing this dictionary
            state["_forward_pre_hooks"] = OrderedDict((k, hook) for k, hook in hooks.items() if hook is not self)
        parameters = state.get("_parameters")
        if parameters:
            state["_parameters"] = {name: p if p is None else unheld(p) for name, p in parameters.items()}
        return state

    def __reduce__(self) -> Any:
        # Copied only as a hook, where fusing has moved it, or somebody keeps the handle of a hook next to it. The copy
        # takes any arguments and does nothing, and loads without bnguard.
        return getattr, (nullcontext(), "__exit__")

    def strip(self, replica: nn.Module) -> None:
        """Takes off what a replica has inherited with the layer's ``__dict__``."""
        for name in self._installed:
            replica.__dict__.pop(name, None)

    def _hook_ids(self, module: nn.Module) -> list[int]:
        hooks = module._forward_pre_hooks
        return [key for key, hook in hooks.items() if hook is self] if hooks else []
