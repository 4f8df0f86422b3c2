"""What integrations share: options that are checked before there is a run, and the guard that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from bnguard._frozen import frozen
from bnguard._ranks import Group
from bnguard._report import Wording
from bnguard._select import Selector
from bnguard._settings import Manner, OnChange, Settings, check_settings

__all__ = ["guard_of", "missing_text", "settings_of"]


def settings_of(
    wording: Wording,
    on_change: OnChange,
    use_running_stats: bool,
    affine: bool,
    updates: int,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
    group: Group,
) -> Settings:
    """Checks the options of ``frozen``; messages call the guard by ``wording``. See there for the errors."""
    settings = check_settings(on_change, use_running_stats, affine, updates, include, exclude, group)
    return dataclasses.replace(settings, manner=Manner(wording))


def guard_of(model: nn.Module, settings: Settings) -> frozen:
    """A guard of ``model`` with settings that are checked already.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``include`` or ``exclude`` selects nothing in it.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """
    frozen(model, include=settings.include or None, exclude=settings.exclude or None)  # says what is wrong with them
    return frozen._of(model, settings)


def missing_text(module: str, package: str, extra: str) -> str:
    """The error of an integration whose library is not installed."""
    return f"{module} needs {package}: pip install 'bnguard[{extra}]'"
