"""The options of a guard, checked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict

from torch import nn

from bnguard.guard.phrases import FROZEN, Phrases
from bnguard.guard.policy import POLICIES, USE_RUNNING_STATS, WITHOUT_GRAD, Policy
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.other_buffers import as_patterns, select_with_buffers
from bnguard.layers.select import Selector, as_selectors, select_layers
from bnguard.words import short_repr, suggestion

OnChange: TypeAlias = Literal["raise", "warn", "restore", "rollback"]
Check: TypeAlias = Literal["exit", "deferred"]
_CHECKS: Final = ("exit", "deferred")


class GuardOptions(TypedDict, total=False):
    """The options of ``frozen`` after ``on_change`` that frontends pass on."""

    use_running_stats: bool
    affine: bool
    updates: int
    include: Selector | Iterable[Selector] | None
    exclude: Selector | Iterable[Selector] | None
    buffers: str | Iterable[str] | None


class Frontend(NamedTuple):
    """What a guard does differently for ``strict``, an integration, the pytest plugin or the command line.

    Attributes:
        phrases: What messages call the guard.
        has_coverage_warnings: Whether to warn about what a block does not cover.
        compares_only: Whether the guard adds no hooks and only compares the statistics at the end.
        is_outermost: Whether the guard encloses guards that were opened before it.
        only_without_grad: Whether only updates by forwards without gradients are stopped, and nothing else matters.
    """

    phrases: Phrases = FROZEN
    has_coverage_warnings: bool = True
    compares_only: bool = False
    is_outermost: bool = False
    only_without_grad: bool = False


PLAIN: Final = Frontend()


class Settings(NamedTuple):
    """The options of ``frozen``, checked.

    Attributes:
        on_change: See ``frozen``, as for the next seven.
        use_running_stats: See there.
        affine: See there.
        updates: See there.
        include: See there.
        exclude: See there.
        buffers: See there.
        check: See there.
        within: Paths of submodules: what is outside of them is not meant; empty for the whole model.
        frontend: What the guard does differently for the frontend that opened it.
    """

    on_change: OnChange = "raise"
    use_running_stats: bool = False
    affine: bool = False
    updates: int = 0
    include: tuple[Selector, ...] = ()
    exclude: tuple[Selector, ...] = ()
    buffers: tuple[str, ...] = ()
    check: Check = "exit"
    within: tuple[str, ...] = ()
    frontend: Frontend = PLAIN

    @property
    def policy(self) -> Policy:
        """What becomes of an update beyond the budget, and of the statistics at the end."""
        if self.frontend.only_without_grad:
            return WITHOUT_GRAD
        return (USE_RUNNING_STATS if self.use_running_stats else POLICIES)[self.on_change]

    @property
    def selects_by_name(self) -> bool:
        """Whether layers are selected by patterns alone. Whatever else the user gives may be equal to anything."""
        return all([type(selector) is str for selector in (*self.include, *self.exclude)])

    @property
    def as_written(self) -> str:
        """The policies, as a user writes them."""
        options = {"use_running_stats": self.use_running_stats, "affine": self.affine, "updates": self.updates}
        chosen = [f"{name}={value}" for name, value in options.items() if value]
        late = ['check="deferred"'] if self.check == "deferred" else []
        return ", ".join([f'on_change="{self.on_change}"', *chosen, *late])


def check_settings(
    on_change: Any = "raise",
    use_running_stats: Any = False,
    affine: Any = False,
    updates: Any = 0,
    include: Any = None,
    exclude: Any = None,
    buffers: Any = None,
    check: Any = "exit",
    *,
    frontend: Frontend = PLAIN,
) -> Settings:
    """Checks the options of ``frozen``. See there for the errors."""
    if on_change not in POLICIES:
        raise ValueError(f"on_change={short_repr(on_change)}: {suggestion(on_change, POLICIES)}")
    for name, value in (("use_running_stats", use_running_stats), ("affine", affine)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {short_repr(value)}")
    if isinstance(updates, bool) or not isinstance(updates, int):
        raise TypeError(
            f"updates must be a whole number of updates that each layer may make, got {short_repr(updates)}"
        )
    if updates < 0:
        raise ValueError(f"updates={updates}: the number of updates that each layer may make cannot be negative")
    if use_running_stats and updates:
        raise ValueError(
            f"use_running_stats=True contradicts updates={updates}: "
            "a layer that normalises with its running statistics makes no update; leave one of them out"
        )
    if on_change == "rollback" and (use_running_stats or updates):
        option = "use_running_stats=True" if use_running_stats else f"updates={updates}"
        raise ValueError(
            f"on_change='rollback' contradicts {option}: inside the block the statistics move as they would without a "
            "guard; leave one of them out"
        )
    if check not in _CHECKS:
        raise ValueError(f"check={short_repr(check)}: {suggestion(check, _CHECKS)}")
    if check == "deferred" and updates:
        raise ValueError(
            f"check='deferred' contradicts updates={updates}: whether an update was within the budget is found out at "
            "the end of each block; leave one of them out"
        )
    if include is None and exclude is None and buffers is None:
        return _of_all_layers(on_change, use_running_stats, affine, updates, check, frontend)
    return Settings(
        on_change,
        use_running_stats,
        affine,
        updates,
        as_selectors("include", include),
        as_selectors("exclude", exclude),
        as_patterns(buffers),
        check,
        frontend=frontend,
    )


@functools.lru_cache(maxsize=64)
def _of_all_layers(
    on_change: OnChange, use_running_stats: bool, affine: bool, updates: int, check: Check, frontend: Frontend
) -> Settings:
    """Settings that have been made before: a block around each step asks for the same each time."""
    return Settings(on_change, use_running_stats, affine, updates, check=check, frontend=frontend)


def guarded_layers(model: nn.Module, layers: list[StatsLayer], settings: Settings) -> list[StatsLayer]:
    """The layers that a guard with these settings protects, and of each the buffers.

    Args:
        model: The model.
        layers: Its layers with running statistics.
        settings: The settings.

    Raises:
        ValueError: ``include``, ``exclude`` or ``buffers`` selects nothing.
    """
    include, exclude, within = settings.include, settings.exclude, settings.within
    if settings.buffers:
        return select_with_buffers(model, layers, settings.buffers, include, exclude, within)
    return select_layers(model, layers, include, exclude, within)


def settings_for(frontend: Frontend, on_change: Any, options: GuardOptions, known: type = GuardOptions) -> Settings:
    """Checks the options of a frontend that passes them on. See ``frozen`` for the errors.

    Args:
        frontend: The frontend.
        on_change: See ``frozen``.
        options: The other options.
        known: A ``TypedDict`` with all options that the user may give.

    Raises:
        TypeError: There is no such option.
    """
    valid = known.__annotations__
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}: {suggestion(unknown[0], valid)}")
    return check_settings(on_change, **options, frontend=frontend)
