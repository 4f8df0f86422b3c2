"""What messages call a guard, after the way by which the user came to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FROZEN", "Wording"]


@dataclass(frozen=True, slots=True)
class Wording:
    """What messages call a guard, after the way by which the user came to it.

    Attributes:
        place: What the block is inside of.
        place_with_budget: The same of a guard with a budget, ``{}``.
        choice: How another option, ``{}``, is asked for.
        more_choices: Further ways out, each with what it does.
        everything: Where all changes are listed.
        expected: What to do about changes that are meant.
        renamed: Options that are called otherwise here; those that do not exist by an empty name.
        is_of_run: Whether it lasts for a run of somebody else's loop, with many steps, which calls ``train()`` itself.
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
        """What a block with this budget is inside of."""
        return self.place_with_budget.format(budget) if budget else self.place

    def choices(self, *options: tuple[str, str]) -> list[str]:
        """A line for each option, and what it does."""
        named = [(dict(self.renamed).get(option, option), effect) for option, effect in options]
        ways = [(self.choice.format(option), effect) for option, effect in named if option]
        ways += self.more_choices
        width = max([len(way) for way, _ in ways])
        return [f"  {way:<{width}}    {effect}" for way, effect in ways]


FROZEN: Final = Wording()
