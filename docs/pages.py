"""The pages that the build makes: one for each finding, the costs, and what stands elsewhere in the repository.

They are written beside the others, and not committed. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bnguard.findings.codes import CODES
from bnguard.findings.explanations import explanation_of

__all__ = ["costs", "finding", "made", "write"]

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
_MARK: Final = "% Written by docs/pages.py"

# What is code in the plain text of an explanation: calls, names with a dot or an underscore, assignments, formulas.
_CALL: Final = r"(?:\w+=)?[\w.]+\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)(?:\.\w+\([^()]*\))*"
_NAME: Final = r"\b\w+(?:=[\w.']+)+|\b[a-z]\w*(?:\.\w+)+(?: = \w+(?:\.\w+)+)?|\b[a-z]+_\w+"
_FORMULA: Final = r"new = \(1 - momentum\) \* old \+ momentum \* batch|1 - \(1 - momentum\)\*\*2|1 - momentum"
_CODE: Final = re.compile(f"{_FORMULA}|{_CALL}|{_NAME}")


def made() -> dict[str, Callable[[], str]]:
    """What makes each page, by its path in ``docs/``."""
    findings = {f"findings/{code.lower()}.md": (lambda code=code: finding(code)) for code in CODES}
    return {
        **findings,
        "costs.md": costs,
        "versions.md": lambda: elsewhere(RESULTS / "versions.md"),
        "zoo.md": lambda: elsewhere(RESULTS / "zoo.md"),
        "changelog.md": lambda: elsewhere(ROOT / "CHANGELOG.md"),
        "contributing.md": lambda: elsewhere(ROOT / "CONTRIBUTING.md"),
    }


def write() -> None:
    """Writes all pages; one that has not changed keeps its time, so that Sphinx does not read it again."""
    pages = made()
    for path in DOCS.glob("findings/bn*.md"):
        if path.relative_to(DOCS).as_posix() not in pages:
            path.unlink()
    for name, make in pages.items():
        path, text = DOCS / name, f"{_MARK}\n\n{make()}"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def finding(code: str) -> str:
    """The page of a code: the text of ``bnguard explain``."""
    spec, said = CODES[code], explanation_of(code)
    remedies = "\n".join([f"- {_marked(remedy)}" for remedy in said.remedies])
    return f"""\
# {code}: {_marked(spec.title)}

{_marked(said.meaning)}

Severity: {spec.severity}.

## Why it hurts

{_marked(said.harm)}

## An example

```python
{said.example}
```

## What to do

{remedies}

## When it is fine

{_marked(said.fine)}

Then [ignore it](../ignoring.md):

```text
--ignore {code}
--ignore {code}:FILE:LINE
# bnguard: ignore[{code}]
```

The second form is for findings that name a line; the third is a comment on that line.
"""


def _marked(text: str) -> str:
    """Plain text as Markdown, with code marked as such."""
    parts, end = [], 0
    for match in _CODE.finditer(text):
        code = match[0]
        parts += [_escaped(text[end : match.start()]), f"`{code}`"]
        end = match.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", text)


def costs() -> str:
    """A summary, the pictures, and all figures of the committed results."""
    data = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    about = data["environment"]
    figures = elsewhere(RESULTS / "cpu.md").partition("\n")[2].strip()
    rows = "\n".join([f"| {what} | {value} |" for what, value in summary(data["rows"])])
    return f"""\
# Costs

Ratios of one run each, on {about["cores"]} CPU cores with torch {about["torch"]}, to the unguarded net and to what
people do instead. `python -m benchmarks` makes them anew.

| | ratio |
| --- | --- |
{rows}

So put the block around the loop where a step is very short. Under `raise` and `warn` a layer in eval mode pays for one
empty hook; [layers with a forward of their own](limits.md) pay more.

![Training steps of each net in each way, divided by the unguarded net](../benchmarks/results/cpu-step.png)

## All figures

{re.sub(r"^## ", "### ", figures, flags=re.M)}
"""


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures that matter most, in words."""

    def figure(benchmarks: str, *subjects: str, reference: str = "") -> str:
        chosen = [row for row in rows if re.fullmatch(benchmarks, row["benchmark"]) and row["subject"] in subjects]
        return _range([row["ratio"]["median"] for row in chosen if reference in ("", row["reference"])])

    nets = "step/(resnet50|mobilenet_v2|densenet121|small_cnn)"
    names = "ResNet-50, MobileNetV2, DenseNet-121 or a small CNN"
    eval_by_hand = "`eval()` on each BatchNorm by hand at each step"
    loop, each = "frozen(net, 'restore') around the loop", "frozen(net, 'restore') around each step"
    held = "frozen(net, use_running_stats=True) around the loop"
    by_hand = "train(), then eval() on each BatchNorm, each step"
    new, again = "a new frozen(net, 'restore')", "the same guard again"
    watched = "watch(net) around the loop", "watch() of everything around the loop"
    per_layer = [row for row in rows if row["benchmark"] == "watch/forward" and row["subject"] in watched]
    (microseconds,) = [row["ratio"]["median"] for row in per_layer]
    return [
        (f'training step of {names}, block under `"restore"` around the loop / unguarded', figure(nets, loop)),
        ("the same, a new block at each step", figure(nets, each)),
        ("the same in a three-layer MLP, whose whole step is very short", figure("step/bn_mlp", each)),
        (f"the same nets under `use_running_stats=True` / {eval_by_hand}", figure(nets, held, reference=by_hand)),
        (
            "training step of ResNet-50, `watch` around the loop / unguarded",
            f"{figure('watch/resnet50', *watched)}; {microseconds:.0f} microseconds a layer",
        ),
        ("compiled ResNet-50, block around the loop / unguarded", figure("compiled/resnet50", loop)),
        (
            "enter and leave, 53 layers / clones, two hooks and `torch.equal` for each layer by hand",
            f"{figure('enter_exit/53', new)}; a guard that is used again {figure('enter_exit/53', again)}",
        ),
    ]  # fmt: skip


def _range(medians: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(medians), max(medians)))
    return low if low == high else f"{low} to {high}"


def elsewhere(path: Path) -> str:
    """A file of the repository as a page: links to files that are no pages become their paths."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        file = (path.parent / target).resolve()
        if file.suffix == ".png":
            return match[0]
        page = _PAGES.get(file.relative_to(ROOT).as_posix())
        shown = f"`{file.relative_to(ROOT).as_posix()}`"
        return f"[{words}]({page})" if page else shown if words in (file.name, "how") else f"{words} ({shown})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!http|#)([^)#]+)\)", link, path.read_text(encoding="utf-8"))


_PAGES: Final = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/versions.md": "versions.md",
    "benchmarks/results/zoo.md": "zoo.md",
}
