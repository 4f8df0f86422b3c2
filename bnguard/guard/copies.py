"""What a guard puts on a layer, and how it gets off again."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Final

from torch import nn

from bnguard.guard.affine import unheld

__all__ = ["OWN_ATTRIBUTES", "Equipment"]

# In the layer's __dict__, where they go before the class's own; each is a method of its sentry.
_HOLDING: Final = ("forward", "_replicate_for_data_parallel")
OWN_ATTRIBUTES: Final = (*_HOLDING, "__getstate__", "__deepcopy__", "__prepare_scriptable__")

# Of hooks: torch's own keys are numbers, from a counter that need not move for a hook that no handle knows.
_KEY: Final = "bnguard"


class Equipment(ABC):
    """A forward pre-hook, which is the object itself, and attributes in the ``__dict__`` of one layer.

    Every undo looks at the layer rather than at a handle: what fails half-way is taken off all the same, and what
    somebody else has put in the meantime stays.

    Attributes:
        module: The layer.
        hooks_out: Hooks that were put on and not taken off.
    """

    __slots__ = ("_has_forward", "_is_equipped", "_previous", "hooks_out", "module")

    module: Any
    hooks_out: int
    _is_equipped: bool
    _has_forward: bool
    _previous: Callable[..., Any] | None  # a forward that somebody put on the instance before

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""

    @abstractmethod
    def replicate(self) -> nn.Module:
        """A replica of the layer for ``nn.DataParallel``."""

    @abstractmethod
    def refuse_script(self) -> nn.Module:
        """Refuses to be compiled by ``torch.jit.script``."""

    def equip(self, hooked: bool) -> None:
        """Puts the pre-hook on the layer, or else the forward, and with either what keeps them out of copies.

        What was put on once is not put on again: somebody may have wrapped it.
        """
        attributes = self.module.__dict__
        if not self._is_equipped:
            self._is_equipped = True
            attributes["__getstate__"] = self.getstate
            attributes["__deepcopy__"] = self.deepcopy
            attributes["__prepare_scriptable__"] = self.refuse_script
        if hooked:
            hooks = self.module._forward_pre_hooks
            if _KEY not in hooks:
                self.hooks_out += 1
                hooks[_KEY] = self
            if self._has_forward:
                self._take_off(_HOLDING)
                self._has_forward = False
        else:
            if not self._has_forward:
                self._has_forward = True
                attributes["_replicate_for_data_parallel"] = self.replicate
                attributes["forward"] = self.forward
            if self.hooks_out:
                self.unhook(self.module)

    def has_foreign_hooks(self) -> bool:
        """Whether somebody else has forward pre-hooks on the layer."""
        hooks = self.module._forward_pre_hooks
        return bool(hooks) and len(hooks) > (_KEY in hooks)

    def unhook(self, module: nn.Module) -> None:
        """Removes the forward pre-hook from a module, if it is there: fusing moves it to another one."""
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self] if hooks else ():
            del hooks[key]
            self.hooks_out -= 1

    def remove(self) -> None:
        """Takes everything off. May be done again."""
        if self.hooks_out:
            self.unhook(self.module)
        self._take_off(OWN_ATTRIBUTES)
        self._is_equipped = self._has_forward = False

    def _take_off(self, names: Iterable[str]) -> None:
        """Takes attributes of ours off, where they are still ours: who wrapped one goes on calling it."""
        attributes = self.module.__dict__
        if self._previous is not None and self._is_ours(attributes.get("forward")):
            attributes["forward"] = self._previous
        for name in names:
            if getattr(attributes.get(name), "__self__", None) is self:
                del attributes[name]

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
        memo[id(module)] = copied = copy.deepcopy(self.without_ours(), memo)
        return copied

    def without_ours(self) -> Any:
        """Another object of the layer's class, with all that hangs on the layer, and nothing of bnguard."""
        cls: Any = type(self.module)
        plain = cls.__new__(cls)
        plain.__dict__.update(self._without_ours(self.module.__dict__))
        return plain

    def _without_ours(self, state: dict[str, Any]) -> dict[str, Any]:
        had_forward = self._is_ours(state.get("forward"))
        state = {name: value for name, value in state.items() if name not in OWN_ATTRIBUTES or not self._is_ours(value)}
        if had_forward and self._previous is not None:
            state["forward"] = self._previous
        hooks = state.get("_forward_pre_hooks")
        if hooks and self in hooks.values():  # else the handles of users' hooks go on knowing this dictionary
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
        for name in OWN_ATTRIBUTES:
            if self._is_ours(replica.__dict__.get(name)):
                del replica.__dict__[name]

    def _is_ours(self, value: Any) -> bool:
        return getattr(value, "__self__", None) is self
