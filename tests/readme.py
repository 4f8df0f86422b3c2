"""The README and the pages of ``docs/``, taken apart: their code, sections and recipes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["IMPORTS", "LOOPS", "PAGES", "PASTED", "README", "RECIPES", "Pasted", "code", "is_suite"]

_ROOT = Path(__file__).parents[1]
_GENERATED = "% Written by docs/pages.py"  # the first line of a page that the build makes

README = (_ROOT / "README.md").read_text(encoding="utf-8")


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


def is_suite(block: str) -> bool:
    """Whether a block is a complete file for pytest."""
    return block.startswith("# test_model.py\n")


def _pages() -> dict[str, str]:
    """What is written by hand, by path."""
    files = sorted((_ROOT / "docs").rglob("*.md"))
    texts = {path.relative_to(_ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return {"README.md": README, **{path: text for path, text in texts.items() if not text.startswith(_GENERATED)}}


def _sections(text: str, level: str) -> dict[str, str]:
    """The parts of a text by heading; what comes before the first heading is under ``""``."""
    first, *others = re.split(rf"^{level} (.+)\n", text, flags=re.M)
    return {"": first, **dict(zip(others[::2], others[1::2], strict=True))}


def _only(blocks: list[str]) -> str:
    (block,) = blocks
    return block


def _pasted(text: str) -> Pasted:
    _, before, now = re.split(r"\n\n(?:Before|Now):\n\n", text)
    return Pasted(_only(code(before)), _only(code(now)))


PAGES = _pages()

# The blocks for each library whose loop has no module of its own.
LOOPS = {title: code(body) for title, body in _sections(PAGES["docs/guides/trainers.md"], "##").items() if code(body)}

# The first block of each guide, by what stands before the colon of its title, if there is one.
_NOT_RECIPES = ("distributed", "testing", "trainers")
RECIPES = {
    text.partition("\n")[0].removeprefix("# ").partition(":")[0]: code(text)[0]
    for path, text in PAGES.items()
    if path.startswith("docs/guides/") and Path(path).stem not in _NOT_RECIPES
}

# The pasted snippets by name, and the imports that they share.
_INSTEAD = _sections(_sections(PAGES["docs/comparison.md"], "##")["Instead of what is pasted"], "###")
IMPORTS = _only(code(_INSTEAD.pop("")))
PASTED = {title.partition("`")[2].partition("`")[0]: _pasted(body) for title, body in _INSTEAD.items()}
