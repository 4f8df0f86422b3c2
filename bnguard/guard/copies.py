"""What a guard puts on a layer, how it comes off again, and how copies of the layer stay free of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Final

from torch import nn

from bnguard.guard.affine import unheld
from bnguard.guard.hold import GuardedForward
from bnguard.layers.swaps import is_swapped, own_mode, own_tensors

# In the layer's __dict__, where Python finds them before those of the class.
_HOLDING: Final = ("forward", "_replicate_for_data_parallel")
_COPYING: Final = ("__getstate__", "__deepcopy__", "__prepare_scriptable__")
_ATTRIBUTES: Final = (*_HOLDING, *_COPYING)

# Of hooks. Torch's own keys are numbers from a counter, which need not move for a hook that has no handle; and graphs
# are compiled anew for another key.
_KEY: Final = "bnguard"
_TABLES: Final = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")


class LayerHook:
    """A forward hook on one layer. Copied or pickled, it is a function that does nothing and needs no bnguard."""

    __slots__ = ("guard",)

    def __init__(self, guard: Any) -> None:
        self.guard = guard

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class InstancePatch:
    """The hooks and the attributes that one layer has while it is guarded.

    Every undo looks at the layer, not at a handle: what fails half-way is taken off all the same, and what the user's
    code has put there meanwhile stays.

    Attributes:
        module: The layer.
        previous: A ``forward`` that the user's code had put on the instance; None as a rule.
        has_hooks: Whether the hooks are on the layer.
        is_hook_elsewhere: Whether a hook was no longer on the layer when it was to be removed: fusing moves hooks to
            another module.
    """

    __slots__ = ("_has_copying", "_has_forward", "has_hooks", "is_hook_elsewhere", "module", "previous")

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.previous = module.__dict__.get("forward")
        self._has_copying = self._has_forward = self.has_hooks = self.is_hook_elsewhere = False

    def has_foreign_hooks(self) -> bool:
        """Whether the user has forward hooks on the layer.

        Their handles know the layer's dictionary of hooks, so that copies of a handle would find ours.
        """
        attributes = self.module.__dict__
        for table in _TABLES[:2]:
            hooks = attributes.get(table)
            if hooks and len(hooks) > (_KEY in hooks):
                return True
        return False

    def put_hooks(self, before: LayerHook, after: LayerHook | None) -> None:
        """Puts a forward pre-hook on the layer, and a forward hook that runs before those of the user."""
        self._put_copying()
        if self._has_forward:
            self._take_off(_HOLDING)
            self._has_forward = False
        if self.has_hooks:
            return
        self.has_hooks = True
        module = self.module
        module._forward_pre_hooks[_KEY] = before
        if after is not None:
            module._forward_hooks_always_called[_KEY] = True
            module._forward_hooks[_KEY] = after
            module._forward_hooks.move_to_end(_KEY, last=False)

    def put_forward(self) -> None:
        """Puts a ``forward`` on the layer. Once there, it is not put again: the user may have wrapped it."""
        self._put_copying()
        if self.has_hooks and not self.is_watching():
            self._remove_hooks()
        if not self._has_forward:
            self._has_forward = True
            attributes = self.module.__dict__
            attributes["_replicate_for_data_parallel"] = self.replicate
            attributes["forward"] = self.make_forward().bound()

    def remove(self) -> None:
        """Takes everything off. May be done again."""
        self._remove_hooks()
        self._take_off(_ATTRIBUTES)
        self._has_copying = self._has_forward = False

    def unhook(self, module: nn.Module) -> bool:
        """Removes the hooks from a module, if they are there."""
        found = False
        for table in _TABLES[:2]:
            hooks: dict[Any, Any] = module.__dict__.get(table) or {}
            for key in [key for key, hook in hooks.items() if self._is_hook(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                found = True
        return found

    def strip(self, module: nn.Module) -> None:
        """Takes the attributes off a module that has copied the layer's ``__dict__``."""
        for name in _ATTRIBUTES:
            if self._is_ours(module.__dict__.get(name)):
                del module.__dict__[name]
        if self.previous is not None:
            module.__dict__.setdefault("forward", self.previous)

    def is_watching(self) -> bool:
        """Whether the hooks watch a forward that is running."""
        return False

    def make_forward(self) -> GuardedForward:
        """Makes the forward for the layer's ``__dict__``."""
        raise NotImplementedError

    def replicate(self) -> nn.Module:
        """Makes a replica of the layer for ``nn.DataParallel``."""
        raise NotImplementedError

    def refuse_script(self) -> nn.Module:
        """Refuses to be compiled by ``torch.jit.script``."""
        raise NotImplementedError

    def getstate(self) -> Any:
        """The layer's state for a copy or a pickle, without anything of bnguard."""
        cls: Any = type(self.module)
        state = cls.__getstate__(self.module)
        return self._without_ours(state) if isinstance(state, dict) else state

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the layer, without anything of bnguard."""
        module = self.module
        if not hasattr(type(module), "__deepcopy__"):
            return copy._reconstruct(module, memo, *module.__reduce_ex__(4))  # type: ignore[attr-defined]  # asks getstate
        # A class that copies __dict__ by itself, as that of a parametrized layer does: it gets a layer without ours.
        memo[id(module)] = copied = copy.deepcopy(self.without_ours(), memo)
        return copied

    def without_ours(self) -> Any:
        """Another object of the layer's class with all that the layer has, and nothing of bnguard."""
        cls: Any = type(self.module)
        plain = cls.__new__(cls)
        plain.__dict__.update(self._without_ours(self.module.__dict__))
        return plain

    def _put_copying(self) -> None:
        if not self._has_copying:
            self._has_copying = True
            attributes = self.module.__dict__
            attributes["__getstate__"] = self.getstate
            attributes["__deepcopy__"] = self.deepcopy
            attributes["__prepare_scriptable__"] = self.refuse_script

    def _remove_hooks(self) -> None:
        if self.has_hooks:
            if not self.unhook(self.module):
                self.is_hook_elsewhere = True
            self.has_hooks = False
            self.module._forward_hooks_always_called.pop(_KEY, None)

    def _take_off(self, names: Iterable[str]) -> None:
        """Takes attributes off where they are still ours: code that has wrapped one goes on calling it."""
        attributes = self.module.__dict__
        for name in names:
            owner = getattr(attributes.get(name), "__self__", None)
            if owner is self or (owner is not None and getattr(owner, "guard", None) is self):
                if isinstance(owner, GuardedForward):
                    owner.method = None  # which is bound to it
                if name == "forward" and self.previous is not None:
                    attributes[name] = self.previous
                else:
                    del attributes[name]

    def _without_ours(self, state: dict[str, Any]) -> dict[str, Any]:
        had_forward = self._is_ours(state.get("forward"))
        state = {name: value for name, value in state.items() if name not in _ATTRIBUTES or not self._is_ours(value)}
        if had_forward and self.previous is not None:
            state["forward"] = self.previous
        for table in _TABLES:
            hooks = state.get(table)
            if hooks and _KEY in hooks:  # else the handles of the user's hooks go on knowing this dictionary
                state[table] = OrderedDict((key, hook) for key, hook in hooks.items() if key != _KEY)
        parameters = state.get("_parameters")
        if parameters:
            state["_parameters"] = {name: p if p is None else unheld(p) for name, p in parameters.items()}
        buffers = state.get("_buffers")
        if buffers:
            state["_buffers"] = own_tensors(self.module, "_buffers") if is_swapped(self.module) else buffers
            state["training"] = own_mode(self.module)
        return state

    def _is_hook(self, hook: Any) -> bool:
        return isinstance(hook, LayerHook) and hook.guard is self

    def _is_ours(self, value: Any) -> bool:
        owner = getattr(value, "__self__", None)
        return owner is self or getattr(owner, "guard", None) is self
