"""Words and parts of sentences that all messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

# Such as the rootdir of pytest: paths to files in the last of them are short, whatever the working directory is.
roots: Final[list[str]] = []


def name_text(name: str, model: str = "") -> str:
    """The name of a layer: ``stem.bn``, or ``Generator: stem.bn`` where several models are watched."""
    return f"{model}: {name or '(root)'}" if model else name or "(root)"


def layer_text(names: Sequence[str], type_name: str, model: str = "") -> str:
    """One layer with its type, as every message prints it: ``stem.bn (BatchNorm2d)``."""
    shown = [name or "(root)" for name in names]
    return f"{name_text(' = '.join(shown), model)} ({type_name})"


def listing(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def first_of(words: Sequence[str], shown: int = 3) -> str:
    """The first words: ``a, b, c and 4 more``."""
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return f"{', '.join(words[:shown])}{more}"


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 1, 2 and 5``; ``other ranks`` where they are unknown."""
    if not ranks:
        return "other ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {listing([str(rank) for rank in ranks])}"


def suggestion(value: object, valid: Iterable[str], listed: str = "") -> str:
    """A hint that lists the valid values, the closest match first if there is one.

    Args:
        value: The value that is not valid.
        valid: The valid values.
        listed: How to list them, if not one by one.
    """
    valid = list(valid)
    everything = f"valid are {listed or listing([repr(name) for name in valid])}"
    nearest = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.65)
    return f"did you mean {nearest[0]!r}? ({everything})" if nearest else everything


def short_repr(value: object) -> str:
    """The ``repr()`` of a value, shortened if it is long or has several lines, as that of a module."""
    first, newline, _ = repr(value).partition("\n")
    return first if not newline and len(first) <= 60 else f"{first[:57]}..."


def count_text(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def sentence(text: str) -> str:
    """The text as a sentence: with a full stop, and a capital unless it begins with code."""
    first = text.partition(" ")[0]
    return f"{text[0].upper()}{text[1:]}." if first.rstrip(",").isalpha() else f"{text}."


def times_text(number: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
