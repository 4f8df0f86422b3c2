"""``watch``: record who updates running statistics, without holding anything."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnguard import _every_forward
from bnguard._aside import aside
from bnguard._backwards import BackwardCounter
from bnguard._bits import below_transforms, digest_of, has_values, same_bits
from bnguard._broadcast import keeping_their_own, keeps_its_own
from bnguard._changes import StatsChange
from bnguard._claims import decide
from bnguard._drift import Drift, DriftSample, DriftSeries, drift_between, largest_mean_shift, sample_of, series_of
from bnguard._findings import Finding, findings_of
from bnguard._graphs import is_taken_in, object_at, outside_graphs, take_in
from bnguard._layers import INSTANCE_NORM, StatsLayer, tensor_table
from bnguard._ledger import Ledger, Line, Mode, StatsUpdates
from bnguard._model_calls import ModelCall, ModelCalls
from bnguard._output.document import as_text
from bnguard._output.documents import watch_document
from bnguard._ranks import Group, Ranks, check_group
from bnguard._report import name_text
from bnguard._sentry import sentries
from bnguard._sightings import sightings_in
from bnguard._stack import lent_tensors
from bnguard._steps import StepCounter
from bnguard._timeline import Timeline, UpdateSeries, updates_over_steps
from bnguard._tree import Tree, unwrapped
from bnguard._watch_ranks import Merged, Recorded, merge

__all__ = ["watch"]

_COMPILED: Final = Mode(compiled=True)
_MOST_SAMPLES: Final = 256
_MOST_NESTED: Final = 16  # forwards of one layer inside each other


@dataclass(slots=True)
class _Pending:
    """A forward under way of a layer of which only its statistics tell whether it updates."""

    versions: list[tuple[int, int]]
    call: ModelCall


class watch:  # noqa: N801  # lower case, as torch.no_grad
    """Records who updates running statistics: which layer, from which line, in which mode, how often.

    Nothing is held and nothing raised: the statistics move as they would. Nothing is read from the device until the
    end; a run of any length takes as much memory as it has layers and lines, and ``every=N`` as it has samples.

    ::

        with bnguard.watch(model) as record:
            train(model)
        print(record.report())

        record = bnguard.watch().start()         # every model in the process, also those that are made later
        ...
        record.stop()

    What a guard (``frozen``) prevents is no update. In a compiled graph no line can be seen: updates there are counted
    by ``num_batches_tracked``. What no forward explains is in ``unexplained``.

    In a distributed run the ranks put together what they have recorded when they stop, on the first of them, which
    waits for the others at most a minute; they report what they have seen themselves.

    Args:
        model: The model, or one layer; None for every model that runs in this process.
        every: Measure the drift at every so-many-th optimizer step, for ``series``. ``"auto"`` measures at 128 to 256
            steps of any run, evenly spaced, and at the end; None at the end only. One measurement reads and writes
            twice the statistics on their device, and waits for nothing.
        group: Of a distributed run, the process group whose ranks put their records together; None is the default
            group, False none, for a watch that not all ranks have.

    Raises:
        TypeError: ``model`` is no module, ``every`` no whole number, ``group`` no process group.
        ValueError: ``every`` is not positive, or another word than ``"auto"``.
    """

    def __init__(
        self, model: nn.Module | None = None, *, every: int | Literal["auto"] | None = None, group: Group = None
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"watch() takes a torch.nn.Module, or nothing for every model, got {type(model).__name__}")
        _check_every(every)
        check_group(group)
        self._group = group
        self._model = model
        self._every = every
        self._forget_all()

    def _forget_all(self) -> None:
        self._lock = threading.RLock()
        self._ledgers: dict[int, Ledger] = {}  # by id of the layer
        self._order: list[Ledger] = []  # as met, models in the order of state_dict()
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have been met
        self._tree: Tree | None = None
        self._pending: dict[tuple[int, int], list[_Pending]] = {}  # by thread and layer
        self._calls = ModelCalls()
        self._backwards = BackwardCounter()
        self._steps = StepCounter(None if self._every is None else self._sample)
        self._samples: list[DriftSample] = []
        self._interval = 1 if self._every in (None, "auto") else int(self._every)
        self._model_names: Counter[str] = Counter()
        self._timelines: defaultdict[str, Timeline] = defaultdict(Timeline)  # by line, in the order they updated first
        self.wants_results = False  # until there is something that only results tell
        self._is_open = False
        self._final: dict[int, dict[str, Tensor]] = {}  # by position: statistics at the end
        self._ranks: Ranks | None = None  # as soon as a model is met in a distributed run
        self._merged: Merged | None = None  # on the first of them, at the end

    # Enter and leave.

    @outside_graphs
    def __enter__(self) -> Self:
        return self.start()

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(wait=error is None)

    @outside_graphs
    def start(self) -> Self:
        """Records from now on; returns the watch. What an earlier run has recorded is forgotten.

        Raises:
            RuntimeError: It records already.
        """
        if self._is_open:
            raise RuntimeError("this watch records already: stop() it first, or make another one")
        self._forget_all()
        if self._model is not None:
            self._take_in(self._model)
        self._is_open = True
        self._backwards.open()
        self._steps.open()
        _every_forward.listen(self)
        return self

    @outside_graphs
    def stop(self, *, wait: bool = True) -> None:
        """Records no more, and compares the statistics with those of the beginning. Twice does nothing.

        Args:
            wait: In a distributed run: whether the first rank waits for what the others have recorded.
        """
        if not self._is_open:
            return
        self._is_open = False
        _every_forward.unlisten(self)
        self._steps.close()
        self._backwards.close()
        with self._lock:
            for ledger in self._order:
                ledger.close_step()
            if self._every == "auto":
                if self._samples and self._samples[-1].step == self._steps.count:
                    self._samples.pop()  # what came after that step counts, too
                self._measure(self._steps.count)
            self._final = {number: _copies(ledger.now()) for number, ledger in enumerate(self._order)}
        self._ranks = self._ranks or Ranks.of(self._group)
        if self._ranks is not None:
            with suppress(dist.DistError):  # the others are gone: what this one has recorded is left
                self._merged = merge(self._ranks, self._recorded(), waits=wait)

    # What was recorded.

    @property
    def updates(self) -> tuple[StatsUpdates, ...]:
        """Updates by layer, line and mode, in the order of ``state_dict()``, model by model."""
        return self._own_updates() if self._merged is None else self._merged.updates

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each layer that keeps a mean and a variance has moved from the beginning to the end, or to now."""
        drifts = []
        for number, ledger in enumerate(self._order):
            now, model = self._now(number, ledger), self._model_name(ledger)
            drift = drift_between(ledger.names, ledger.type, ledger.before, now, ledger.eps, model)
            if drift is not None:
                drifts.append(drift)
        return tuple(drifts)

    @property
    def series(self) -> DriftSeries:
        """How far each layer had moved from the beginning, at every ``every``-th optimizer step."""
        return series_of(
            self._samples, [name_text(ledger.names[0], self._model_name(ledger)) for ledger in self._order]
        )

    @property
    def update_series(self) -> UpdateSeries:
        """How many updates came from each line over the optimizer steps; compiled graphs have none."""
        lines: dict[str, list[Line]] = {site: [] for site in self._timelines}
        layers: Counter[str] = Counter()
        for ledger in self._order:
            layers.update({line.site for line in ledger.lines})
            for line in ledger.lines:
                lines[line.site].append(line)
        return updates_over_steps(
            [
                (site, layers[site], max([line.last_step for line in some]), self._timelines[site])
                for site, some in lines.items()
                if some
            ]
        )

    @property
    def unexplained(self) -> tuple[StatsChange, ...]:
        """Layers whose statistics have changed although no forward was seen that did it."""
        changes = []
        for number, ledger in enumerate(self._order):
            now = self._now(number, ledger)
            differing = tuple(
                [name for name in ledger.before if name not in now or not _same(ledger.before[name], now[name])]
            )
            if differing and not ledger.updates and not self._unseen(number, ledger):
                shift = largest_mean_shift(ledger.before, now, ledger.eps)
                changes.append(StatsChange(ledger.names, ledger.type, differing, 0, None, shift))
        return tuple(changes)

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many optimizer steps, updates and layers there have been so far; reads nothing from a device."""
        return self._steps.count, sum([ledger.updates for ledger in self._order]), len(self._order)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with what was recorded, the worst first."""
        return self._own_findings() if self._merged is None else self._merged.findings

    @property
    def rank(self) -> int:
        """The rank of this process in a distributed run; 0 where it is alone."""
        return 0 if self._ranks is None else self._ranks.me

    @property
    def speaks(self) -> bool:
        """Whether this process has the report of all ranks, or is alone."""
        return self._ranks is None or self._ranks.speaks

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks that have not told what they recorded; told to the first rank when it stops."""
        return () if self._merged is None else self._merged.missing

    def _own_updates(self) -> tuple[StatsUpdates, ...]:
        return tuple(
            [update for number, ledger in enumerate(self._order) for update in self._updates_of(number, ledger)]
        )

    def _own_findings(self) -> tuple[Finding, ...]:
        nows = [self._now(number, ledger) for number, ledger in enumerate(self._order)]
        labels = [name_text(ledger.names[0], self._model_name(ledger)) for ledger in self._order]
        return findings_of(sightings_in(self._order, labels, nows, self._steps.count > 0))

    def report(self) -> str:
        """What was recorded, as text: what is wrong first, then the lines that updated, then what moved most."""
        return as_text(watch_document(self))

    def __repr__(self) -> str:
        what = "every model" if self._model is None else f"a {type(self._model).__name__}"
        return f"<bnguard.watch of {what}, {'open' if self._is_open else 'closed'}>"

    # What torch calls.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Takes note of a forward that is about to begin."""
        call = self._calls.begin(module, sys._getframe(3))
        ledger = self._ledgers.get(id(module))
        if ledger is None:
            if self._model is not None:
                if module is self._model:
                    self._look_again()
                return
            if id(module) in self._known or getattr(module, "_is_replica", False):  # of DataParallel: gone soon
                return
            self._take_in(module)
            ledger = self._ledgers.get(id(module))
            if ledger is None:
                return
        elif module is self._model:
            self._look_again()
        predict = ledger.kind.predict
        if predict is None:
            self._wait(ledger, module, call)
        elif predict(module):
            if _is_prevented(module):
                ledger.held += 1
            elif ledger.has_own_tensors(module):
                with self._lock:
                    ledger.add(call, args, self._steps, self._backwards.count, self._timelines)
        else:
            ledger.add_evaluation(module)
            if not module.training and not self.wants_results and torch.is_grad_enabled():
                self._want_results()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes note of what a forward has done."""
        ledger = self._ledgers.get(id(module))
        if ledger is None:
            return
        if ledger.kind.predict is None:
            waiting = self._pending.get((threading.get_ident(), id(module)))
            if waiting:
                pending = waiting.pop()
                if _versions(ledger, module) != pending.versions:
                    with self._lock:
                        ledger.add(pending.call, args, self._steps, self._backwards.count, self._timelines)
                else:
                    ledger.add_evaluation(module)
        if not module.training and torch.is_grad_enabled():
            call = self._calls.under_way(sys._getframe(3))
            if call is not None:
                ledger.watch_backward(output, call)

    def traced(self, key: int) -> None:
        """Takes note of a module that a graph takes in."""
        ledger = self._ledgers.get(key)
        if ledger is None and self._model is None and key not in self._known:
            model = object_at(key)
            if isinstance(model, nn.Module):
                self._take_in(model)
            ledger = self._ledgers.get(key)
        module = None if ledger is None else ledger.module
        if ledger is not None and module is not None:
            ledger.is_compiled = True
            take_in(module)

    # Parts.

    @aside()
    def _take_in(self, model: nn.Module) -> None:
        """Records the layers of a model from now on."""
        self._ranks = self._ranks or Ranks.of(self._group)
        lent = lent_tensors()
        with self._lock:
            tree = Tree(model)
            if lent and any(
                [id(buffer) in lent for part in tree.layers for buffer in part.module.buffers(recurse=False)]
            ):
                return  # what it has now is not its own
            if self._model is not None:
                self._tree = tree
            else:
                for part in tree.modules:
                    key = id(part)
                    self._known[key] = weakref.ref(part, lambda _, key=key: self._forget(key))  # type: ignore[misc]  # a default
            fresh = [layer for layer in tree.layers if not self._is_known(layer)]
            if fresh:
                name = self._name_of(model)
                for layer in fresh:
                    self._open_ledger(layer, model, name)

    def _is_known(self, layer: StatsLayer) -> bool:
        known = self._ledgers.get(id(layer.module))
        return known is not None and known.module is layer.module

    def _name_of(self, model: nn.Module) -> str:
        """What to call a model where there are several; one that grows keeps its name."""
        if model is self._model and self._order:
            return self._order[0].model_name
        name = type(unwrapped(model)).__name__
        self._model_names[name] += 1
        number = self._model_names[name]
        return name if number == 1 else f"{name} {number}"

    def _recorded(self) -> Recorded:
        """For the other ranks."""
        modules = [module for ledger in self._order if (module := ledger.module) is not None]
        ids = keeping_their_own(modules)
        own = {
            name_text(ledger.names[0], self._model_name(ledger)): digest_of(self._final[number])
            for number, ledger in enumerate(self._order)
            if ledger.keeps_its_own or id(ledger.module) in ids
        }
        return Recorded(self._own_updates(), self._own_findings(), own)

    def _model_name(self, ledger: Ledger) -> str:
        """The name of a layer's model where that tells layers apart."""
        return ledger.model_name if self._model_names.total() > 1 else ""

    def _open_ledger(self, layer: StatsLayer, model: nn.Module, model_name: str) -> None:
        buffers = tensor_table(layer.module, "_buffers")
        present = {name: tensor for name in layer.buffers if (tensor := buffers.get(name)) is not None}
        ledger = Ledger(layer, model, model_name, _copies(present))
        ledger.keeps_its_own = keeps_its_own(model)
        self._ledgers[id(layer.module)] = ledger
        self._order.append(ledger)

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._ledgers.pop(key, None)  # stays in the order: what it did is still to be told

    def _look_again(self) -> None:
        """Takes in what has come into the model since."""
        if self._tree is not None and self._model is not None and not self._tree.has_same_modules():
            self._take_in(self._model)

    def _sample(self, step: int) -> None:
        """Measures the drift, where it is the turn of that step."""
        if step % self._interval:
            return
        with self._lock:
            self._measure(step)
            if self._every == "auto" and len(self._samples) >= _MOST_SAMPLES:
                self._interval *= 2
                self._samples = [sample for sample in self._samples if sample.step % self._interval == 0]

    def _measure(self, step: int) -> None:
        """Measures the drift on the device."""
        layers = [(number, ledger.before, ledger.now(), ledger.eps) for number, ledger in enumerate(self._order)]
        self._samples.append(sample_of(step, layers))

    def _wait(self, ledger: Ledger, module: nn.Module, call: ModelCall) -> None:
        if _is_prevented(module):
            ledger.held += 1
            return
        self._want_results()
        waiting = self._pending.setdefault((threading.get_ident(), id(module)), [])
        del waiting[:-_MOST_NESTED]  # of forwards that have failed
        waiting.append(_Pending(_versions(ledger, module), call))

    def _want_results(self) -> None:
        if not self.wants_results:
            self.wants_results = True
            _every_forward.interests_changed()

    def _now(self, number: int, ledger: Ledger) -> dict[str, Tensor]:
        return ledger.now() if self._is_open else self._final.get(number, {})

    def _updates_of(self, number: int, ledger: Ledger) -> list[StatsUpdates]:
        model = self._model_name(ledger)
        updates = [_as_record(ledger, line, model) for line in ledger.lines]
        unseen = self._unseen(number, ledger)
        if unseen:
            updates.append(StatsUpdates(ledger.names, ledger.type, None, _COMPILED, unseen, model=model))
        return updates

    def _unseen(self, number: int, ledger: Ledger) -> int:
        """Updates that a compiled graph has made, as far as the layer counts them."""
        module = ledger.module
        is_compiled = ledger.is_compiled or (module is not None and is_taken_in(module))
        if not is_compiled or ledger.kind is INSTANCE_NORM:
            return 0
        before, now = (values.get("num_batches_tracked") for values in (ledger.before, self._now(number, ledger)))
        if before is None or now is None:
            return 0
        return max(0, int(now) - int(before) - ledger.updates)


