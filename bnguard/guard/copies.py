"""What a guard puts on a layer, how it comes off again, and how copies of the layer stay free of it.

Note [Clones]
~~~~~~~~~~~~~
Copies and pickles ask the layer for its state, and get one without anything of bnguard. Meta-learning libraries clone
differently: they copy the ``__dict__``, with all that a guard has put there, and no code of ours runs. So

1. The first forward of such a clone as a module takes everything off it again. If it has the layer's own statistics,
   as the clones of learn2learn do, its forwards are those of the layer as far as a guard is concerned.
2. A copy, a pickle or a guard of a clone that has not run takes everything off first. They, and a direct call of
   ``forward``, do not say which module they are about, so it is looked for on the stack.
3. A layer that is parametrized inside a block has another class, which copies the ``__dict__`` deeply. The methods in
   it are then bound to the copy, and are taken off it when ``deepcopy`` drops its memo; should somebody keep that,
   whichever method is called first takes them all off.
4. The end of a block takes everything off the clones that are left. ``gc`` finds them; it is asked only if there are
   some, which a reference count tells.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from sys import getrefcount
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from bnguard.errors import BNGuardError, hides_frame
from bnguard.guard.messages import clones_text
from bnguard.layers.swaps import is_swapped, own_mode, own_tensors
from bnguard.torch_internals.functional_call import modules_on_stack

__tracebackhide__ = hides_frame

# In the layer's __dict__, where Python finds them before those of the class.
_HOLDING: Final = ("forward", "_replicate_for_data_parallel")
_COPYING: Final = ("__getstate__", "__prepare_scriptable__", "__deepcopy__", "__reduce_ex__")
_ATTRIBUTES: Final = (*_HOLDING, *_COPYING)
MARK: Final = "__prepare_scriptable__"  # always there, and hardly ever in use: see Note [Clones]

# Of hooks. Torch's own keys are numbers from a counter, which need not move for a hook that has no handle; and graphs
# are compiled anew for another key.
KEY: Final = "bnguard"
FIRST_CALL: Final = "bnguard: first call"
_TABLES: Final = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")


class LayerHook:
    """A forward hook on one layer. Copied or pickled, it is a function that does nothing and needs no bnguard."""

    guard: Any  # in a __dict__: dynamo of torch 2.4 to 2.6 cannot read a slot

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
        copies_itself: Whether its class defines ``__deepcopy__``.
        reduces_itself: Whether its class says itself how to pickle it.
        previous: A ``forward`` that the user's code had put on the instance; None as a rule.
        replaced: What else it had put there under names that ours have now.
        has_hooks: Whether the hooks are on the layer.
        has_forward: Whether a ``forward`` of ours is on it.
        is_hook_elsewhere: Whether a hook was no longer on the layer when it was to be removed: fusing moves hooks to
            another module.
        mark: What else only clones have, whose number its references tell; None while nothing of ours is on the layer.
        replicate: Makes a replica of the layer for ``nn.DataParallel``. These three are methods of a subclass.
        refuse_script: Refuses to be compiled by ``torch.jit.script``.
        is_watching: Whether the hooks watch a forward that is running.
    """

    has_hooks = has_forward = is_hook_elsewhere = False
    mark: Callable[[], nn.Module] | None = None
    module: Any
    previous: Any
    replaced: Mapping[str, Any] = MappingProxyType({})
    copies_itself: bool
    reduces_itself: bool
    replicate: Callable[[], nn.Module]
    refuse_script: Callable[[], nn.Module]
    is_watching: Callable[[], bool]

    def has_foreign_hooks(self) -> bool:
        """Whether the user has forward hooks on the layer.

        Their handles know the layer's dictionary of hooks, so that copies of a handle would find ours.
        """
        module = self.module
        hooks, others = module._forward_pre_hooks, module._forward_hooks
        if not hooks and not others:
            return False
        # A clone shares the dictionaries of the layer, and with them the hooks of that one's guard.
        return len(hooks) + len(others) > self._number_of_ours(hooks) + self._number_of_ours(others)

    def _number_of_ours(self, hooks: Mapping[Any, Any]) -> int:
        return self._is_hook(hooks.get(KEY)) + (FIRST_CALL in hooks)

    def has_foreign_pre_hooks(self) -> bool:
        """Whether the user has forward pre-hooks on the layer: old spectral normalisation moves buffers in one."""
        hooks = self.module._forward_pre_hooks
        return len(hooks) > self._number_of_ours(hooks)

    def put_hooks(self, before: LayerHook, after: LayerHook | None, *, comes_first: bool = False) -> None:
        """Puts a forward pre-hook on the layer, and a forward hook that runs before those of the user.

        Args:
            before: The pre-hook.
            after: The hook; None for none.
            comes_first: Whether the pre-hook runs before those of the user, too.
        """
        module = self.module
        self.put_copying()
        if self.has_forward:
            self.strip(module, _HOLDING)
            self.has_forward = False
        if self.has_hooks:
            return
        self.has_hooks = True
        module._forward_pre_hooks[KEY] = before
        if comes_first:
            module._forward_pre_hooks.move_to_end(KEY, last=False)
        if after is not None:
            self.put_after(after)

    def put_after(self, after: LayerHook) -> None:
        """Puts a forward hook on the layer that runs before those of the user, and after an exception as well."""
        module = self.module
        self.has_hooks = True
        module._forward_hooks_always_called[KEY] = True
        module._forward_hooks[KEY] = after
        module._forward_hooks.move_to_end(KEY, last=False)

    def remove(self) -> None:
        """Takes everything off. May be done again."""
        if self.has_hooks:
            self.remove_hooks()
        self.remove_attributes()

    def remove_attributes(self) -> None:
        """Takes everything but the hooks off. May be done again."""
        if self.has_forward or self.mark is not None:
            self.strip_attributes(self.module.__dict__)
            self.has_forward = False
            self.mark = None

    def unhook(self, module: nn.Module) -> None:
        """Removes the hooks from a module to which they were moved, if they are there."""
        for table in _TABLES[:2]:
            hooks: dict[Any, Any] = module.__dict__.get(table) or {}
            for key in [key for key, hook in hooks.items() if self._is_hook(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)

    def is_copied_to(self, module: nn.Module) -> bool:
        """Whether a module has copied the layer's ``__dict__``, and was not just given the layer's forward."""
        return self._is_ours(module.__dict__.get(MARK))

    def has_clones(self) -> bool:
        """Whether there are clones that still have what is ours; after the block it is only they that can ask."""
        return getrefcount(self.mark) > NO_CLONES

    def module_in_question(self) -> Any:
        """The layer, or the clone of it that is copied, pickled or run directly. See Note [Clones].

        Raises:
            BNGuardError: It may be several; the clones are then rid of what is ours, so that a second attempt succeeds.
        """
        if not self.has_clones():
            return self.module
        for modules in modules_on_stack():
            found = {id(part): part for module in modules for part in module.modules() if self._may_be(part)}
            if len(found) == 1:
                return next(iter(found.values()))
            if found:
                strip_clones([self])
                raise BNGuardError(clones_text(type(self.module).__name__))
        return self.module

    def _may_be(self, module: nn.Module) -> bool:
        return module is self.module or self.is_copied_to(module)

    def strip(self, module: nn.Module, names: Iterable[str] = _ATTRIBUTES) -> None:
        """Takes attributes off the layer, or off a module that has copied its ``__dict__``."""
        self.strip_attributes(module.__dict__, names)

    def strip_attributes(self, attributes: dict[str, Any], names: Iterable[str] = _ATTRIBUTES) -> None:
        """Takes those off that are still ours: code that has wrapped one goes on calling it."""
        for name in names:
            if name in attributes and self._is_ours(attributes[name]):
                if name in self.replaced:
                    attributes[name] = self.replaced[name]
                else:
                    del attributes[name]

    def put(self, name: str, method: Callable[..., Any]) -> None:
        """Puts an attribute on the layer, and keeps what the user's code had there."""
        attributes = self.module.__dict__
        if name in attributes and not self._is_ours(attributes[name]):
            self.replaced = {**self.replaced, name: attributes[name]}
        attributes[name] = method

    def getstate(self) -> Any:
        """The layer's state for a copy or a pickle, without anything of bnguard."""
        if isinstance(self, nn.Module):
            return strip_copy(self).__getstate__()
        module = self.module_in_question()
        if module is not self.module:
            self.strip(module)
            return module.__getstate__()
        cls: Any = type(self.module)
        own = self.replaced.get("__getstate__")
        state = cls.__getstate__(self.module) if own is None else own()
        return self._without_ours(state) if isinstance(state, dict) else state

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        """A deep copy of a layer whose class makes them itself, as that of a parametrized one: without ours."""
        if isinstance(self, nn.Module):
            return copy.deepcopy(strip_copy(self), memo)
        module = self.module_in_question()
        if module is not self.module:
            self.strip(module)
            return copy.deepcopy(module, memo)
        own = self.replaced.get("__deepcopy__")
        memo[id(self.module)] = copied = copy.deepcopy(self.without_ours(), memo) if own is None else own(memo)
        return copied

    def reduce(self, protocol: Any) -> Any:
        """What a pickle of a layer holds whose class pickles itself, as that of a graph does: without ours."""
        if isinstance(self, nn.Module):
            return strip_copy(self).__reduce_ex__(protocol)
        module = self.module_in_question()
        if module is not self.module:
            self.strip(module)
            return module.__reduce_ex__(protocol)
        return self.without_ours().__reduce_ex__(protocol)

    def without_ours(self) -> Any:
        """Another object of the layer's class with all that the layer has, and nothing of bnguard."""
        cls: Any = type(self.module)
        plain = cls.__new__(cls)
        plain.__dict__.update(self._without_ours(self.module.__dict__))
        return plain

    def put_copying(self) -> None:
        """Puts on the layer what keeps copies of it free of us, unless it is there."""
        if self.mark is not None:
            return
        self.mark = mark = self.refuse_script
        self.put(MARK, mark)
        self.put("__getstate__", self.getstate)
        if self.copies_itself:  # else Python asks __getstate__
            self.put("__deepcopy__", self.deepcopy)
        if self.reduces_itself:
            self.put("__reduce_ex__", self.reduce)

    def remove_hooks(self) -> None:
        """Removes the hooks from the layer."""
        module = self.module
        is_elsewhere = True
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if hooks and self._is_hook(hooks.get(KEY)):
                del hooks[KEY]
                is_elsewhere = False
        module._forward_hooks_always_called.pop(KEY, None)
        self.is_hook_elsewhere = self.is_hook_elsewhere or is_elsewhere
        self.has_hooks = False

    def _without_ours(self, state: dict[str, Any]) -> dict[str, Any]:
        state = state.copy()
        self.strip_attributes(state)
        for table in _TABLES:
            hooks = state.get(table)
            # Without ours the user's handles go on knowing this dictionary.
            if hooks and (KEY in hooks or FIRST_CALL in hooks):
                state[table] = OrderedDict((key, hook) for key, hook in hooks.items() if key not in (KEY, FIRST_CALL))
        parameters = state.get("_parameters")
        if parameters:
            from bnguard.guard.affine import unheld

            state["_parameters"] = {name: p if p is None else unheld(p) for name, p in parameters.items()}
        buffers = state.get("_buffers")
        if buffers:
            state["_buffers"] = own_tensors(self.module, "_buffers") if is_swapped(self.module) else buffers
            state["training"] = own_mode(self.module)
        return state

    def _is_hook(self, hook: Any) -> bool:
        return isinstance(hook, LayerHook) and hook.guard is self

    def _is_ours(self, value: Any) -> bool:
        return getattr(value, "__self__", None) is self


def strip_copy(module: Any) -> Any:
    """Takes off a copy what its class has copied to it. See Note [Clones]."""
    attributes = module.__dict__
    for name in _ATTRIBUTES:
        value = attributes.get(name)
        if getattr(value, "__self__", None) is module and _is_of_package(value):
            del attributes[name]
    for table in _TABLES[:2]:
        hooks = attributes.get(table) or {}
        if KEY in hooks and not isinstance(hooks[KEY], LayerHook):  # what a copy of one is
            del hooks[KEY]
            attributes["_forward_hooks_always_called"].pop(KEY, None)
    return module


class StripsCopy:
    """Takes off a copy what its class copies to it, once the copy is made: the memo of ``deepcopy`` keeps this alive.

    Args:
        module: The copy, whose attributes are not there yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __del__(self) -> None:
        strip_copy(self.module)


def _is_of_package(method: Any) -> bool:
    return str(getattr(getattr(method, "__func__", None), "__module__", "")).startswith("bnguard.")


def strip_clone(module: nn.Module) -> None:
    """Takes what the guard of another layer has left on a clone of that layer off it."""
    attributes = module.__dict__
    if MARK in attributes and _is_of_clone(attributes):
        attributes[MARK].__self__.strip_attributes(attributes)


def strip_clones(guards: Iterable[InstancePatch]) -> None:
    """Takes what is ours off all clones of some layers that have not run yet. See Note [Clones]."""
    for attributes in clones_of(guards):
        attributes[MARK].__self__.strip_attributes(attributes)


def clones_of(guards: Iterable[InstancePatch]) -> list[dict[str, Any]]:
    """The ``__dict__`` of each clone that has not run yet."""
    marks = [guard.mark for guard in guards if guard.mark is not None and guard.has_clones()]
    found = (
        [each.__dict__ if isinstance(each, nn.Module) else each for each in gc.get_referrers(*marks)] if marks else ()
    )
    clones = [each for each in found if isinstance(each, dict) and _is_of_clone(each)]
    return list({id(clone): clone for clone in clones}.values())


def _is_of_clone(attributes: dict[str, Any]) -> bool:
    owner = getattr(attributes.get(MARK), "__self__", None)
    return isinstance(owner, InstancePatch) and attributes is not owner.module.__dict__


class _Probe:
    """Has an attribute to which nothing else refers."""

    def __init__(self) -> None:
        self.attribute = object()

    def references(self) -> int:
        return getrefcount(self.attribute)


ONE_REFERENCE: Final = _Probe().references()  # what getrefcount() says of it
NO_CLONES: Final = ONE_REFERENCE + 1  # of the mark of a guard, which the layer has, too
