"""What torch's normalisation layers raise for a batch that has one value a channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.functional import (  # type: ignore[attr-defined]  # private
    _verify_batch_size,
    _verify_spatial_size,
)


def refuse_single_values(size: Sequence[int], *, per_instance: bool) -> None:
    """Raises what torch raises if a channel has one value to normalise with; torch would count the batch first.

    Args:
        size: The shape of the input, with its batch dimension.
        per_instance: Whether each instance is normalised by itself.

    Raises:
        ValueError: Torch's own error.
    """
    if per_instance:
        _verify_spatial_size(size)
    else:
        _verify_batch_size(size)
