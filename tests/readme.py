"""The README, taken apart: its sections, their code, and its recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["IMPORTS", "LOOPS", "PASTED", "README", "RECIPES", "SECTIONS", "Pasted", "code"]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Pasted:
    """What people paste, and what replaces it.

    Attributes:
        before: The old lines.
        now: The new ones; they define the same function.
    """

    before: str
    now: str


def code(text: str, language: str = "python") -> list[str]:
    """The blocks of code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _sections(text: str, level: str) -> dict[str, str]:
    """The parts of a text by heading; what comes before the first heading is under ``""``."""
    first, *others = re.split(rf"^{level} (.+)\n", text, flags=re.M)
    return {"": first, **dict(zip(others[::2], others[1::2], strict=True))}


def _folded(text: str) -> dict[str, str]:
    """What is folded away, by title."""
    found = re.findall(r"^<details><summary>(.*?)</summary>\n\n(.*?)\n\n</details>$", text, re.M | re.S)
    assert len(found) == text.count("<details>")
    return dict(found)


def _only(blocks: list[str]) -> str:
    (block,) = blocks
    return block


def _pasted(text: str) -> Pasted:
    _, before, now = re.split(r"\n\n(?:Before|Now):\n\n", text)
    return Pasted(_only(code(before)), _only(code(now)))


SECTIONS = _sections(README, "##")

_PARTS = _sections(SECTIONS["Recipes"], "###")

# The blocks for each library whose loop has no module of its own.
LOOPS = {title: code(body) for title, body in _folded(SECTIONS["In other people's loops"]).items()}

# What all recipes import; the recipes by what stands before the colon of their titles; the pasted snippets by name.
IMPORTS = code(_PARTS[""])[0]
RECIPES = {title.partition(":")[0]: _only(code(body)) for title, body in _folded(_PARTS[""]).items()}
PASTED = {
    title.partition("<code>")[2].partition("</code>")[0]: _pasted(body)
    for title, body in _folded(_PARTS["Instead of what is pasted"]).items()
}
