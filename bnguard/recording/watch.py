"""``watch``: record who updates running statistics, without holding anything."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Final, Literal, Self

import torch.distributed as dist
from torch import Tensor, nn

from bnguard.findings.grouping import Finding, findings_of
from bnguard.findings.sightings import sightings_in
from bnguard.layers.bits import digest_of, same_bits
from bnguard.layers.drift import Drift, DriftSeries, drift_between, largest_mean_shift, series_of
from bnguard.layers.kinds import INSTANCE_NORM
from bnguard.recording.layer_log import Ledger, Line
from bnguard.recording.ranks import Merged, Recorded, merge
from bnguard.recording.recorder import Recorder, copies_of
from bnguard.recording.timeline import UpdateSeries, updates_over_steps
from bnguard.records import Mode, StatsChange, StatsUpdates
from bnguard.report.document import as_text
from bnguard.report.documents import watch_document
from bnguard.torch_internals.compile import is_taken_in, outside_graphs
from bnguard.torch_internals.distributed import keeping_their_own
from bnguard.torch_internals.ranks import Group, Ranks, check_group
from bnguard.torch_internals.tracing import aside

__all__ = ["watch"]

_COMPILED: Final = Mode(compiled=True)


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
        self._recorder = Recorder(self._model, self._every, self._group)
        self._is_open = False
        self._final: dict[int, dict[str, Tensor]] = {}  # by position: statistics at the end
        self._merged: Merged | None = None  # what all ranks have recorded, on the first of them, at the end

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
        self._recorder.open()
        self._is_open = True
        return self

    @outside_graphs
    def stop(self, *, wait: bool = True) -> None:
        """Records no more, and compares the statistics with those of the beginning. Twice does nothing.

        Args:
            wait: In a distributed run: whether the first rank waits for what the others have recorded; else it takes
                what comes within two seconds.
        """
        if not self._is_open:
            return
        self._is_open = False
        recorder = self._recorder
        recorder.close()
        self._final = {number: copies_of(ledger.now()) for number, ledger in enumerate(recorder.ledgers)}
        if recorder.ranks is not None:
            self._merge(recorder.ranks, wait)

    # What was recorded.

    @property
    def updates(self) -> tuple[StatsUpdates, ...]:
        """Updates by layer, line and mode, in the order of ``state_dict()``, model by model."""
        return self._own_updates() if self._merged is None else self._merged.updates

    @property
    def drift(self) -> tuple[Drift, ...]:
        """How far each layer that keeps a mean and a variance has moved from the beginning to the end, or to now."""
        drifts = []
        for number, ledger in enumerate(self._recorder.ledgers):
            now, model = self._now(number, ledger), self._recorder.model_of(ledger)
            drift = drift_between(ledger.names, ledger.type, ledger.before, now, ledger.eps, model)
            if drift is not None:
                drifts.append(drift)
        return tuple(drifts)

    @property
    def series(self) -> DriftSeries:
        """How far each layer had moved from the beginning, at every ``every``-th optimizer step."""
        return series_of(self._recorder.samples, [self._recorder.name_of(ledger) for ledger in self._recorder.ledgers])

    @property
    def update_series(self) -> UpdateSeries:
        """How many updates came from each line over the optimizer steps; compiled graphs have none."""
        lines: dict[str, list[Line]] = {site: [] for site in self._recorder.timelines}
        layers: Counter[str] = Counter()
        for ledger in self._recorder.ledgers:
            layers.update({line.site for line in ledger.lines})
            for line in ledger.lines:
                lines[line.site].append(line)
        return updates_over_steps(
            [
                (site, layers[site], max([line.last_step for line in some]), self._recorder.timelines[site])
                for site, some in lines.items()
                if some
            ]
        )

    @property
    def unexplained(self) -> tuple[StatsChange, ...]:
        """Layers whose statistics have changed although no forward was seen that did it."""
        changes = []
        for number, ledger in enumerate(self._recorder.ledgers):
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
        return (
            self._recorder.steps.count,
            sum([ledger.updates for ledger in self._recorder.ledgers]),
            len(self._recorder.ledgers),
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with what was recorded, the worst first."""
        return self._own_findings() if self._merged is None else self._merged.findings

    @property
    def rank(self) -> int:
        """The rank of this process in a distributed run; 0 where it is alone."""
        return 0 if self._recorder.ranks is None else self._recorder.ranks.me

    @property
    def speaks(self) -> bool:
        """Whether this process has the report of all ranks, or is alone."""
        return self._recorder.ranks is None or self._recorder.ranks.speaks

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks that have not told what they recorded; told to the first rank when it stops."""
        return () if self._merged is None else self._merged.missing

    def _own_updates(self) -> tuple[StatsUpdates, ...]:
        return tuple(
            [
                update
                for number, ledger in enumerate(self._recorder.ledgers)
                for update in self._updates_of(number, ledger)
            ]
        )

    def _own_findings(self) -> tuple[Finding, ...]:
        nows = [self._now(number, ledger) for number, ledger in enumerate(self._recorder.ledgers)]
        labels = [self._recorder.name_of(ledger) for ledger in self._recorder.ledgers]
        return findings_of(sightings_in(self._recorder.ledgers, labels, nows, self._recorder.steps.count > 0))

    def report(self) -> str:
        """What was recorded, as text: what is wrong first, then the lines that updated, then what moved most."""
        return as_text(watch_document(self))

    def __repr__(self) -> str:
        what = "every model" if self._model is None else f"a {type(self._model).__name__}"
        return f"<bnguard.watch of {what}, {'open' if self._is_open else 'closed'}>"

    # Parts.

    def _merge(self, ranks: Ranks, wait: bool) -> None:
        recorded = self._recorded()
        try:
            self._merged = merge(ranks, recorded, self._recorder.place, waits=wait)
        except (dist.DistError, RuntimeError):  # the others are gone: what this one has recorded is left
            missing = tuple([rank for rank in ranks.members if rank != ranks.me])
            self._merged = Merged(recorded.updates, recorded.findings, missing) if ranks.speaks else None
        ranks.release()

    def _recorded(self) -> Recorded:
        """For the other ranks."""
        modules = [module for ledger in self._recorder.ledgers if (module := ledger.module) is not None]
        ids = keeping_their_own(modules)
        own = {
            self._recorder.name_of(ledger): digest_of(self._final[number])
            for number, ledger in enumerate(self._recorder.ledgers)
            if ledger.keeps_its_own or id(ledger.module) in ids
        }
        return Recorded(self._own_updates(), self._own_findings(), own)

    def _now(self, number: int, ledger: Ledger) -> dict[str, Tensor]:
        return ledger.now() if self._is_open else self._final.get(number, {})

    def _updates_of(self, number: int, ledger: Ledger) -> list[StatsUpdates]:
        model = self._recorder.model_of(ledger)
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


@aside()
def _same(one: Tensor, other: Tensor) -> bool:
    return same_bits(one, other.to(one.device, one.dtype))
