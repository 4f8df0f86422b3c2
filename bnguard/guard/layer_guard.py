"""See, judge and hold the forwards of one layer, for all guards around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bnguard.errors import BNGuardError
from bnguard.guard import hold as _hold
from bnguard.guard.copies import Equipment
from bnguard.guard.messages import script_text
from bnguard.guard.policy import Claim, Stance, Verdict, decide, settle
from bnguard.layers.bits import below_transforms, has_values, same_bits
from bnguard.layers.kinds import (
    INSTANCE_FORWARD,
    INSTANCE_NORM,
    SYNC_BATCH_NORM,
    StatsLayer,
    tensor_table,
)
from bnguard.torch_internals.checkpointing import current_region
from bnguard.torch_internals.compile import at_compile_time, take_in
from bnguard.torch_internals.functional_call import in_functional_call
from bnguard.torch_internals.tracing import aside, is_recorded, is_symbolic

__all__ = ["HOLDING", "Sentry", "forward_of_rebound", "sentries"]

HOLDING: Final = ("restore", "running")
sentries: Final[dict[int, Sentry]] = {}  # by id of the layer; kept by attach and detach


@at_compile_time
def _traced(key: int) -> None:
    """Notes that a graph takes in the layer of this id."""
    sentry = sentries.get(key)
    if sentry is not None and not torch.compiler.is_exporting():
        take_in(sentry.module)


@at_compile_time
def _recorded(key: int) -> None:
    """Has the blocks warn that a program is taken off the layer of this id, which they hold in eval mode."""
    sentry = sentries.get(key)
    for claim in () if sentry is None else sentry.claims:
        if claim.judge is not None and claim.stance == "running":
            claim.judge.recorded(claim)


@at_compile_time
def _is_lent(key: int) -> bool:
    """Whether ``functional_call`` lends the layer of this id the statistics that a graph is traced with.

    Only the tracer sees those: the layer itself keeps its own for the time being, unless the user has replaced them.
    """
    sentry = sentries.get(key)
    return sentry is None or sentry.keeps_its_own()


def forward_of_rebound(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer on which somebody has bound the function of a sentry's method anew.

    accelerate does, under mixed precision: it keeps ``model.forward.__func__``, and goes on calling it after the block.
    """
    sentry = sentries.get(id(module))
    if sentry is None or sentry.module is not module:
        return type(module).forward(module, *args, **kwargs)
    return sentry.forward(*args, **kwargs)


