"""The formats in which findings are printed. Importing this module imports no torch."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

from bnguard.report.document import Document, as_text
from bnguard.report.github import finding_annotation
from bnguard.report.sarif import sarif_text

Format: TypeAlias = Literal["text", "github", "sarif"]

FORMATS: Final[tuple[Format, ...]] = get_args(Format)


def formatted(document: Document, name: Format) -> str:
    """A report in one of the formats. Those other than text have the findings alone."""
    if name == "github":
        return "\n".join([finding_annotation(finding) for finding in document.findings])
    return sarif_text(document) if name == "sarif" else as_text(document)
