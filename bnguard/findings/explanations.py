"""What each finding means, at length. Importing this module imports no torch."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Any, Final, NamedTuple


class Explanation(NamedTuple):
    """What there is to say about a code.

    Attributes:
        meaning: What happens, in one or two sentences.
        harm: What it does to the model.
        example: A short program that has the finding.
        remedies: What to do instead, the usual way first.
        fine: When it is meant, or does no harm.
    """

    meaning: str
    harm: str
    example: str
    remedies: tuple[str, ...]
    fine: str


_RULES: Final = Path(__file__).parent / "rules"


def explanation_of(code: str) -> Explanation:
    """The explanation of a code of ``CODES``.

    It is read from the source of the rule: importing that would import torch, which takes seconds.
    """
    tree = ast.parse((_RULES / f"{code.lower()}.py").read_text(encoding="utf-8"))
    (rule,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == code]
    texts: dict[str, Any] = {}
    for node in rule.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in Explanation._fields:
                texts[name] = ast.literal_eval(node.value)
    texts["example"] = textwrap.dedent(texts["example"]).strip()
    return Explanation(**texts)
