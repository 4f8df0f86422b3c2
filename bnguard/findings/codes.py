"""The codes of all findings, with title and severity. Importing this module imports no torch."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from bnguard.records import Severity
from bnguard.words import suggestion


class FindingSpec(NamedTuple):
    """What is known of a finding without its rule.

    Attributes:
        title: What the finding is about.
        severity: Its severity in a run, as in ``Finding``.
    """

    title: str
    severity: Severity


# The rule of a code is in rules/, in the file of the same name in lower case.
CODES: Final[dict[str, FindingSpec]] = {
    "BN001": FindingSpec("frozen parameters, moving statistics", "warning"),
    "BN002": FindingSpec("train-mode forward that nothing learns from", "warning"),
    "BN003": FindingSpec("several updates per optimizer step", "warning"),
    "BN004": FindingSpec("one layer, several places", "warning"),
    "BN005": FindingSpec("recomputed forward", "warning"),
    "BN006": FindingSpec("too few values per channel", "warning"),
    "BN007": FindingSpec("momentum by another convention", "warning"),
    "BN008": FindingSpec("eval mode undone", "warning"),
    "BN009": FindingSpec("statistics in half precision", "warning"),
    "BN010": FindingSpec("a frozen parameter that still moves", "warning"),
    "BN011": FindingSpec("track_running_stats off on a layer that has statistics", "warning"),
    "BN012": FindingSpec("broken statistics", "error"),
    "BN013": FindingSpec("wrong gradients", "error"),
    "BN014": FindingSpec("statistics never learned", "warning"),
    "BN015": FindingSpec("statistics that differ between ranks", "warning"),
    "BN016": FindingSpec("left behind", "warning"),
    "BN017": FindingSpec("updates in eval mode", "warning"),
    "BN018": FindingSpec("changed without a forward", "warning"),
    "BN019": FindingSpec("a cumulative average that starts again", "warning"),
}


def checked_code(text: str) -> str:
    """The code that a user has written, in upper case.

    Raises:
        ValueError: There is no such code. The text suggests the nearest.
    """
    code = text.upper()
    if code not in CODES:
        number = re.fullmatch(r"BN(\d+)", code)
        padded = f"BN{int(number[1]):03}" if number else code  # nearer to BN003 than BN3 is
        raise ValueError(f"unknown code {text!r}: {suggestion(padded, CODES, f'{min(CODES)} to {max(CODES)}')}")
    return code
