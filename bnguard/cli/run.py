"""What the command ``run`` does: somebody's script under ``watch``, and a report however it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Literal

from bnguard.cli.execfile import Ending, NotFoundError, run_module, run_script, wait_for_threads
from bnguard.cli.exit_codes import USAGE, UsageError, exit_code_of
from bnguard.cli.progress import Progress
from bnguard.cli.sigterm import EXIT_CODE, BeforeTermination
from bnguard.errors import StatsChangedError
from bnguard.guard.auto_guard import Lookout
from bnguard.guard.options import Frontend, OnChange, Settings
from bnguard.guard.phrases import Phrases
from bnguard.pytest_plugin.requests import Guards
from bnguard.recording.watch import watch
from bnguard.report import json as json_file
from bnguard.report.documents import watch_document
from bnguard.report.files import Outputs
from bnguard.report.publish import publish

if TYPE_CHECKING:
    from bnguard.report.plots import Picture

__all__ = ["WatchedRun"]


class WatchedRun:
    """A script or a module that is run under ``watch``.

    Args:
        target: Path of the script, or name of the module.
        args: Its arguments.
        is_module: Whether it is a module.
        ends_process: Whether the process ends with it. Then its threads are waited for.
        fail_on: Codes of findings that make a run fail that has not failed by itself.
        frozen: Pattern of the layers that are guarded; None guards none.
        on_change: What becomes of their updates.
        every: At which optimizer steps the drift is measured, as in ``watch``.
        progress: Seconds between two lines on stderr about how far the run is; None prints none.
        outputs: What to write; absolute paths, since the script may change its directory.
    """

    def __init__(
        self,
        target: str,
        args: Sequence[str],
        *,
        is_module: bool = False,
        ends_process: bool = False,
        fail_on: frozenset[str] = frozenset(),
        frozen: str | None = None,
        on_change: OnChange = "raise",
        every: int | Literal["auto"] | None = None,
        progress: float | None = None,
        outputs: Outputs,
    ) -> None:
        self._target = target
        self._args = args
        self._is_module = is_module
        self._ends_process = ends_process
        self._fail_on = fail_on
        self._frozen = frozen
        self._progress = progress
        self._outputs = outputs
        self._record = watch(every=every)
        self._guards = Guards()
        self._lookout = None if frozen is None else Lookout(self._guards, _settings(frozen, on_change))

    def run(self) -> int:
        """Runs it, and prints the report, however it ends. Not to be done twice.

        Returns:
            The script's own exit code; where that is 0, 1 if a finding of ``fail_on`` was made or a guarded layer
            changed, 2 if something could not be written.

        Raises:
            UsageError: There is no such script or module.
        """
        process = os.getpid()
        with self._record, BeforeTermination(self._report_early) as termination:
            with ExitStack() as undo:
                if self._progress is not None:
                    undo.enter_context(Progress(self._record, self._progress))
                if self._lookout is not None:
                    undo.callback(self._lookout.end, for_good=True)
                    self._lookout.begin()
                ending = self._run_target()
                if os.getpid() != process:  # a child that the script has forked: the parent reports
                    ending.show()
                    return ending.exit_code
                if self._ends_process:
                    ending = wait_for_threads(ending)
            termination.leave_to_caller()  # what follows makes the report
            failure = self._end_guards(ending)
            self._record.stop(wait=ending.error is None)  # for other ranks, which may have failed likewise
            ending.show()
            _flush()
            notes = [] if failure is None else [str(failure)]
            if self._has_missed:
                notes.append(f"--frozen {self._frozen} matched no layer of the models that ran.")
            is_written = self._report(ending.exit_code, notes)
        if ending.is_interrupt:
            _die_of_interrupt()
        if ending.exit_code:
            return ending.exit_code
        if self._has_missed:
            print(f"bnguard run: {notes[-1]}", file=sys.stderr)
            return USAGE
        codes = [finding.code for finding in self._record.findings]
        return exit_code_of(failure is not None or not self._fail_on.isdisjoint(codes), is_written)

    @property
    def _has_missed(self) -> bool:
        """Whether nothing was met that was to be guarded."""
        return self._lookout is not None and not self._lookout.has_guarded

    def _run_target(self) -> Ending:
        try:
            run = run_module if self._is_module else run_script
            return run(self._target, self._args)
        except (OSError, NotFoundError) as error:
            raise UsageError(str(error)) from error
        except SyntaxError as error:
            return Ending(1, error.with_traceback(None))

    def _end_guards(self, ending: Ending) -> StatsChangedError | None:
        """What they have found, where nothing else has ended the script."""
        try:
            for text in self._guards.end(ending.error):
                print(f"bnguard: {text}", file=sys.stderr)
        except StatsChangedError as failure:
            return failure
        return None

    def _report_early(self) -> None:
        """The report of a run that SIGTERM ends."""
        self._record.stop(wait=False)
        if self._record.speaks:
            self._report(EXIT_CODE, ["SIGTERM has ended the run; this is what was recorded until then."])
            _flush()

    def _report(self, exit_code: int, notes: Sequence[str]) -> bool:
        """Of several ranks one has the report of all. Whether all could be written."""
        if not self._record.speaks:
            for note in notes:
                print(note, file=sys.stderr)
            return True
        document = watch_document(self._record)
        title = f"bnguard run {'-m ' if self._is_module else ''}{self._target}"
        document = dataclasses.replace(document, title=title, notes=(*document.notes, *notes))
        content = {"target": self._target, "exit_code": exit_code, **json_file.of_watch(self._record)}
        return publish(document, content, self._outputs, "run", self._pictures)

    def _pictures(self) -> list[Picture]:
        from bnguard.report.plots import watch_pictures  # needs an extra

        return watch_pictures(self._record.drift, self._record.series, self._record.update_series)


def _settings(frozen: str, on_change: OnChange) -> Settings:
    place = f"bnguard run --frozen {frozen}"
    phrases = Phrases(
        place,
        place,
        "{}",
        (),
        "the report lists them all",
        "use --on-change restore",
        (('on_change="restore"', "--on-change restore"), ("use_running_stats=True", "")),
    )
    return Settings(
        on_change, include=(frozen,), frontend=Frontend(phrases, has_coverage_warnings=False, is_outermost=True)
    )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a script may have closed or replaced it
            stream.flush()


def _die_of_interrupt() -> None:
    """Ends the process as Python does after Ctrl-C: of the signal, so that a shell script around it stops as well."""
    _flush()
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
