"""Refuse what is no model, and warn of a model without layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from bnguard.errors import BNGuardWarning, hides_frame
from bnguard.guard import messages
from bnguard.guard.options import Settings, guarded_layers
from bnguard.guard.phrases import Phrases
from bnguard.layers.tree import any_layer, find_layers
from bnguard.torch_internals.callsite import call_site
from bnguard.words import short_repr

__tracebackhide__ = hides_frame


def check_is_module(value: Any, phrases: Phrases) -> None:
    """Refuses what is no module, and says what to give instead."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{phrases.place} takes {_no_module_text(value)}")


def check_model(model: nn.Module, settings: Settings) -> None:
    """Warns of one without layers; of a selection that finds none ``select_layers`` says what is wrong."""
    if not (settings.buffers or any_layer(model)):
        text = messages.unguarded_text(type(model).__name__, settings.frontend.phrases)
        warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
    elif settings.include or settings.exclude or settings.buffers:
        guarded_layers(model, find_layers(model), settings)


def _no_module_text(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"a model, got the class {value.__name__}: make an instance of it first"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, nn.Module) for item in value):
        return f"one model, got a {type(value).__name__} of {len(value)}: wrap them in nn.ModuleList"
    text = f"a torch.nn.Module, got {type(value).__name__}: {short_repr(value)}"
    if isinstance(value, torch.jit.ScriptFunction):
        return f"{text}; guard the model that it calls"
    is_program = hasattr(value, "graph_module") and callable(getattr(value, "module", None))  # torch.export's
    return f"{text}; guard the module that its .module() returns" if is_program else text
