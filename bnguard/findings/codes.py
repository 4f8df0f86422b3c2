"""What bnguard says about each kind of finding, BN001 to BN015."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bnguard.recording.layer_log import FEW_VALUES
from bnguard.words import count_text, listing, ranks_text, times_text

__all__ = ["CODES", "RUN", "STATIC", "VERDICTS", "Code", "Group", "Severity"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Code:
    """What a kind of finding says whatever the numbers.

    Attributes:
        title: What it is about.
        severity: As in ``Finding``.
        fix: What to do, with the reasons and alternatives.
        cure: The same in as few words as possible.
    """

    title: str
    severity: Severity
    fix: str
    cure: str


CODES: Final[dict[str, Code]] = {
    "BN001": Code(
        "frozen parameters, moving statistics",
        "warning",
        (
            "requires_grad_(False) does not stop running statistics: put frozen(model, use_running_stats=True) around"
            " the training, or call eval() on these layers after each train()"
        ),
        "use frozen(model, use_running_stats=True)",
    ),
    "BN002": Code(
        "train-mode forward without gradients",
        "warning",
        "call model.eval() before it; for a teacher that is to stay in train mode, frozen(teacher, 'restore')",
        "call model.eval() before it",
    ),
    "BN003": Code(
        "several updates per optimizer step",
        "warning",
        (
            "run the batches through the model in one forward, or choose which forward counts: frozen(model, "
            "'restore') around the others, or frozen(model, 'restore', updates=1) around the step"
        ),
        "run the batches in one forward, or use frozen(model, 'restore', updates=1)",
    ),
    "BN004": Code(
        "one layer, several places",
        "warning",
        "give each place a layer of its own: one running mean cannot describe two distributions",
        "give each place a layer of its own",
    ),
    "BN005": Code(
        "recomputed forward",
        "warning",
        "pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model) to torch.utils.checkpoint.checkpoint",
        "pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model) to checkpoint()",
    ),
    "BN006": Code(
        "too few values per channel",
        "warning",
        (
            "use larger batches, SyncBatchNorm over several devices, or statistics that stay: frozen(model, "
            "use_running_stats=True)"
        ),
        "use larger batches, or frozen(model, use_running_stats=True)",
    ),
    "BN007": Code(
        "momentum by another convention",
        "warning",
        "in torch new = (1 - momentum) * old + momentum * batch: write 0.1 for Keras' 0.9, 0.01 for 0.99",
        "write 0.1 for Keras' 0.9",
    ),
    "BN008": Code(
        "eval mode undone",
        "warning",
        ("model.train() reaches every layer: guard the run instead of the mode, frozen(model, use_running_stats=True)"),
        "use frozen(model, use_running_stats=True)",
    ),
    "BN009": Code(
        "statistics in half precision",
        "warning",
        ("keep the statistics in float32 (layer.float()) and use torch.autocast: small updates are rounded away"),
        "keep them in float32",
    ),
    "BN010": Code(
        "a frozen parameter that still moves",
        "warning",
        "leave it out of the optimizer, set its gradient to None, or hold it: frozen(model, affine=True)",
        "leave it out of the optimizer, or use frozen(model, affine=True)",
    ),
    "BN011": Code(
        "track_running_stats off on a layer that has statistics",
        "warning",
        (
            "for a freeze, use frozen(model, use_running_stats=True): train mode now normalises with the batch, and "
            "eval mode with the old statistics"
        ),
        "use frozen(model, use_running_stats=True)",
    ),
    "BN012": Code(
        "broken statistics",
        "error",
        ("restore a checkpoint from before, or call reset_running_stats() and torch.optim.swa_utils.update_bn()"),
        "restore a checkpoint from before",
    ),
    "BN013": Code(
        "wrong gradients",
        "error",
        (
            "call backward() on the eval-mode result before the train-mode forward, or hold the layer in between: "
            "frozen(model, 'restore')"
        ),
        "call backward() before the train-mode forward",
    ),
    "BN014": Code(
        "statistics never learned",
        "warning",
        "call torch.optim.swa_utils.update_bn(loader, model) before the evaluation",
        "call torch.optim.swa_utils.update_bn() first",
    ),
    "BN015": Code(
        "statistics that differ between ranks",
        "warning",
        (
            "a checkpoint or an evaluation of one rank has only what that one has seen: use SyncBatchNorm, or average "
            "the buffers (torch.distributed.all_reduce) before you save or evaluate"
        ),
        "use SyncBatchNorm, or average them before you save",
    ),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Several layers' share in one finding, and words for it.

    Attributes:
        layers: Their names.
        numbers: How often, of each; what that means depends on the code.
        detail: What the sentence needs besides.
        where: The user's line.
    """

    layers: tuple[str, ...]
    numbers: list[float]
    detail: Any
    where: str | None

    @property
    def count(self) -> str:
        """How many layers, in words."""
        return count_text(len(self.layers), "layer")

    @property
    def of(self) -> str:
        """The layers, in words."""
        return f"{self.count} ({self.names})"

    @property
    def names(self) -> str:
        """The first names."""
        shown = ", ".join([name or "(root)" for name in self.layers[:3]])
        return f"{shown} and {len(self.layers) - 3} more" if len(self.layers) > 3 else shown

    @property
    def be(self) -> str:
        """What the layers are."""
        return "are" if len(self.layers) > 1 else "is"

    @property
    def have(self) -> str:
        """What the layers do."""
        return "have" if len(self.layers) > 1 else "has"

    @property
    def most(self) -> int:
        """The largest of the numbers."""
        return int(max(self.numbers))

    @property
    def updates(self) -> str:
        """The largest of the numbers, as updates."""
        each = " each" if len(self.layers) > 1 else ""
        return f"{count_text(self.most, 'update')}{each}"


