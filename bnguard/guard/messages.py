"""Changes into text: errors, warnings and notes, the same words everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

from bnguard.guard.phrases import FROZEN, Phrases
from bnguard.records import GuardedLayer, StatsChange
from bnguard.words import count_text, listing, ranks_text, suggestion, times_text

if TYPE_CHECKING:
    from bnguard.guard.options import Settings

__all__ = [
    "Cause",
    "added_text",
    "assertion_text",
    "broadcast_text",
    "capture_text",
    "changed_text",
    "checkpoint_text",
    "fixed_mode_text",
    "layer_text",
    "missing_ranks_text",
    "name_text",
    "no_part_text",
    "others_text",
    "pending_text",
    "recorded_text",
    "report_text",
    "script_text",
    "stood_text",
    "stopped_text",
    "swallowed_text",
    "traced_block_text",
    "unreachable_text",
]

_SHOWN = 3


Cause = Literal["unknown", "compiled", "replaced"]
_CAUSES: Final[dict[Cause, tuple[str, ...]]] = {
    "unknown": (
        "No forward that bnguard can see explains it: look for load_state_dict(), reset_running_stats(), assignments,",
        "F.batch_norm() or forward() called directly, a forward that failed, another thread or process, or a",
        "compiled or scripted model.",
    ),
    "compiled": ("In a compiled graph no forward can be seen or stopped; this comparison finds what it changed.",),
    "replaced": (
        "Another module has taken their place and uses their statistics (convert_sync_batchnorm(), prepare_qat(), or",
        "fusion): change the model before the block.",
    ),
}
_AFFINE: Final = frozenset(["weight", "bias"])
_AFFINE_CAUSES: Final = (
    "Weight and bias get no gradient in there, unless requires_grad_(True) is called again: look for that, and for",
    "load_state_dict(), assignments, or another thread or process.",
)


def name_text(name: str, model: str = "") -> str:
    """The name of a layer: ``stem.bn``, or ``Generator: stem.bn`` where several models are told apart."""
    return f"{model}: {name or '(root)'}" if model else name or "(root)"


def layer_text(names: Sequence[str], type_name: str, model: str = "") -> str:
    """One layer, as every message prints it: ``stem.bn (BatchNorm2d)``."""
    shown = [name or "(root)" for name in names]
    return f"{name_text(' = '.join(shown), model)} ({type_name})"


def stopped_text(change: StatsChange, mode: str, budget: int, phrases: Phrases = FROZEN) -> str:
    """The error that a forward raises instead of updating."""
    place = phrases.inside(budget)
    if budget:
        what = (
            f"{layer_text(change.names, change.type)} has updated {times_text(budget)} inside {place}:\n"
            f"this forward would update {listing(change.buffers)} once more."
        )
        first = f"let the first {_forwards(budget)} update, not the rest"
        if phrases.is_of_run:
            remedy = "The budget is that of the whole run. Leave it out where each step may update, or"
        else:
            remedy = (
                f"A step should update each layer {times_text(budget)}: run the batches through the model in one "
                "forward, or"
            )
        advice = [
            remedy,
            *phrases.choices((f'on_change="restore", updates={budget}', first)),
        ]
    else:
        what = (
            f"{layer_text(change.names, change.type)} is in {mode} mode inside {place}:\n"
            f"this forward would update {listing(change.buffers)}."
        )
        is_own_loop = mode == "train" and not phrases.is_of_run
        choose = "Call eval() on it after model.train(), or choose" if is_own_loop else "Choose"
        advice = [
            f"{choose} what you meant:",
            *phrases.choices(
                ("use_running_stats=True", "normalise with the frozen statistics"),
                ('on_change="restore"', "normalise with the batch, keep the statistics"),
            ),
        ]
    return "\n".join([what, f"  at {change.where}", *advice])


def stood_text(change: StatsChange, mode: str, budget: int, phrases: Phrases = FROZEN) -> str:
    """The one warning of a block under ``on_change="warn"``, at the line of the first update."""
    place = phrases.inside(budget)
    if budget:
        what = f"has updated {times_text(budget)} inside {place} and updates once more"
    else:
        what = f"is in {mode} mode inside {place} and updates its running statistics"
    return (
        f"{layer_text(change.names, change.type)} {what}: {listing(change.buffers)}.\n"
        f"  at {change.where}\n"
        f"The update stands. Further ones are not warned about; {phrases.everything}."
    )


def swallowed_text(stopped: Sequence[StatsChange], phrases: Phrases = FROZEN) -> str:
    """The error at the end of a block in which somebody caught the error of a forward."""
    if all([change.prevented for change in stopped]):
        did, outcome = "would have updated", "The updates did not happen."
    else:
        did, outcome = "changed", "The statistics of entry are back."
    what = f"{_layers(len(stopped))} {did} inside {phrases.place}"
    head = f"{what}, and the StatsChangedError that said so was caught:"
    advice = f"Let the error through, or {phrases.expected}."
    return "\n".join([head, *_lines(stopped), f"{outcome} {advice}"])


def changed_text(
    changes: Sequence[StatsChange], restored: bool, cause: Cause = "unknown", phrases: Phrases = FROZEN
) -> str:
    """What only the comparison at the end of a block, or of ``check()``, could see.

    Args:
        changes: The layers.
        restored: Whether their statistics of entry are back.
        cause: What is known of those that no forward was seen of.
        phrases: What the guard is called.
    """
    affine = [change for change in changes if not _AFFINE.isdisjoint(change.buffers)]
    statistics = [change for change in changes if not _AFFINE.issuperset(change.buffers)]
    causes = () if len([change for change in statistics if change.updates]) == len(statistics) else _CAUSES[cause]
    if causes and cause == "compiled":
        causes = (*causes, *phrases.choices(('on_change="restore"', "holds the statistics, in compiled graphs too")))
    if affine:
        causes = (*causes, *_AFFINE_CAUSES)
    parts = ["running statistics"] * bool(statistics) + ["affine parameters"] * bool(affine)
    outcome = f"The {listing(['statistics', 'parameters'][not statistics : 1 + bool(affine)])} of entry are back."
    head = f"{listing(parts)} of {_layers(len(changes))} changed inside {phrases.place}:"
    return "\n".join([head, *_lines(changes), *causes, outcome if restored else "The changes stand."])


def assertion_text(changes: Sequence[StatsChange], function: str) -> str:
    """What ``assert_stats_unchanged`` says about a function."""
    what = "the function" if function == "<lambda>" else f"{function}()"
    return "\n".join([f"running statistics of {_layers(len(changes))} changed in {what}:", *_lines(changes)])


def added_text(names: Sequence[str], phrases: Phrases) -> str:
    """The warning about layers that came into the model inside a block."""
    shown = ", ".join(name or "(root)" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{shown}{more} came into the model inside {phrases.place} and was not guarded there.\n"
        "Change the model before the block, or open another block after the change."
    )


def pending_text(in_eval_mode: bool, phrases: Phrases) -> str:
    """The warning about a checkpointed region whose backward pass is still to come when the block is over."""
    consequence = (
        "normalise with the batch: torch raises CheckpointError, or computes wrong gradients (use_reentrant=True)"
        if in_eval_mode
        else "update the running statistics"
    )
    return (
        f"a checkpointed region was run inside {phrases.place}, and its backward pass has not been run there.\n"
        f"That pass recomputes the region, without the guard, and will {consequence}.\n"
        "Call backward() inside the block, or run the region under torch.no_grad() if it needs no gradient."
    )


def unguarded_text(type_name: str, phrases: Phrases = FROZEN) -> str:
    """The warning about a model without any layer to guard."""
    return (
        f"{type_name} has no layer with running statistics: {phrases.place} has nothing to guard.\n"
        "If one of its layers keeps statistics under other names, see bnguard.register_layer()."
    )


def checkpoint_text(changes: Sequence[StatsChange], phrases: Phrases) -> str:
    """The warning about a checkpoint with statistics that are not those of the beginning."""
    head = f"this checkpoint holds running statistics of {_layers(len(changes))} that changed inside {phrases.place}:"
    return "\n".join(
        [
            head,
            *_lines(changes),
            "Later ones are not warned about. To keep the statistics of the beginning:",
            *phrases.choices(('on_change="restore"', "normalise with the batch, keep the statistics")),
        ]
    )


def no_part_text(path: str, there: str, name: str, children: Sequence[str], phrases: Phrases) -> str:
    """The error about a path that leads nowhere."""
    parts = suggestion(name, children) if children else f"{there} has no submodules"
    return f"{phrases.place}: target {path!r}: {there} has no submodule {name!r}; {parts}"


def others_text(own: str, others: Sequence[tuple[int, str]]) -> str:
    """What this rank has found, and what others have; each text once.

    Args:
        own: The text of this rank; empty where it has found nothing.
        others: Rank and text of each of the others.
    """
    groups: dict[str, list[int]] = {}
    for rank, text in others:
        groups.setdefault(text, []).append(rank)
    parts = [own] if own else []
    known = own.splitlines()
    for text, ranks in groups.items():
        where = f"on {ranks_text(tuple(ranks))}"
        if text == own:
            parts.append(f"The same {where}.")
            continue
        lines = text.splitlines()
        # Advice that has been given is not given again.
        while known and len(lines) > 1 and lines[-1] in known:
            lines.pop()
        known += lines
        indented = [f"  {line}" for line in lines]
        parts.append("\n".join([f"{where[0].upper()}{where[1:]}:" if own else f"{where}:", *indented]))
    return "\n".join(parts)


def missing_ranks_text(ranks: tuple[int, ...], seconds: float, place: str, elsewhere: Mapping[int, str]) -> str:
    """What is said of ranks that have not come to the end of a block in time."""
    return "\n".join(
        [
            f"{ranks_text(ranks)} did not come to {place}",
            f"within {seconds:g} seconds, the timeout of the process group.",
            *[f"  rank {rank} waits at {where}" for rank, where in sorted(elsewhere.items())],
            "Ranks meet at the same line. A block that not all of them enter needs group=False; one of fewer ranks",
            "needs group= with those.",
        ]
    )


def unreachable_text(problem: str, place: str) -> str:
    """What is said where the other ranks cannot be told at all."""
    return f"at {place} the other ranks could not be asked what they found: {problem}"


def broadcast_text(
    changes: Sequence[StatsChange], sources: Sequence[int], restored: bool, phrases: Phrases = FROZEN
) -> str:
    """What a rank is told whose statistics ``DistributedDataParallel`` has overwritten with those of another rank."""
    outcome = "The statistics of entry are back." if restored else "The changes stand."
    what = f"the statistics of {ranks_text(sources)} took the place of others inside {phrases.place}:"
    return "\n".join(
        [
            f"DDP broadcast at forward: {what}",
            *[f"  {layer_text(change.names, change.type)}" for change in changes[:_SHOWN]],
            *[f"  and {len(changes) - _SHOWN} more"] * (len(changes) > _SHOWN),
            f"{outcome} DistributedDataParallel(forward_sync_buffers=False) lets each rank keep its own.",
        ]
    )


def capture_text(phrases: Phrases) -> str:
    """The error of a block that begins or ends while a CUDA graph is captured."""
    return (
        f"{phrases.place} cannot begin, compare or end while a CUDA graph is captured: it would have to wait for the "
        "device.\nOpen the block around the capture."
    )


def traced_block_text(phrases: Phrases) -> str:
    """The warning about a block in code that becomes a program."""
    return (
        f"{phrases.place} begins in code that is traced or exported: the program has no guard in it.\n"
        "Open the block around the calls of the program, or export its layers in eval mode."
    )


def script_text(type_name: str) -> str:
    """The error of ``torch.jit.script()`` inside a block."""
    return (
        f"torch.jit.script() would compile the guard of a {type_name} along with it: script the model before or after\n"
        "the block, or a copy inside it, torch.jit.script(copy.deepcopy(model)). torch.jit.trace() leaves the guard out"
    )


def fixed_mode_text(names: Sequence[str], type_name: str) -> str:
    """The warning about layers that cannot be told to use their running statistics."""
    return (
        f"use_running_stats=True does not reach {layer_text(names, type_name)}: that program keeps its mode.\n"
        "Its statistics are held. Export the model in eval mode to have it use them."
    )


def recorded_text(names: Sequence[str], type_name: str, phrases: Phrases) -> str:
    """The warning about a program taken off a layer in train mode while it is to use its running statistics."""
    return (
        f"{layer_text(names, type_name)} is traced or exported in train mode inside "
        f"{phrases.choice.format('use_running_stats=True')}.\n"
        "The program has no guard in it: it normalises with the batch, and updates. Call model.eval() first, so that\n"
        "it normalises with the running statistics."
    )


def report_text(changes: Sequence[StatsChange], layers: Sequence[GuardedLayer], settings: Settings) -> str:
    """All of it, for people."""
    guard = settings.frontend.phrases.choice.format(settings.as_written)
    head = f"{guard} guards {_layers(len(layers)) if layers else 'no layer'}."
    if not layers:
        return head
    kinds = list(dict.fromkeys(layer.protection for layer in layers))
    ways = [f"  {sum(layer.protection == kind for layer in layers)} {kind}" for kind in kinds]
    if not changes:
        return "\n".join([head, *ways, "No change."])
    return "\n".join([head, *ways, f"{_layers(len(changes))} changed:", *_lines(changes, limit=None)])


def _lines(changes: Sequence[StatsChange], limit: int | None = _SHOWN) -> list[str]:
    shown = changes if limit is None else changes[:limit]
    lines = [f"  {_change_text(change)}" for change in shown]
    if len(changes) > len(shown):
        lines.append(f"  and {len(changes) - len(shown)} more")
    return lines


def _change_text(change: StatsChange) -> str:
    parts = [listing(change.buffers)]
    if change.mean_shift:
        parts.append(f"mean moved by up to {change.mean_shift:.3g} standard deviations")
    if change.updates:
        verb = "stopped" if change.prevented else "seen"
        first = "" if change.updates == 1 else ", first"
        parts.append(f"{count_text(change.updates, 'update')} {verb}{first} at {change.where}")
    return f"{layer_text(change.names, change.type)}: {'; '.join(parts)}"


def _layers(number: int) -> str:
    return count_text(number, "layer")


def _forwards(number: int) -> str:
    return "one" if number == 1 else str(number)
