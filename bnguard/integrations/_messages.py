"""The messages that only the integrations of trainers have."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard.guard.messages import change_lines, layers_text
from bnguard.guard.phrases import Phrases
from bnguard.records import StatsChange
from bnguard.words import suggestion


def missing_text(module: str, package: str, extra: str) -> str:
    """The error of an integration whose library is not installed."""
    return f"{module} needs {package}: pip install 'bnguard[{extra}]'"


def no_part_text(path: str, there: str, name: str, children: Sequence[str], phrases: Phrases) -> str:
    """The error about a path to a submodule that does not exist."""
    parts = suggestion(name, children) if children else f"{there} has no submodules"
    return f"{phrases.place}: target {path!r}: {there} has no submodule {name!r}; {parts}"


def checkpoint_text(changes: Sequence[StatsChange], phrases: Phrases) -> str:
    """The warning about saving a checkpoint with statistics that changed inside the guard."""
    head = (
        f"this checkpoint holds running statistics of {layers_text(len(changes))} that changed inside {phrases.place}:"
    )
    return "\n".join(
        [
            head,
            *change_lines(changes),
            "There are no warnings about later checkpoints. To keep the original statistics:",
            *phrases.choices(('on_change="restore"', "normalise with the batch, keep the statistics")),
        ]
    )


def written_text(callback: str, changes: Sequence[StatsChange], phrases: Phrases, *, is_error: bool = False) -> str:
    """What is said of another callback that has written to guarded layers, and what was done about it."""
    outcome = "The original statistics have been restored."
    if is_error:
        rest = phrases.choices(('on_change="restore"', "put it back each time, and go on"))
    else:
        outcome += " There are no warnings about later writes of this callback."
        rest = []
    head = f"{callback} wrote to running statistics of {layers_text(len(changes))} inside {phrases.place}:"
    return "\n".join([head, *change_lines(changes), outcome, *rest])