class Sentry(Equipment):
    """What stands on one layer while at least one guard is around it.

    Updates that can be predicted are judged in a forward pre-hook, as long as every guard only raises or warns. Where a
    guard holds or counts, or nothing can be predicted, a ``forward`` on the instance judges and holds. More on the
    instance keeps all of it out of copies and pickles, replicas and scripts. Once nobody claims the layer any more,
    whoever still keeps that ``forward`` gets the layer's own.
    """

    __slots__ = ("_known", "_names", "_on_cuda", "claims", "graph_order", "key", "kind", "order")

    def __init__(self, layer: StatsLayer) -> None:
        self.module = module = layer.module
        self.hooks_out = 0
        self._is_equipped = self._has_forward = False
        self._previous = module.__dict__.get("forward")
        self.key = id(module)
        self._names = layer.buffers
        self.kind = kind = layer.kind
        if self._previous is not None and kind.hold != "none":
            self.kind = INSTANCE_FORWARD
        self.claims: tuple[Claim, ...] = ()
        self.order: Stance | None = None
        self.graph_order: Stance | None = None
        self._on_cuda: bool | None = None  # not known yet
        self._remember()

    def serves_again(self, layer: StatsLayer) -> bool:
        """Whether this, which nobody claims any more, can stand on the layer again; if so, it is as a new one."""
        module = layer.module
        if module is not self.module or layer.kind is not self.kind or self.claims or "forward" in module.__dict__:
            return False
        self._on_cuda = None
        self._remember()
        return True

    def set_claims(self, claims: tuple[Claim, ...], order: Stance | None, graph_order: Stance | None) -> None:
        """Takes over ``claims``, the innermost first, and puts on or takes off what they need.

        Args:
            claims: Those.
            order: What ``standing_order`` says of them.
            graph_order: What ``graph_order`` says of them.
        """
        # First, so that a thread that is between two steps meets the new ones with either equipment.
        self.claims = claims
        self.order = order
        self.graph_order = graph_order
        kind = self.kind
        if kind.hold == "none":
            return
        if not claims:
            self.remove()
            return
        is_judged = order in ("raise", "warn") and kind.predict is not None
        # Not beside hooks of others: their handles know the dictionary of hooks, and copies of them would find ours.
        self.equip(is_judged and not self.has_foreign_hooks())

    # The pre-hook.

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Judges a forward that would update, before it runs."""
        predict = self.kind.predict
        if type(module) is not type(self.module):
            self.unhook(module)  # fusing has moved it to another module
            return
        if predict is None or not predict(module):
            return
        if torch.compiler.is_compiling():
            _traced(self.key)
            return
        claims = self.claims  # of the moment at which the forward begins
        if is_symbolic(args, {}) or self._is_foreign(module) or self._rejects(args):
            return
        self._pronounce(self._settle(claims))

    # The forward.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, as the guards around it want it."""
        if isinstance(self, nn.Module):
            return forward_of_rebound(self, *args, **kwargs)
        if torch.compiler.is_exporting():
            return self._exported(args, kwargs)
        module, claims, predict = self.module, self.claims, self.kind.predict  # claims of the moment it begins
        order = self._order_now(claims)
        if self._is_foreign(module):
            return self._original(*args, **kwargs)
        if order == "running" and (predict is None or module.training or predict(module)):
            return self._run_in_eval_mode(args, kwargs)
        if predict is not None:
            if not predict(module):
                return self._original(*args, **kwargs)
            if order == "restore":
                return self._run_held(args, kwargs)
            return self._run_judged(claims, args, kwargs)
        if order == "restore":
            return self._run_held(args, kwargs)
        if torch.compiler.is_compiling():
            _traced(self.key)
            return self._original(*args, **kwargs)
        if self._is_captured():
            return self._original(*args, **kwargs)
        if order == "warn":
            return self._run_observed(claims, args, kwargs)
        if order == "stand" and decide(claims) == Verdict("stand"):
            return self._original(*args, **kwargs)
        return self._run_on_trial(claims, args, kwargs)

    def _order_now(self, claims: tuple[Claim, ...]) -> str | None:
        """What would become of an update now; nothing is spent yet. None where a graph would have to count."""
        if self.order is not None:
            return self.order
        return self.graph_order if torch.compiler.is_compiling() else decide(claims).stance

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _held(self, statistics: dict[str, Tensor], training: bool | None = None) -> _hold.StandIn | _hold.Exchange:
        """The layer with ``statistics`` in place of its own."""
        if self._previous is not None:
            return _hold.Exchange(self.module, statistics, training, self._previous)
        return _hold.StandIn(self.module, statistics, training)

    def _run_held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer so that its update goes nowhere."""
        surroundings = self._surroundings(args, kwargs)
        if surroundings == "capture":
            return self._original(*args, **kwargs)
        is_program = surroundings == "record"
        held = self._in_place() if is_program else self._held(_hold.copies(self.module, self._names))
        with self._turn():
            return held.forward(*args, **kwargs)

    def _in_place(self) -> _hold.InPlace:
        """The layer itself, which becomes part of a program."""
        return _hold.InPlace(self.module, self._names, self._original)

    def _run_in_eval_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer as in eval mode."""
        module = self.module
        if self._surroundings(args, kwargs) in ("record", "capture"):
            if module.training:
                _recorded(self.key)
            return self._run_held(args, kwargs)
        reads_only = self.kind is SYNC_BATCH_NORM or (self.kind is INSTANCE_NORM and module.track_running_stats)
        statistics = {} if reads_only else _hold.copies(module, self._names)
        with self._turn():
            return self._held(statistics, training=False).forward(*args, **kwargs)

    def _turn(self) -> AbstractContextManager[object]:
        """Overlapping forwards on an exchanged layer share what they exchange: one at a time, where that is judged."""
        if self._previous is None or self.order in HOLDING or torch.compiler.is_compiling():
            return nullcontext()
        return _hold.exchange_turn

    def _run_judged(self, claims: tuple[Claim, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Judges an update that is known to come, then runs the layer accordingly."""
        if torch.compiler.is_compiling():
            _traced(self.key)
            return self._original(*args, **kwargs)
        if is_symbolic(args, kwargs) or self._rejects(args):
            return self._original(*args, **kwargs)
        verdict = self._settle(claims)
        self._pronounce(verdict)
        if verdict.stance == "restore":
            return self._run_held(args, kwargs)
        if verdict.stance == "running":
            return self._run_in_eval_mode(args, kwargs)
        with _within_budgets(verdict):
            return self._original(*args, **kwargs)

    def _run_observed(self, claims: tuple[Claim, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer as it is, and compares after the call."""
        before = _hold.copies_aside(self.module, self._names)
        result = self._original(*args, **kwargs)
        if self._differ(before, tensor_table(self.module, "_buffers")):
            self._pronounce(settle(claims))
        return result

    def _run_on_trial(self, claims: tuple[Claim, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the layer on copies of its statistics, and judges what it did to them."""
        # Compared with copies of our own: other threads may update the layer in the meantime.
        before = _hold.copies_aside(self.module, self._names)
        copies = _hold.copies_aside(self.module, self._names)
        held = self._in_place() if is_recorded(args, kwargs) else self._held(copies)
        with self._turn():
            try:
                result = held.forward(*args, **kwargs)
            except Exception:
                # A forward can fail after it has counted the batch. The error on its way is worth more than ours.
                self._conclude(claims, before, held.statistics(), failed=True)
                raise
            self._conclude(claims, before, held.statistics())
        return result

    def _conclude(
        self, claims: tuple[Claim, ...], before: dict[str, Tensor], after: dict[str, Tensor], failed: bool = False
    ) -> None:
        """Judges what a held forward did, and does it to the layer if it is to stand."""
        if not self._differ(before, after):
            return
        verdict = settle(claims)
        if not failed:
            self._pronounce(verdict)
        if verdict.stance == "stand":
            buffers = tensor_table(self.module, "_buffers")
            pairs = [(own, tensor) for name, tensor in after.items() if (own := buffers.get(name)) is not None]
            with _within_budgets(verdict), aside():
                for own, tensor in pairs:
                    own.data.copy_(below_transforms(tensor))

    def _differ(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        pairs = [(below_transforms(one.get(name)), below_transforms(other.get(name))) for name in self._names]
        with aside():
            return not all(
                [
                    same_bits(left, right)
                    for left, right in pairs
                    if left is not None and right is not None and has_values(left) and has_values(right)
                ]
            )

    @staticmethod
    def _pronounce(verdict: Verdict) -> None:
        if verdict.stance == "raise":
            assert verdict.decider is not None
            raise verdict.decider.court.stopped(verdict.decider)
        for claim in verdict.warned:
            claim.court.stood(claim)

    def _exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's own forward, for a program that is to hold no guard: nothing runs, and nothing updates."""
        if self.order == "running" and self.module.training:
            _recorded(self.key)
        return self._original(*args, **kwargs)

    def _settle(self, claims: tuple[Claim, ...]) -> Verdict:
        """The verdict on an update; while a CUDA graph is captured nothing runs: only an error is of use then."""
        if not self._is_captured():
            return settle(claims)
        verdict = decide(claims)
        return verdict if verdict.stance == "raise" else Verdict("stand")

    def _is_captured(self) -> bool:
        """Whether the forward becomes part of a CUDA graph."""
        if self._on_cuda is None:
            self._on_cuda = any([tensor is not None and tensor.is_cuda for _, tensor in self._own()])
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def _surroundings(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Literal["graph", "record", "capture"] | None:
        """What becomes of a forward that is to be held: part of a graph or of another program; None: it merely runs.

        Notes the graph, and tells the blocks that hold of a checkpointed region around it.
        """
        if torch.compiler.is_compiling():
            _traced(self.key)
            return "graph"
        region = current_region()
        if region is not None:
            for claim in self.claims:
                if claim.judge is not None and claim.stance in HOLDING:
                    claim.judge.checkpointed(region)
        if self._is_captured():
            return "capture"
        return "record" if is_recorded(args, kwargs) else None

    def _rejects(self, args: tuple[Any, ...]) -> bool:
        """Whether torch turns the input down before it counts the batch."""
        check = getattr(self.module, "_check_input_dim", None)
        if check is None or len(args) != 1:
            return False
        try:
            check(args[0])
        except Exception:  # whatever it is, the layer's own forward raises it again
            return True
        return False

    def refuse_script(self) -> nn.Module:
        """What ``torch.jit.script`` asks for first: it compiles a layer's source, and would compile ours."""
        if all([claim.judge is not None and claim.judge.only_watches for claim in self.claims]):
            plain: nn.Module = self.without_ours()
            return plain  # a script runs no hook: compared at the end
        raise BNGuardError(script_text(type(self.module).__name__))

    # Whose tensors are in the layer.

    def _remember(self) -> None:
        buffers = tensor_table(self.module, "_buffers")
        self._known = tuple([(name, buffers.get(name)) for name in self._names])

    def _own(self) -> tuple[tuple[str, Tensor | None], ...]:
        """The statistics that are known as the layer's own."""
        return self._known

    def keeps_its_own(self) -> bool:
        """Whether the layer has the statistics that are known as its own, on which graphs depend."""
        buffers = self.module._buffers
        return all([buffers.get(name) is tensor for name, tensor in self._own()])

    def _is_foreign(self, module: nn.Module) -> bool:
        """Whether a replica, or ``functional_call``, has other statistics in this call: their update is theirs.

        Statistics that the user replaced for good are the layer's own from then on.
        """
        buffers = module._buffers
        for name, tensor in self._own():
            if buffers.get(name) is not tensor:
                if torch.compiler.is_compiling():
                    return _is_lent(self.key)
                if module is not self.module:
                    return not self._shares_statistics(module)
                if in_functional_call():
                    return True
                self._remember()
                return False
        return False

    def replicate(self) -> nn.Module:
        """A replica for ``nn.DataParallel``, guarded as long as the layer is."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        self.strip(replica)
        replica.__dict__["forward"] = partial(self.run_replica, replica)
        return replica

    def run_replica(self, replica: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The forward of a replica."""
        sentry = type(self)(StatsLayer(replica, (), self._names, self.kind))
        sentry.kind, sentry._previous = self.kind, self._previous
        sentry.claims, sentry.order, sentry.graph_order = self.claims, self.order, self.graph_order
        # The first replica shares the layer's statistics. What the others update is dropped with them.
        if self.claims and (self.order == "running" or self._shares_statistics(replica)):
            return sentry.forward(*args, **kwargs)
        return sentry._original(*args, **kwargs)

    def _shares_statistics(self, replica: nn.Module) -> bool:
        theirs, own = replica._buffers, self.module._buffers
        return all([theirs.get(name) is own.get(name) for name in self._names])


@contextmanager
def _within_budgets(verdict: Verdict) -> Iterator[None]:
    """Around an update that some budgets pay for: their blocks take over what it writes, also if it fails."""
    deviations = [claim.court.allowing(claim) for claim in verdict.within]
    try:
        yield
    finally:
        for claim, deviation in zip(verdict.within, deviations, strict=True):
            claim.court.allowed(claim, deviation)
