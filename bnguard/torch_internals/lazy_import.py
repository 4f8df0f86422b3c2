"""Import a bnguard module when one of its names is first used. Does not import torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def load(name: str) -> ModuleType:
    """Imports a module, outside of the graph if a compiled function does so."""
    load = importlib.import_module
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        load = dynamo.disable(load)
    return load(name)
