"""The same for torch's own BatchNorm: held, its forward is one call of ``F.batch_norm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnguard.guard import hold as _hold
from bnguard.guard.layer_guard import Sentry, forward_of_rebound
from bnguard.layers.kinds import batch_norm_updates

__all__ = ["BatchNormSentry"]


class BatchNormSentry(Sentry):
    """A sentry on a layer that runs torch's ``_BatchNorm.forward``: held, that is one call of ``F.batch_norm``."""

    __slots__ = ("_mean", "_scratch", "_var")

    def _remember(self) -> None:
        get = self.module._buffers.get
        self._mean, self._var = get("running_mean"), get("running_var")
        self._scratch: tuple[Tensor | None, Tensor | None] = (None, None)  # of the last forward

    def _own(self) -> tuple[tuple[str, Tensor | None], ...]:
        return ("running_mean", self._mean), ("running_var", self._var)

    def forward(self, input: Tensor) -> Any:
        """The layer's forward, as the guards around it want it."""
        if isinstance(self, nn.Module):
            return forward_of_rebound(self, input)
        module = self.module
        if not module.training:
            return self._original(input)
        if torch.compiler.is_exporting():
            return self._exported((input,), {})
        buffers = module._buffers
        if (
            buffers.get("running_mean") is not self._mean or buffers.get("running_var") is not self._var
        ) and self._is_foreign(module):
            return self._original(input)
        claims = self.claims  # of the moment at which the forward begins
        order = self.order or self._order_now(claims)
        if order == "running":
            return self._run_in_eval_mode((input,), {})
        if not module.track_running_stats:
            return self._original(input)
        if order == "restore":
            return self._run_held((input,), {})
        return self._run_judged(claims, (input,), {}) if batch_norm_updates(module) else self._original(input)

    # Errors about the arguments are worded as the layer's own.
    forward.__qualname__ = nn.BatchNorm2d.forward.__qualname__

    def _run_held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        surroundings = self._surroundings(args, kwargs)
        if surroundings is None:
            mean, var = self._scratch_pair()
            return _hold.normalise_with_batch(self.module, args[0], mean, var)
        if surroundings == "graph":
            return _hold.normalise_with_batch_in_graph(self.module, *args)
        return super()._run_held(args, kwargs)

    def _scratch_pair(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self._scratch
        if not (_hold.is_scratch_for(mean, self._mean) and _hold.is_scratch_for(var, self._var)):
            self._scratch = mean, var = _hold.scratch_like(self._mean, 0), _hold.scratch_like(self._var, 1)
        return mean, var

    def _run_in_eval_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._surroundings(args, kwargs) in (None, "graph"):
            return _hold.normalise_with_running_stats(self.module, *args)
        return super()._run_in_eval_mode(args, kwargs)
