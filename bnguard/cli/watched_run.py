"""A script or a module under ``watch``, with a report however it ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from bnguard.cli.children import Children
from bnguard.cli.execfile import Ending, NotFoundError, run_module, run_script, wait_for_threads
from bnguard.cli.exit_codes import USAGE, UsageError, exit_code_of, fails
from bnguard.cli.ignores import RunIgnores
from bnguard.cli.options import GuardOptions
from bnguard.cli.progress import Progress
from bnguard.cli.sigterm import EXIT_CODE, BeforeTermination
from bnguard.errors import StatsChangedError
from bnguard.findings.ignores import Ignore, with_ignored
from bnguard.guard.auto_guard import AutoGuard
from bnguard.guard.options import Frontend, Settings, check_settings
from bnguard.guard.phrases import Phrases
from bnguard.guard.requests import GuardRequests
from bnguard.recording.summary import watch_content, watch_document
from bnguard.recording.watch import watch
from bnguard.report.files import Outputs, publish
from bnguard.report.places import path_from
from bnguard.words import ranks_text

if TYPE_CHECKING:
    from bnguard.report.picture import Picture


class RunOptions(NamedTuple):
    """What to run, and what to record.

    Attributes:
        target: Path of the script, or name of the module.
        args: Its arguments.
        is_module: Whether ``target`` is a module.
        ends_process: Whether the process ends with the run, which then waits for the threads of the script.
        fail_on: Codes of findings with which a run fails that would otherwise exit with 0, or ``"all"``.
        ignores: Entries that ignore findings.
        frozen: Pattern of the layers to guard; None guards none.
        frozen_source: Where the pattern was written, in brackets; empty for the command line.
        guard_options: How to guard them, as in ``frozen``.
        buffers: Patterns of other buffers to record and to guard.
        every: At which optimizer steps to measure the drift, as in ``watch``.
        progress: Seconds between two lines of progress on stderr; None prints none.
        outputs: The files to write.
    """

    target: str
    args: Sequence[str]
    is_module: bool
    ends_process: bool
    fail_on: frozenset[str]
    ignores: tuple[Ignore, ...]
    frozen: str | None
    frozen_source: str
    guard_options: GuardOptions
    buffers: tuple[str, ...]
    every: int | Literal["auto"] | None
    progress: float | None
    outputs: Outputs


class WatchedRun:
    """A script or a module that is run under ``watch``. Can be run once."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._record = watch(every=options.every, buffers=options.buffers or None)
        self._ignores = RunIgnores(options.ignores)
        self._requests = GuardRequests()
        self._children = Children()
        self._unwatched = ""  # what the report is without
        self._auto_guard: AutoGuard | None = None
        if options.frozen is not None:
            self._auto_guard = AutoGuard(self._requests, _settings(options.frozen, options))

    def run(self) -> int:
        """Runs it, and prints the report, however it ends.

        Returns:
            The exit code of the script. If that is 0: 1 if there is a finding of ``fail_on`` or a guarded layer
            changed, 2 if ``frozen`` matched no layer, a file could not be written, or there is a ``fail_on`` and other
            processes have updated statistics unwatched.

        Raises:
            UsageError: There is no such script or module.
        """
        process = os.getpid()
        early = BeforeTermination(self._report_early)
        with self._guarding(), self._record, self._children, early as termination:
            with ExitStack() as undo:
                if self._options.progress is not None:
                    undo.enter_context(Progress(self._record, self._options.progress))
                undo.enter_context(self._guarding())  # which ends before the report
                ending = self._run_target()
                if os.getpid() != process:  # a child that the script has forked: its parent reports
                    ending.show()
                    return ending.exit_code
                if self._options.ends_process:
                    ending = wait_for_threads(ending)
            termination.leave_to_caller()  # the code below reports
            failure = self._end_guards(ending)
            self._record.stop()
            ending.show()
            _flush()
            notes = [] if failure is None else [str(failure)]
            if self._has_matched_nothing:
                pattern = f"{self._options.frozen}{self._options.frozen_source}"
                notes.append(f"--frozen {pattern} matched no layer of the models that ran.")
            is_written = self._report(ending.exit_code, notes)
        if ending.is_interrupt:
            _die_of_interrupt()
        if ending.exit_code:
            return ending.exit_code
        if self._has_matched_nothing:
            print(f"bnguard run: {notes[-1]}", file=sys.stderr)
            return USAGE
        has_failed = failure is not None or self._has_failed()
        if self._unwatched and self._options.fail_on and not has_failed:
            print(f"bnguard run: {self._unwatched}", file=sys.stderr)
            return USAGE
        return exit_code_of(has_failed, is_written)

    def _has_failed(self) -> bool:
        codes = self._options.fail_on
        return bool(codes) and fails(self._ignores.filter(self._record.findings).kept, codes)

    @property
    def _has_matched_nothing(self) -> bool:
        return self._auto_guard is not None and not self._auto_guard.has_guarded

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        """Guards models from here on. Outside of the watch, so that of a first forward the guard knows first."""
        if self._auto_guard is None:
            yield
            return
        try:
            self._auto_guard.begin()
            yield
        finally:
            self._auto_guard.end(for_good=True)

    def _run_target(self) -> Ending:
        options = self._options
        try:
            run = run_module if options.is_module else run_script
            return run(options.target, options.args)
        except (OSError, NotFoundError) as error:
            what = "a module" if options.is_module else "a Python script"
            raise UsageError(f"expected {what}, got {options.target!r}: {error}") from error
        except SyntaxError as error:
            return Ending(1, error.with_traceback(None))

    def _end_guards(self, ending: Ending) -> StatsChangedError | None:
        """Ends the guards. Returns what they found, unless that is a note on the exception of the script."""
        try:
            for text in self._requests.end(ending.error):
                print(f"bnguard run: {text}", file=sys.stderr)
        except StatsChangedError as failure:
            return failure
        return None

    def _report_early(self) -> None:
        """Reports a run that SIGTERM ends."""
        self._record.stop()
        if self._record.speaks:
            self._report(EXIT_CODE, ["SIGTERM has ended the run; this is what was recorded until then."])
            _flush()

    def _report(self, exit_code: int, notes: Sequence[str]) -> bool:
        """Prints the report, and writes the files. In a distributed run, one rank does so for all.

        Returns:
            Whether all files could be written.
        """
        if not self._record.speaks:
            for note in notes:
                print(note, file=sys.stderr)
            return True
        options = self._options
        summary = self._record.summary()
        children = self._children.note(has_run_models=summary.has_models)
        missing = f"{ranks_text(summary.missing_ranks)} did not report" if summary.missing_ranks else ""
        self._unwatched = missing or children
        notes = [*filter(None, [children]), *notes]
        filtered = self._ignores.filter(summary.findings)
        if exit_code:  # what a failed run has not reached is not unused
            filtered = filtered._replace(unused=())
        summary = summary._replace(findings=filtered.kept)
        document = with_ignored(watch_document(summary), filtered)
        title = f"bnguard run {'-m ' if options.is_module else ''}{options.target}"
        file = options.target
        if options.is_module:
            file = path_from(self._ignores.folder, str(vars(sys.modules["__main__"]).get("__file__") or ""))
        about = {"arguments": shlex.join(options.args), "exit code of the script": str(exit_code)}
        is_clean = document.is_clean and not (exit_code or notes)
        notes = (*document.notes, *notes)
        document = document._replace(title=title, file=file, notes=notes, about=about, is_clean=is_clean)
        content = {"target": options.target, "exit_code": exit_code, **watch_content(summary), **filtered.content()}
        return publish(document, content, options.outputs, "run", self._pictures)

    def _pictures(self) -> list[Picture]:
        from bnguard.report.plots import watch_pictures  # needs an extra

        record = self._record
        kept = self._ignores.filter(record.findings).kept
        return watch_pictures(record.drift, record.series, record.update_series, kept)


def _settings(pattern: str, options: RunOptions) -> Settings:
    place = f"bnguard run --frozen {pattern}"
    budget = options.guard_options.get("updates", 0)
    phrases = Phrases(
        place,
        place_with_budget=place.replace("{", "{{").replace("}", "}}") + " --updates {}",
        choice="{}",
        everything="the report lists them all",
        expected="use --on-change restore",
        renamed=(
            ('on_change="restore"', "--on-change restore"),
            (f'on_change="restore", updates={budget}', "--on-change restore"),
            ("use_running_stats=True", "--use-running-stats"),
        ),
        is_of_run=budget > 0,
    )
    frontend = Frontend(phrases, has_coverage_warnings=False, is_outermost=True)
    settings = check_settings(include=pattern, buffers=options.buffers or None, **options.guard_options)
    return settings._replace(frontend=frontend)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a script may have closed or replaced it
            stream.flush()


def _die_of_interrupt() -> None:
    """Ends the process by SIGINT, as Python does after Ctrl-C: a shell script around it then stops as well."""
    _flush()
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
