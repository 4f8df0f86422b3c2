"""Operations on many tensors at once, which torch has under private names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

# Copies each value into the target at its position; on a GPU in few kernels.
copy_each: Final[Callable[[Sequence[Tensor], Sequence[Tensor]], Any]] = torch._foreach_copy_  # type: ignore[assignment]
