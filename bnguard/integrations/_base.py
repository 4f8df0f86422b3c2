"""What integrations share: options that are checked before there is a run; what to say of a missing library."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from bnguard.guard.options import Frontend, OnChange, Settings, check_settings
from bnguard.guard.phrases import Phrases
from bnguard.layers.select import Selector
from bnguard.torch_internals.ranks import Group

__all__ = ["missing_text", "settings_of"]


def settings_of(
    phrases: Phrases,
    on_change: OnChange,
    use_running_stats: bool,
    affine: bool,
    updates: int,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
    group: Group,
) -> Settings:
    """Checks the options of ``frozen``; messages call the guard by ``phrases``. See there for the errors."""
    settings = check_settings(on_change, use_running_stats, affine, updates, include, exclude, group)
    return dataclasses.replace(settings, frontend=Frontend(phrases))


def missing_text(module: str, package: str, extra: str) -> str:
    """The error of an integration whose library is not installed."""
    return f"{module} needs {package}: pip install 'bnguard[{extra}]'"