def _check_every(every: object) -> None:
    if every is None or every == "auto":
        return
    if isinstance(every, str):
        raise ValueError(f"every={every!r}: give a number of optimizer steps, or 'auto'")
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every must be a whole number of optimizer steps, or 'auto', got {every!r}")
    if every < 1:
        raise ValueError(f"every={every}: the number of optimizer steps must be positive")


def _as_record(ledger: Ledger, line: Line, model: str) -> StatsUpdates:
    return StatsUpdates(
        ledger.names,
        ledger.type,
        line.site,
        line.mode,
        line.count,
        line.first_step,
        line.last_step,
        line.batch_shape,
        line.fewest_values,
        line.small_batches,
        model,
    )


def _is_prevented(module: nn.Module) -> bool:
    """Whether a guard keeps the update of a forward from happening."""
    sentry = sentries.get(id(module))
    return sentry is not None and decide(sentry.claims).stance != "stand"


def _versions(ledger: Ledger, module: nn.Module) -> list[tuple[int, int]]:
    """Which tensors the statistics are, and how often each was written to: nothing is read from the device."""
    buffers = tensor_table(module, "_buffers")
    present = [tensor for name in ledger.buffers if (tensor := buffers.get(name)) is not None]
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in present]


@aside()
def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {name: below_transforms(tensor) for name, tensor in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in plain.items() if has_values(tensor)}


@aside()
def _same(one: Tensor, other: Tensor) -> bool:
    return same_bits(one, other.to(one.device, one.dtype))
