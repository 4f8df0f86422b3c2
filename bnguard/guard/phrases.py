"""What messages call a guard, which depends on how the user asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FROZEN", "Phrases"]


@dataclass(frozen=True, slots=True)
class Phrases:
    """What messages call a guard, which depends on how the user asked for it.

    Attributes:
        place: The call that began the block, ``"frozen()"``.
        place_with_budget: The call with a budget, which replaces ``{}``.
        choice: The call with another option, which replaces ``{}``.
        more_choices: Further remedies, each with its effect.
        everything: Where all changes are listed.
        expected: What to do about changes that are intended.
        renamed: Options that have another name here; options that do not exist have the name ``""``.
        is_of_run: Whether the guard lasts for a run of a trainer's loop, which has many steps and calls ``train()``.
    """

    place: str = "frozen()"
    place_with_budget: str = "frozen(updates={})"
    choice: str = "frozen(model, {})"
    more_choices: tuple[tuple[str, str], ...] = ()
    everything: str = "guard.changes lists them all"
    expected: str = "use on_change='restore' where they are expected"
    renamed: tuple[tuple[str, str], ...] = ()
    is_of_run: bool = False

    def inside(self, budget: int) -> str:
        """The call that began a block with this budget."""
        return self.place_with_budget.format(budget) if budget else self.place

    def choices(self, *options: tuple[str, str]) -> list[str]:
        """One line for each option, with its effect."""
        named = [(dict(self.renamed).get(option, option), effect) for option, effect in options]
        ways = [(self.choice.format(option), effect) for option, effect in named if option]
        ways += self.more_choices
        width = max([len(way) for way, _ in ways])
        return [f"  {way:<{width}}    {effect}" for way, effect in ways]


FROZEN: Final = Phrases()
