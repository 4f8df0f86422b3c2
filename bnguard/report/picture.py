"""A picture, and what all pictures share. The colours can be distinguished with colour blindness, and in grey."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Final, NamedTuple

from matplotlib.figure import FigureBase

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
SMALL: Final = 8.0  # points


class Picture(NamedTuple):
    """A picture and the function that draws it.

    Attributes:
        title: What it shows.
        description: What it shows, in one sentence with the numbers: the alternative text.
        height: In inches; all pictures have the same width.
        draw: Draws it onto a figure.
    """

    title: str
    description: str
    height: float
    draw: Callable[[FigureBase], None]


def wrapped(text: str) -> str:
    """Lines that fit beside the names of layers."""
    return "\n".join([line for part in text.split("\n") for line in textwrap.wrap(part, 95)])


def shortened(name: str, most: int) -> str:
    """A name cut to ``most`` characters: the end says more than the beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
