"""The installed release of torch, for differences that show in no name."""

from __future__ import annotations

from typing import Final

import torch

# Without what follows the numbers: builds of release candidates and of vendors (2.12.0a0+1234) count as the release.
RELEASE: Final = tuple(map(int, torch.__version__.split(".")[:2]))

# In eval mode, F.instance_norm repeats the running statistics for each image of the batch. Before torch 2.11 it wrote
# the mean of the copies back: the last bit of a statistic could change, and -0.0 became 0.0.
INSTANCE_NORM_ROUNDS: Final = RELEASE < (2, 11)
