"""The README, taken apart: its sections and their code."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["README", "SECTIONS", "code"]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def code(text: str, language: str = "python") -> list[str]:
    """The blocks of code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _sections(text: str) -> dict[str, str]:
    """The parts of a text by heading; what comes before the first heading is under ``""``."""
    first, *others = re.split(r"^## (.+)\n", text, flags=re.M)
    return {"": first, **dict(zip(others[::2], others[1::2], strict=True))}


SECTIONS = _sections(README)
