"""Detect autocast for the device of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

# For some device: most programs use it for none, and this takes a tenth of the time.
is_any_autocast: Final[Callable[[], bool]] = torch._C._is_any_autocast_enabled


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is enabled for the device of a tensor."""
    if not is_any_autocast():
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