def _several(group: Group) -> str:
    most, sites = group.detail
    lines = "that line" if len(sites) == 1 else " and ".join(sites)
    return f"{group.of} updated up to {times_text(most)} in {count_text(group.most, 'optimizer step')}, from {lines}"


RUN: Final[Mapping[str, Callable[[Group], str]]] = {
    "BN001": lambda g: f"{g.of} made {g.updates} although no parameter of theirs is trained",
    "BN002": lambda g: f"{g.of} made {g.updates} in train mode where autograd did not record",
    "BN003": _several,
    "BN004": lambda g: (
        f"one forward of the model called {g.of} several times, in {count_text(g.most, 'optimizer step')}"
    ),
    "BN005": lambda g: f"{g.of} made {g.updates} when activation checkpointing ran the forward again in backward",
    "BN006": lambda g: f"{g.of} made {g.updates} from fewer than {FEW_VALUES} values per channel, down to {g.detail}",
    "BN007": lambda g: f"{g.of} {g.have} momentum {g.detail}: the running statistics are those of the last batches",
    "BN008": lambda g: f"{g.of} had been put into eval mode, came back into train mode and updated from here on",
    "BN009": lambda g: f"{g.of} {g.have} statistics in {g.detail.removeprefix('torch.')}",
    "BN010": lambda g: f"an optimizer moved {' and '.join(g.detail)} of {g.of}, with requires_grad=False",
    "BN011": lambda g: f"{g.of} ran {times_text(g.most)} in train mode with track_running_stats=False",
    "BN012": lambda g: (
        f"{g.of} {g.have} NaN, infinite or negative statistics"
        f"{', and had them at the beginning' if g.detail else ', and had none at the beginning'}"
    ),
    "BN013": lambda g: (
        f"{g.of} ran in eval mode at {g.detail}, then updated here, and then backward went through the eval-mode "
        f"result {times_text(g.most)}: its gradient was computed from the later statistics"
    ),
    "BN014": lambda g: (
        f"{g.of} was trained while a guard held it and evaluated with mean 0 and variance 1, which it never left"
    ),
    "BN015": lambda g: f"{g.of} ended with other statistics on {ranks_text(g.detail[1])} than on rank {g.detail[0]}",
}

STATIC: Final[Mapping[str, Callable[[Group], str]]] = {
    "BN001": lambda g: f"{g.of} {g.be} in train mode although no parameter of theirs is trained: statistics will move",
    "BN004": lambda g: f"{g.of} {g.be} used under several names",
    "BN007": RUN["BN007"],
    "BN008": lambda g: f"{g.of} {g.be} in eval mode in a model in train mode: the next train() reaches them",
    "BN009": RUN["BN009"],
    "BN010": lambda g: (
        f"the next step of {g.detail} moves {count_text(len(g.layers), 'parameter')} ({g.names}) with "
        "requires_grad=False, which still have a gradient"
    ),
    "BN011": lambda g: f"{g.of} {g.have} statistics, and track_running_stats=False",
    "BN012": lambda g: f"{g.of} {g.have} NaN, infinite or negative statistics",
    "BN014": lambda g: f"{g.of} {g.be} in eval mode with mean 0 and variance 1: no batch was ever counted",
}


# A run's findings in one line; the cure comes after it.
VERDICTS: Final[Mapping[str, Callable[[Group], str]]] = {
    "BN001": lambda g: f"{g.where} moved {g.count}, {g.updates}, whose parameters are frozen",
    "BN002": lambda g: f"{g.where} moved {g.count}, {g.updates}, without gradients",
    "BN003": lambda g: f"{listing(g.detail[1])} moved {g.count} up to {times_text(g.detail[0])} an optimizer step",
    "BN004": lambda g: f"{g.where} runs {g.of} several times in one forward",
    "BN005": lambda g: f"{g.where} moved {g.count} once more, {g.updates}, while a checkpoint was recomputed",
    "BN006": lambda g: f"{g.where} moved {g.count} with fewer than {FEW_VALUES} values per channel, {g.updates}",
    "BN007": lambda g: f"{g.of} {g.have} momentum {g.detail}, and remember the last batches only",
    "BN008": lambda g: f"{g.where} moved {g.count} that had been put into eval mode, before a train() undid it",
    "BN009": lambda g: f"{g.of} {g.have} statistics in {g.detail.removeprefix('torch.')}",
    "BN010": lambda g: f"an optimizer moved {listing(g.detail)} of {g.count}, with requires_grad=False",
    "BN011": lambda g: f"{g.of} ran {times_text(g.most)} in train mode with track_running_stats=False",
    "BN012": lambda g: f"{g.of} {g.have} NaN, infinite or negative statistics",
    "BN013": lambda g: f"{g.where} moved {g.count} between an eval-mode forward and its backward: wrong gradients",
    "BN014": lambda g: f"{g.of} was evaluated with mean 0 and variance 1, which it never left",
    "BN015": lambda g: f"{g.of} ended with other statistics on {ranks_text(g.detail[1])} than on rank {g.detail[0]}",
}
