"""The zoo's results as a page of Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.zoo.explanations import MOVING_STATE, REASONS

__all__ = ["write_table"]

_PACKAGES = {"smp": "segmentation-models-pytorch", "open_clip": "open-clip-torch", "torch_geometric": "torch-geometric"}

_HEAD = """\
# The zoo: other people's models under a guard

Written by `python -m tests.zoo` ([how](../../tests/zoo/README.md)). Each model runs one forward and backward pass in
train mode under `restore`, under `use_running_stats=True` and under `raise`. Statistics stay the same tensors with the
same bits; outputs, gradients of parameters and inputs, and the states of the random number generators are, bit for bit,
those of an unguarded twin (under `use_running_stats=True`: of a twin whose guarded layers are in eval mode). `raise`
raises in the forward, and names a layer that the twin moves.

| column | meaning |
| --- | --- |
| listed | models in the catalogue; a run that is cut short has seen the first ones of each family |
| models | tried |
| passed | of those with running statistics |
| none to guard | models without running statistics |
| skipped | could not be run here, for the reasons below |
| guarded layers | in the models that were run |
| moved | layers whose statistics the unguarded twin moved |
| held | layers of those whose statistics the guard held |
| failed | models in which something was not as in the twin |
| nondeterministic | models whose unguarded twins differ from each other: only statistics and modes are compared |
"""


def write_table(path: Path, results: list[dict[str, Any]]) -> None:
    """Writes the page."""
    listed = {result["library"]: result["count"] for result in results if result["status"] == "listed"}
    results = [result for result in results if result["status"] != "listed"]
    by_library: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: (r["library"], r["name"])):
        by_library[result["library"]].append(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        _HEAD,
        _rows(by_library, listed),
        _failures(results),
        _skipped(results),
        _classes(results),
        _unknown(results),
    ]
    parts += [_notes(results)]
    path.write_text("\n".join(part for part in parts if part))


def _rows(by_library: dict[str, list[dict[str, Any]]], listed: dict[str, int]) -> str:
    names = ("library", "listed", "models", "passed", "none to guard", "skipped", "guarded layers", "moved", "held",
             "failed", "nondeterministic")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    total = [0] * (len(names) - 1)
    for library, results in by_library.items():
        statuses = Counter(result["status"] for result in results)
        ran = [result for result in results if result["status"] in ("passed", "failed")]
        numbers = [
            listed.get(library, len(results)),
            len(results),
            statuses["passed"],
            statuses["none"],
            statuses["skipped"],
            sum(sum(result.get("layers", {}).values()) for result in ran),
            sum(result.get("moved", 0) for result in ran),
            sum(result.get("held", 0) for result in ran),
            statuses["failed"],
            sum("nondeterministic" in result.get("notes", ()) for result in ran),
        ]
        total = [one + other for one, other in zip(total, numbers, strict=True)]
        lines.append(f"| {_label(library)} | {' | '.join(map(str, numbers))} |")
    lines.append(f"| **all** | {' | '.join(map(str, total))} |")
    return "\n".join(lines) + "\n"


def _label(library: str) -> str:
    package = _PACKAGES.get(library, library)
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def _failures(results: list[dict[str, Any]]) -> str:
    lines = [
        f"- {result['library']} `{result['name']}`: {_cell('; '.join(result['failures']))}"
        for result in results
        if result["status"] == "failed"
    ]
    return "## Failed\n\n" + ("\n".join(lines) or "None.") + "\n"


def _skipped(results: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        if result["status"] == "skipped":
            groups[result["library"], _reason(result["reason"])].append(result["name"])
    lines = ["## Skipped", "", "| library | why | models |", "| --- | --- | --- |"]
    for (library, reason), names in sorted(groups.items()):
        lines.append(f"| {library} | {_cell(reason)} | {len(names)}: {_some(names, 6)} |")
    return "\n".join(lines) + "\n"


def _reason(reason: str) -> str:
    for part, explanation in REASONS.items():
        if part in reason:
            return explanation
    return reason[:160]


def _classes(results: list[dict[str, Any]]) -> str:
    layers: Counter[str] = Counter()
    libraries: dict[str, set[str]] = defaultdict(set)
    for result in results:
        if result["status"] in ("passed", "failed"):
            layers.update(result.get("layers", {}))
            for name in result.get("layers", {}):
                libraries[name].add(result["library"])
    lines = ["## Guarded layers by class", "", "| class | layers | met in |", "| --- | --- | --- |"]
    lines += [f"| {name} | {count} | {', '.join(sorted(libraries[name]))} |" for name, count in layers.most_common()]
    return "\n".join(lines) + "\n"


def _unknown(results: list[dict[str, Any]]) -> str:
    counts: Counter[tuple[str, str]] = Counter()
    models: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        for text, count in result.get("unknown", {}).items():
            counts[result["library"], text] += count
            models[result["library"], text].append(result["name"])
    lines = [
        "## Moving state that no rule knows",
        "",
        "Buffers that a train-mode forward of the unguarded twin changed and that no guard covers, in the models above",
        "and in those without running statistics (of at most 30 million parameters). None of them is touched unless",
        "`register_layer()` says so.",
        "",
        "| library | class and buffer | buffers | in | what it is |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (library, text), count in sorted(counts.items()):
        what = next((what for part, what in MOVING_STATE.items() if part in text), "")
        lines.append(f"| {library} | `{text}` | {count} | {_some(models[library, text], 3)} | {what} |")
    return "\n".join(lines) + "\n" if counts else ""


def _notes(results: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        for note in result.get("notes", ()):
            if note != "not run":
                groups[result["library"], note[:200]].append(result["name"])
    lines = ["## Notes", ""]
    lines += [f"- {library}: {_cell(note)}: {_some(names, 12)}" for (library, note), names in sorted(groups.items())]
    return "\n".join(lines) + "\n" if groups else ""


def _some(names: list[str], limit: int) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
