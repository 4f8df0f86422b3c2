"""During which epochs or optimizer steps of a run a guard is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from bnguard.guard.options import GuardOptions
from bnguard.words import short_repr

Unit = Literal["epoch", "step"]
_UNITS: Final[tuple[Unit, ...]] = get_args(Unit)


class RunOptions(GuardOptions, total=False):
    """The options of ``frozen`` after ``on_change``, and when in a run they hold. The first epoch and step are 0."""

    from_epoch: int
    until_epoch: int
    from_step: int
    until_step: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Some epochs or optimizer steps, one after the other; by default all of a run.

    Attributes:
        unit: Whether the numbers count epochs or steps.
        begin: The first one.
        end: The first one that is not among them any more; None for no end.
    """

    unit: Unit = "epoch"
    begin: int = 0
    end: int | None = None

    @property
    def is_whole_run(self) -> bool:
        """Whether it has neither a beginning nor an end of its own."""
        return self.begin == 0 and self.end is None

    def covers(self, epoch: int, step: int) -> bool:
        """Whether a moment is within.

        Args:
            epoch: The number of epochs that are over.
            step: The number of optimizer steps that are over.
        """
        now = epoch if self.unit == "epoch" else step
        return self.begin <= now and (self.end is None or now < self.end)


def taken_from(options: dict[str, Any]) -> Phase:
    """Takes the options about the phase out of ``options``.

    Raises:
        TypeError: One is no integer.
        ValueError: One is negative, the end is not after the beginning, or both epochs and steps are given.
    """
    phases = []
    for unit in _UNITS:
        begin, end = [_number(f"{side}_{unit}", options.pop(f"{side}_{unit}", None)) for side in ("from", "until")]
        if end is not None and end <= (begin or 0):
            after = f"from_{unit}={begin}" if begin else "0"
            raise ValueError(f"until_{unit}={end} must be greater than {after}: it is the first one without the guard")
        if begin is not None or end is not None:
            phases.append(Phase(unit, begin or 0, end))
    if len(phases) > 1:
        raise ValueError("give the phase in epochs (from_epoch=, until_epoch=) or in steps (from_step=, until_step=)")
    return phases[0] if phases else Phase()


def _number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {short_repr(value)}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value
