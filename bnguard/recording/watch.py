"""``watch``: record what updates running statistics, without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Literal, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from bnguard.findings.grouping import group_evidence
from bnguard.findings.rule import Evidence
from bnguard.layers.bits import count_of, digest_of
from bnguard.layers.drift import broken_spans, drift_between, series_of
from bnguard.layers.other_buffers import as_patterns, select_with_buffers
from bnguard.layers.tree import find_layers
from bnguard.recording.layer_listener import copies_of
from bnguard.recording.layer_log import LayerLog
from bnguard.recording.ranks import Merged, Recorded
from bnguard.recording.recorder import Recorder
from bnguard.recording.scalars import ScalarLog, ScalarWriter
from bnguard.recording.summary import WatchSummary, watch_document
from bnguard.recording.timeline import updates_over_steps
from bnguard.records import Drift, DriftSeries, Finding, Mode, StatsChange, StatsUpdates, UpdateSeries
from bnguard.report.document import as_text
from bnguard.torch_internals.compile import outside_graphs, was_compiled
from bnguard.torch_internals.distributed import modules_differing_per_rank

_COMPILED: Final = Mode(compiled=True)


class watch:  # noqa: N801  # lower case, as torch.no_grad
    """Records what updates running statistics: which layer, from which line, in which mode, how often.

    Nothing is held and nothing raised: the statistics move as they would without it. Nothing is read from the device
    until the end, but where something other than a forward has written into statistics, at most 64 times a layer.
    Memory grows with the number of layers and calling lines, and with ``every=N`` with the number of samples, but not
    with the length of the run.

    ::

        with bnguard.watch(model) as record:
            train(model)
        print(record.report())

        record = bnguard.watch().start()         # every model in the process, including those made later
        ...
        record.stop()

    An update that a guard (``frozen``) prevents is not recorded. In a compiled graph no line can be seen: updates there
    are counted by ``num_batches_tracked``. Changes that no forward explains are in ``unexplained``.

    In a distributed run each rank records for itself. When the watch stops, rank 0 gathers what the other ranks have
    recorded, for ten seconds at most, and names those that did not report; the other ranks do not wait.

    Args:
        model: The model, or one layer; None for every model that runs in this process.
        every: Measure the drift at every ``every``-th optimizer step, for ``series``. ``"auto"`` measures at 128 to 256
            evenly spaced steps of any run, and at the end; None at the end only. One measurement reads and writes
            the statistics twice on their device, without a sync.
        buffers: Record other buffers as well, as in ``frozen``; no finding is about them.

    Raises:
        TypeError: ``model`` is no module, ``every`` is no integer, or ``buffers`` is no pattern.
        ValueError: ``every`` is not positive, or a string other than ``"auto"``; a pattern matches no buffer of
            ``model``.
    """

    __module__ = "bnguard"  # as a user imports it

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        every: int | Literal["auto"] | None = None,
        buffers: str | Iterable[str] | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"watch() takes a torch.nn.Module, or nothing for every model, got {type(model).__name__}")
        _check_every(every)
        self._buffers = as_patterns(buffers)
        if model is not None and self._buffers:
            select_with_buffers(model, find_layers(model), self._buffers)  # a pattern that matches nothing
        self._model = model
        self._every = every
        self._forget_all()

    def _forget_all(self) -> None:
        self._recorder = Recorder(self._model, self._every, self._buffers)
        self._is_open = False
        self._final: dict[int, dict[str, Tensor]] = {}  # by position: statistics at the end
        self._merged: Merged | None = None  # on rank 0, at the end
        self._scalars: WeakKeyDictionary[object, ScalarLog] = WeakKeyDictionary()  # by writer

    # Enter and leave.

    @outside_graphs
    def __enter__(self) -> Self:
        return self._begin(is_started=False)

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        except BaseException:  # see Note [Ctrl-C]
            self._is_open = False
            self._recorder.detach()
            raise

    @outside_graphs
    def start(self) -> Self:
        """Starts recording, and returns the watch. What it has recorded before is forgotten.

        Raises:
            RuntimeError: It is recording already.
        """
        return self._begin(is_started=True)

    def _begin(self, *, is_started: bool) -> Self:
        if self._is_open:
            raise RuntimeError("this watch records already: stop() it first, or make another one")
        self._forget_all()
        self._is_open = True
        try:
            self._recorder.open(None if is_started else self)
            return self
        except BaseException:
            self._is_open = False
            self._recorder.detach()
            raise

    @outside_graphs
    def stop(self) -> None:
        """Stops recording, and compares the statistics with those of the beginning. Twice has no effect."""
        self.__exit__(None, None, None)

    def _end(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        recorder = self._recorder
        recorder.close()
        self._final = {number: copies_of(log.now()) for number, log in enumerate(recorder.logs)}
        if recorder.ranks is not None:
            self._merged = recorder.ranks.exchange(self._recorded(), recorder.place)

    # What was recorded.

    @property
    def updates(self) -> tuple[StatsUpdates, ...]:
        """Updates by layer, line and mode, in the order of ``state_dict()``, model by model."""
        return self._own_updates() if self._merged is None else self._merged.updates

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each layer with a mean and a variance has moved from the beginning to the end, or until now."""
        drifts = []
        for number, log in enumerate(self._recorder.logs):
            now, model = self._now(number, log), self._recorder.model_of(log)
            drift = drift_between(log.names, log.type, log.before, now, log.eps, model)
            if drift is not None:
                drifts.append(drift)
        return tuple(drifts)

    @property
    def series(self) -> DriftSeries:
        """How far each layer had moved from the beginning, at every ``every``-th optimizer step."""
        return series_of(self._recorder.samples, [self._recorder.name_of(log) for log in self._recorder.logs])

    @property
    def update_series(self) -> UpdateSeries:
        """How many updates came from each line over the optimizer steps; compiled graphs have none."""
        return updates_over_steps(self._recorder.timelines, [log.sites for log in self._recorder.logs])

    @property
    def unexplained(self) -> tuple[StatsChange, ...]:
        """Layers whose statistics have changed although no forward was seen that did it."""
        changes = []
        for number, log in enumerate(self._recorder.logs):
            change = log.change(self._now(number, log))
            if change is not None and not log.updates and not self._unseen(number, log):
                changes.append(dataclasses.replace(change, model=self._recorder.model_of(log)))
        return tuple(changes)

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many optimizer steps, updates and layers there have been so far; no device sync."""
        logs = self._recorder.logs
        return self._recorder.steps.count, sum([log.updates for log in logs]), len(logs)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with what was recorded, the most severe first."""
        return self._own_findings() if self._merged is None else self._merged.findings

    @property
    def rank(self) -> int:
        """The rank of this process in a distributed run; 0 for a single process."""
        return 0 if self._recorder.ranks is None else self._recorder.ranks.rank

    @property
    def speaks(self) -> bool:
        """Whether this process makes the report, as rank 0 and a single process do."""
        return self.rank == 0

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks whose records did not come in time; known on rank 0 after the end."""
        return () if self._merged is None else self._merged.missing

    def log_to(self, writer: ScalarWriter, prefix: str = "bnguard") -> None:
        """Writes what was recorded as scalars, for TensorBoard: how far each layer has moved, and who updates it.

        ::

            with bnguard.watch(model, every=100) as record:
                for epoch in range(epochs):
                    train(model)
                    record.log_to(writer)     # what is new; or once, when the watch has stopped
            record.log_to(writer)

        Tags are ``bnguard/divergence/LAYER`` (nats) and ``bnguard/mean_shift/LAYER`` (standard deviations) at each step
        at which ``every`` measures, else once when the watch has stopped; and ``bnguard/updates/LINE``, the updates per
        layer and optimizer step: plain training has 1. Each call writes what is new since the last one.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or another object with
                ``add_scalar(tag, value, step)``.
            prefix: What all tags begin with.

        Raises:
            TypeError: ``writer`` has no ``add_scalar()``.
        """
        if isinstance(writer, type) or not callable(getattr(writer, "add_scalar", None)):
            what = f"the class {writer.__name__}" if isinstance(writer, type) else type(writer).__name__
            raise TypeError(f"log_to() takes a writer with add_scalar(), such as a SummaryWriter, got {what}")
        log = self._scalars.setdefault(writer, ScalarLog())
        series = self.series
        log.write_drift(writer, prefix, series)
        updates = self.update_series
        if not self._is_open:
            if not series.steps:
                log.write_end(writer, prefix, self.drift, self._recorder.steps.count)
            log.write_updates(writer, prefix, updates, updates.end)
        else:
            log.write_updates(writer, prefix, updates, updates.end - 1)  # the last step may go on

    def summary(self) -> WatchSummary:
        """All that was recorded, for a report."""
        return WatchSummary(
            self.findings,
            self.updates,
            self.unexplained,
            self.drift,
            self.series,
            self.update_series,
            len(self._recorder.logs),
            self.rank,
            self.speaks,
            self.missing_ranks,
            self._recorder.unwatched.has_models,
            self._recorder.unwatched.summary,
            self._recorder.unwatched.note,
        )

    def report(self) -> str:
        """What was recorded, as text: findings first, then the lines that updated, then what moved most."""
        return as_text(watch_document(self.summary()))

    def __repr__(self) -> str:
        what = "every model" if self._model is None else f"a {type(self._model).__name__}"
        return f"<bnguard.watch of {what}, {'open' if self._is_open else 'closed'}>"

    # Parts.

    def _own_updates(self) -> tuple[StatsUpdates, ...]:
        updates: list[StatsUpdates] = []
        for number, log in enumerate(self._recorder.logs):
            model = self._recorder.model_of(log)
            updates += log.records(model)
            unseen = self._unseen(number, log)
            if unseen:
                updates.append(StatsUpdates(log.names, log.type, None, _COMPILED, unseen, model=model))
        return tuple(updates)

    def _own_findings(self) -> tuple[Finding, ...]:
        recorder = self._recorder
        learned: dict[str, int] = {}
        for site in [site for log in recorder.logs for site in log.sites]:
            learned[site.site] = max(learned.get(site.site, 0), site.learned)
        evidence: list[Evidence] = []
        broken = broken_spans(recorder.samples, len(recorder.logs))
        for number, log in enumerate(recorder.logs):
            name, now = recorder.name_of(log), self._now(number, log)
            evidence += log.evidence(name, now, learned, recorder.steps.ticks, broken.get(number))
        return group_evidence(evidence)

    def _recorded(self) -> Recorded:
        """For the other ranks."""
        logs = self._recorder.logs
        ids = modules_differing_per_rank([module for log in logs if (module := log.module) is not None])
        digests = {
            self._recorder.name_of(log): digest_of(self._final[number])
            for number, log in enumerate(logs)
            if log.differs_per_rank or id(log.module) in ids
        }
        return Recorded(self._own_updates(), self._own_findings(), digests)

    def _now(self, number: int, log: LayerLog) -> dict[str, Tensor]:
        return self._final[number] if number in self._final else log.now()  # open, or its end was interrupted

    def _unseen(self, number: int, log: LayerLog) -> int:
        """Updates that a compiled graph has made, if the layer counts them."""
        module = log.module
        is_compiled = log.is_compiled or (module is not None and was_compiled(module))
        if not is_compiled or not log.kind.counts:
            return 0
        before, now = count_of(log.before), count_of(self._now(number, log))
        return 0 if before is None or now is None else max(0, now - before - log.updates)


def _check_every(every: object) -> None:
    if every is None or every == "auto":
        return
    if isinstance(every, str):
        raise ValueError(f"every={every!r}: give a number of optimizer steps, or 'auto'")
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every must be a whole number of optimizer steps, or 'auto', got {every!r}")
    if every < 1:
        raise ValueError(f"every={every}: the number of optimizer steps must be positive")
