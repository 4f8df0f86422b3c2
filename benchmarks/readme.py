"""``python -m benchmarks.readme``: writes the README's table of costs anew, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import step, watch
from benchmarks.results import FOLDER, Row, from_json

__all__ = ["README", "shown_in", "table", "write"]

README: Final = Path(__file__).parents[1] / "README.md"
_BEGIN: Final = "<!-- costs: written by python -m benchmarks.readme -->"
_END: Final = "<!-- end of costs -->"
_NETS: Final = {
    "resnet50": "ResNet-50, 53 layers",
    "small_cnn": "CNN, 17 layers",
    "bn_mlp": "MLP, 2 layers",
}
# What the README says, by the kind of the benchmark and what that measures.
_WAYS: Final = {
    ("step", step.RESTORE): '`frozen(model, "restore")` around the loop',
    ("step", step.RESTORE_EACH): "the same, a new block at each step",
    ("step", step.REUSED): "the same, one guard entered again at each step",
    ("step", f"{step.STRICT}the net an argument"): '`strict(on_change="restore")` on the step',
    ("step", step.BY_HAND): "by hand: `eval()` on each BatchNorm at each step",
    ("step", step.PUT_BACK): "by hand: clones before each step, compared and put back after it",
    ("watch", watch.WATCHED): "`watch(model)` around the loop",
}


def table(rows: Sequence[Row]) -> str:
    """Medians by net. What has not been measured is left out: the row if there is nothing in it, else the cell."""
    found = {(row.benchmark, row.subject): f"{row.ratio.median:.2f}" for row in rows if row.reference == step.PLAIN}
    lines = [f"| training step / unguarded | {' | '.join(_NETS.values())} |", f"| --- |{' --- |' * len(_NETS)}"]
    for (kind, subject), words in _WAYS.items():
        cells = [found.get((f"{kind}/{net}", subject), "") for net in _NETS]
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown_in(page: str, costs: str) -> str:
    """The text of a page with another table in the place of its own."""
    before, _, rest = page.partition(f"{_BEGIN}\n")
    _, mark, after = rest.partition(_END)
    if not mark:
        raise ValueError(f"the page has no table between {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n{costs}{_END}{after}"


def write() -> Path:
    """Writes the table of the results on the CPU into the README; returns its path."""
    content = json.loads((FOLDER / "cpu.json").read_text(encoding="utf-8"))
    costs = table(list(map(from_json, content["rows"])))
    README.write_text(shown_in(README.read_text(encoding="utf-8"), costs), encoding="utf-8")
    return README


if __name__ == "__main__":
    print(f"written: {write()}")
