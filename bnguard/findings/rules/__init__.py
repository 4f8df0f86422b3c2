"""The rules of all findings, by code. A rule is one file in this folder and one line in ``findings/codes.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from bnguard.findings.codes import CODES
from bnguard.findings.rule import Rule


def _load(code: str) -> type[Rule]:
    rule: type[Rule] = getattr(import_module(f"{__name__}.{code.lower()}"), code)
    return rule


RULES: Final[dict[str, type[Rule]]] = {code: _load(code) for code in CODES}
