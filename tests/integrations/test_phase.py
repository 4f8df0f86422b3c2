"""A guard for some epochs or steps of a run: what may be asked for, and when it is there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bnguard.integrations._phase import Phase, taken_from


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"until_epoch": 0}, ValueError, "until_epoch=0 must be greater than 0: it is the first one without the guard"),
        (
            {"from_step": 5, "until_step": 5},
            ValueError,
            "until_step=5 must be greater than from_step=5: it is the first one without the guard",
        ),
        ({"from_epoch": -1}, ValueError, "from_epoch must not be negative, got -1"),
        ({"until_epoch": 2.5}, TypeError, "until_epoch must be an integer, got 2.5"),
        ({"from_step": True}, TypeError, "from_step must be an integer, got True"),
        (
            {"from_epoch": 1, "until_step": 20},
            ValueError,
            "give the phase in epochs (from_epoch=, until_epoch=) or in steps (from_step=, until_step=)",
        ),
    ],
    ids=str,
)
def test_phase_that_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """With the value, and what it means."""
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        taken_from(options)


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"until_epoch": 2}, [0, 1]),
        ({"from_epoch": 3}, [3, 4]),
        ({"from_epoch": 1, "until_epoch": 3}, [1, 2]),
        ({"until_epoch": 2, "from_epoch": 0}, [0, 1]),
    ],
    ids=str,
)
def test_phase_begins_with_its_first_epoch_and_ends_before_its_last_number(
    options: dict[str, Any], covered: list[int]
) -> None:
    """As a ``range`` does; steps likewise."""
    phase = taken_from(dict(options))
    steps = taken_from({name.replace("epoch", "step"): value for name, value in options.items()})
    assert [epoch for epoch in range(5) if phase.covers(epoch, 99)] == covered
    assert [step for step in range(5) if steps.covers(99 if options else 0, step)] == covered
    assert phase.is_whole_run == steps.is_whole_run == (not options)


def test_options_of_the_guard_are_left() -> None:
    """Only those about the phase are taken."""
    options = {"updates": 1, "until_epoch": 2, "include": "*"}
    assert taken_from(options) == Phase("epoch", 0, 2)
    assert options == {"updates": 1, "include": "*"}
