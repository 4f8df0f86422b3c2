"""The texts of errors, warnings and reports about guarded statistics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from bnguard.guard.phrases import FROZEN, Phrases
from bnguard.layers.kinds import is_statistic
from bnguard.torch_internals.compile import GUARDS_GRAPHS
from bnguard.words import count_text, first_of, layer_text, listing, ranks_text, times_text

if TYPE_CHECKING:
    from bnguard.guard.options import Settings
    from bnguard.guard.policy import Policy
    from bnguard.layers.kinds import StatsLayer
    from bnguard.records import GuardedLayer, StatsChange


_SHOWN = 3


Cause = Literal["unknown", "compiled", "replaced", "elsewhere"]
_CAUSES: Final[dict[Cause, tuple[str, ...]]] = {
    "unknown": (
        "No forward that bnguard can see explains it: look for load_state_dict(), reset_running_stats(), assignments,",
        "F.batch_norm() or forward() called directly, a forward that failed, another thread or process, or a",
        "compiled or scripted model.",
    ),
    "compiled": ("In a compiled graph no forward can be seen or stopped; this comparison finds what it changed.",),
    "replaced": (
        "Another module has replaced them and uses their statistics (convert_sync_batchnorm(), prepare_qat(), or",
        "fusion): change the model before the block.",
    ),
    "elsewhere": (
        "The forward of another module, a hook, or a method other than forward() moved them, which is seen at the end",
        "only.",
    ),
}
_WITH_BATCH: Final = (
    "If a method made the change that the guard does not hold (a forward() that was kept from before the block or is",
    "called through the class, or another method, as inverse()), its outputs are wrong: it has normalised with the",
    "batch, not with the running statistics. Call the layer itself, or put it in eval mode.",
)
_AFFINE: Final = frozenset(["weight", "bias"])
_AFFINE_CAUSES: Final = (
    "Weight and bias get no gradient in the block, unless requires_grad_(True) is called again: look for it, and for",
    "load_state_dict(), assignments, or another thread or process.",
)


def stopped_text(change: StatsChange, mode: str, budget: int, phrases: Phrases) -> str:
    """The error that a forward raises before it would update."""
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
        advice = [remedy, *phrases.choices((f'on_change="restore", updates={budget}', first))]
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
    return "\n".join([what, f"  at {change.place}", *advice])


@functools.lru_cache(maxsize=64)  # where there is a block at each step, it says the same each time
def kept_text(change: StatsChange, mode: str, budget: int, phrases: Phrases) -> str:
    """The only warning of a block with ``on_change="warn"``, at the line of the first update."""
    place = phrases.inside(budget)
    if budget:
        what = f"has updated {times_text(budget)} inside {place} and updates once more"
    else:
        what = f"is in {mode} mode inside {place} and updates its {_noun(change.buffers)}"
    return (
        f"{layer_text(change.names, change.type)} {what}: {listing(change.buffers)}.\n"
        f"  at {change.place}\n"
        f"The update was kept. Later ones are recorded without further warnings; {phrases.everything}."
    )


def swallowed_text(stopped: Sequence[StatsChange], phrases: Phrases) -> str:
    """The error at the end of a block in which the error of a forward was caught."""
    if all([change.prevented for change in stopped]):
        did, outcome = "would have updated", "The updates did not happen."
    else:
        did, outcome = "changed", "The original statistics have been restored."
    head = (
        f"{layers_text(len(stopped))} {did} inside {phrases.place}, and the StatsChangedError that said so was caught:"
    )
    advice = f"Let the error through, or {phrases.expected}."
    return "\n".join([head, *change_lines(stopped), f"{outcome} {advice}"])


def changed_text(
    changes: Sequence[StatsChange],
    restored: bool,
    cause: Cause,
    phrases: Phrases,
    *,
    in_eval_mode: bool = False,
) -> str:
    """The error or warning about changes found by the comparison at the end of a block or in ``check()``.

    Args:
        changes: The layers that changed.
        restored: Whether their original statistics have been restored.
        cause: The cause of changes that no observed forward explains, as far as it is known.
        phrases: How to name the guard.
        in_eval_mode: Whether forwards were to normalise with the running statistics.
    """
    affine = [change for change in changes if not _AFFINE.isdisjoint(change.buffers)]
    statistics = [change for change in changes if not _AFFINE.issuperset(change.buffers)]
    causes = () if len([change for change in statistics if change.updates]) == len(statistics) else _CAUSES[cause]
    if causes and cause == "compiled":
        causes = (*causes, *phrases.choices(('on_change="restore"', "holds the statistics, in compiled graphs too")))
    if causes and cause == "unknown" and in_eval_mode:
        causes = (*causes, *_WITH_BATCH)
    if affine:
        causes = (*causes, *_AFFINE_CAUSES)
    noun = _noun([name for change in statistics for name in change.buffers])
    parts = [noun] * bool(statistics) + ["affine parameters"] * bool(affine)
    restored_parts = listing([noun.split()[-1], "parameters"][not statistics : 1 + bool(affine)])
    outcome = f"The original {restored_parts} have been restored." if restored else "The changes were kept."
    head = f"{listing(parts)} of {layers_text(len(changes))} changed inside {phrases.place}:"
    return "\n".join([head, *change_lines(changes), *causes, outcome])


def _noun(buffers: Sequence[str]) -> str:
    return "running statistics" if any(map(is_statistic, buffers)) else "buffers"


def assertion_text(changes: Sequence[StatsChange], function: str) -> str:
    """The error of ``assert_stats_unchanged`` about a function."""
    what = "the function" if function == "<lambda>" else f"{function}()"
    return "\n".join([f"running statistics of {layers_text(len(changes))} changed in {what}:", *change_lines(changes)])


def added_text(names: Sequence[str], phrases: Phrases) -> str:
    """The warning about layers that were added to the model inside a block."""
    shown = first_of([name or "(root)" for name in names])
    return (
        f"{shown} came into the model inside {phrases.place} and was not guarded there.\n"
        "Change the model before the block, or open another block after the change."
    )


def ignores_eval_text(layer: StatsLayer, observes: bool) -> str:
    """The error about buffers that move in eval mode, too, under ``use_running_stats=True``."""
    what = "observes in eval mode, too" if observes else "has a forward pre-hook, which may move them first"
    return (
        f"{layer_text(layer.names, type(layer.module).__name__)} {what}: use_running_stats=True cannot hold "
        f"{listing(layer.buffers)}.\n"
        'Give on_change="restore" or "rollback" instead, or leave them out of buffers=.'
    )


def unguarded_text(type_name: str, phrases: Phrases = FROZEN) -> str:
    """The warning about a model that has no layer with running statistics."""
    return (
        f"{type_name} has no layer with running statistics: {phrases.place} has nothing to guard.\n"
        "If one of its layers keeps statistics under other names, see bnguard.register_layer()."
    )


def idle_text(layers: Sequence[GuardedLayer], phrases: Phrases) -> str:
    """The warning about a run in which no guarded layer was called."""
    shown = first_of([layer_text(layer.names, layer.type) for layer in layers])
    return (
        f"no forward of a guarded layer ran inside {phrases.place}, while batches did: {shown}.\n"
        "Guard the model that runs. Some libraries make or copy it (model_init=, clone(), deepcopy())."
    )


def broadcast_text(changes: Sequence[StatsChange], sources: Sequence[int], restored: bool, phrases: Phrases) -> str:
    """The warning on a rank whose statistics ``DistributedDataParallel`` has overwritten with those of another rank."""
    outcome = "The original statistics have been restored." if restored else "The changes were kept."
    what = f"the statistics of {ranks_text(sources)} have overwritten others inside {phrases.place}:"
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


def unreadable_text(names: Sequence[str], type_name: str, buffer: str, what: str, phrases: Phrases | None) -> str:
    """The error about a tensor of a layer whose bits cannot be copied and compared."""
    place = "assert_stats_unchanged()" if phrases is None else phrases.place
    text = (
        f"{layer_text(names, type_name)}: {buffer} is {what}. {place} cannot copy and compare its bits.\n"
        "Make it an ordinary tensor first (dequantize(), to_dense(), float())"
    )
    if phrases is None:
        return f"{text}."
    way = (f"exclude=[{names[0] or '(root)'!r}]", "guard the other layers only")
    return "\n".join([f"{text}, or leave the layer out:", *phrases.choices(way)])


def traced_block_text(phrases: Phrases) -> str:
    """The warning about a block that begins in code that is being traced or exported."""
    return (
        f"{phrases.place} begins in code that is traced or exported: the resulting program is not guarded.\n"
        "Open the block around calls of the program, or export its layers in eval mode."
    )


def script_text(type_name: str) -> str:
    """The error of ``torch.jit.script()`` inside a block."""
    return (
        f"torch.jit.script() would compile the guard of a {type_name} along with it: script the model before or after\n"
        "the block, or a copy inside it, torch.jit.script(copy.deepcopy(model)). torch.jit.trace() leaves the guard out"
    )


IN_GRAPH_OF_CLONE: Final = (
    "a graph cannot tell a guarded layer from a clone that was made in the block by copying its __dict__: call the\n"
    "clone once before it is compiled"
)


def clones_text(type_name: str) -> str:
    """The error about a layer that is copied, pickled or run directly while clones of it have not run yet."""
    return (
        f"a {type_name} was cloned inside a block by copying its __dict__, and this call does not tell the clone from\n"
        "the layer. Call the module itself, model(input), not its forward(). Copy or pickle it again: the clones have\n"
        "been detached from the guard now"
    )


_UNHELD: Final = {
    "program": (
        "belongs to a program that was traced or exported in train mode",
        "Trace or export the model in eval mode",
    ),
    "script": ("is a ScriptModule in train mode, which runs no hooks", "Call eval() on it before the block"),
    "property": ("has a forward that is a property, which a guard cannot replace", "Make it a method"),
}


def batch_program_text(names: Sequence[str], type_name: str, why: str) -> str:
    """The error about ``use_running_stats=True`` for a layer that would normalise with the batch all the same."""
    what, remedy = _UNHELD[why]
    return (
        f"{layer_text(names, type_name)} {what}: it would normalise with the batch, not with its running statistics.\n"
        f"{remedy}, or leave out use_running_stats=True."
    )


def recorded_text(names: Sequence[str], type_name: str, phrases: Phrases) -> str:
    """The warning about tracing or exporting a layer in train mode under ``use_running_stats=True``."""
    return (
        f"{layer_text(names, type_name)} is traced or exported in train mode inside "
        f"{phrases.choice.format('use_running_stats=True')}.\n"
        "The program is not guarded: it normalises with the batch, and updates. Call model.eval() first, so that it\n"
        "normalises with the running statistics."
    )


_GRAPH: Final = "a compiled graph runs no hooks"
_VALUELESS: Final = (
    "not compared at exit: on the meta device, fake, or inside a transform, its statistics have no values"
)


def protection_text(layer: StatsLayer, policy: Policy, budget: int, is_compiled: bool, has_values: bool) -> str:
    """Describes how a layer is protected, for ``GuardedLayer.protection``.

    Args:
        layer: The layer.
        policy: How updates beyond the budget are handled.
        budget: The number of updates that the block allows the layer.
        is_compiled: Whether the layer is known to run in a compiled graph.
        has_values: Whether its statistics had values to compare with when the block began.
    """
    kind = layer.kind
    if kind.exit_only:
        return _exit_only(kind.exit_only, has_values)
    if is_compiled and not GUARDS_GRAPHS and (budget or policy.holds or policy.hides):
        how = "refused in a compiled graph, which takes torch 2.12"
    elif is_compiled and budget:
        counts = "num_batches_tracked" in layer.buffers and kind.counts
        how = "updates are counted by num_batches_tracked" if counts else "updates are not counted"
        return _exit_only(f"{_GRAPH}; {how}", has_values)
    elif is_compiled and not policy.holds:
        return _exit_only(_GRAPH, has_values)
    elif policy.holds:
        how = "held in its forward, in a compiled graph too" if is_compiled else "held in its forward"
        if kind.keeps_mode and policy.normalises_with == "running":
            how += ", which normalises as it was exported"
    elif policy.hides:
        how = "free to update"
    elif kind.predict is None:
        how = "compared after each forward"
    else:
        how = "updates counted in its forward" if budget else "checked before each forward"
    return f"{how}; {'compared at exit' if has_values else _VALUELESS}"


def _exit_only(reason: str, has_values: bool) -> str:
    return f"compared at exit only ({reason})" if has_values else _VALUELESS


def report_text(changes: Sequence[StatsChange], layers: Sequence[GuardedLayer], settings: Settings) -> str:
    """The text of a guard's ``report()``: the guarded layers, how they are protected, and all changes."""
    guard = settings.frontend.phrases.choice.format(settings.as_written)
    head = f"{guard} guards {layers_text(len(layers)) if layers else 'no layer'}."
    if not layers:
        return head
    kinds = list(dict.fromkeys(layer.protection for layer in layers))
    ways = [f"  {sum(layer.protection == kind for layer in layers)} {kind}" for kind in kinds]
    if not changes:
        return "\n".join([head, *ways, "No change."])
    return "\n".join([head, *ways, f"{layers_text(len(changes))} changed:", *change_lines(changes, limit=None)])


def change_lines(changes: Sequence[StatsChange], limit: int | None = _SHOWN) -> list[str]:
    """A line for each of the first ``limit`` changes, and how many more there are."""
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
        parts.append(f"{count_text(change.updates, 'update')} {verb}{first} at {change.place}")
    return f"{layer_text(change.names, change.type)}: {'; '.join(parts)}"


def layers_text(number: int) -> str:
    """A number of layers."""
    return count_text(number, "layer")


def _forwards(number: int) -> str:
    return "one" if number == 1 else str(number)
