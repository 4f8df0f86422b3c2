"""Names and remedies in messages, which depend on the interface through which the user requested the guard."""

from __future__ import annotations

from typing import Final, NamedTuple


class Phrases(NamedTuple):
    """How messages name a guard and its options, for one of the interfaces through which it can be requested.

    Attributes:
        place: The call that began the block, ``"frozen()"``.
        place_with_budget: The call with a budget; ``{}`` is replaced with the budget.
        choice: The call with an option; ``{}`` is replaced with the option.
        more_choices: Further remedies, each with its effect.
        everything: A clause that says where all changes are listed.
        expected: What to do if the changes are intended.
        renamed: Options that have another name in this interface, with that name; ``""`` if there is no such option.
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
        """The call that began a block with ``budget``; 0 means no budget."""
        return self.place_with_budget.format(budget) if budget else self.place

    def choices(self, *options: tuple[str, str]) -> list[str]:
        """Formats one line per option and further remedy, each with its effect."""
        named = [(dict(self.renamed).get(option, option), effect) for option, effect in options]
        ways = [(self.choice.format(option), effect) for option, effect in named if option]
        ways += self.more_choices
        width = max([len(way) for way, _ in ways])
        return [f"  {way:<{width}}    {effect}" for way, effect in ways]


FROZEN: Final = Phrases()
