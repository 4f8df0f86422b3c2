"""The base class of ``BNGuardCallback``: a ``Callback`` of ``lightning`` and of ``pytorch_lightning``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bnguard.integrations._messages import missing_text

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as _Lightning
    from pytorch_lightning.callbacks import Callback as _PytorchLightning

    class LightningCallback(_Lightning, _PytorchLightning):  # type: ignore[misc]  # they differ in the type of Trainer
        """Derives from every ``Callback`` there is."""

else:

    def _callback_class() -> type:
        """A class that derives from every ``Callback`` there is."""
        found, broken = [], None
        for name in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(importlib.import_module(name).Callback)
            except ModuleNotFoundError as error:
                if error.name not in (name, "lightning"):
                    broken = broken or error
            except Exception as error:  # the other one may work
                broken = broken or error
        if found:
            return type("LightningCallback", tuple(found), {})
        if broken is not None:
            raise broken
        raise ImportError(missing_text("bnguard.integrations.lightning", "lightning", "lightning"))

    LightningCallback = _callback_class()
