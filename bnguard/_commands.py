"""What the commands ``run``, ``audit`` and ``diff`` do."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from torch import nn

from bnguard._audit import audit
from bnguard._diff import diff
from bnguard._findings import Finding
from bnguard._lookout import Lookout
from bnguard._output import json_file, terminal
from bnguard._output.document import Document
from bnguard._output.documents import audit_document, diff_document, watch_document
from bnguard._output.files import Outputs, no_pictures
from bnguard._progress import Progress
from bnguard._report import Wording
from bnguard._run_script import Ending, NotFoundError, run_module, run_script, wait_for_threads
from bnguard._settings import Manner, OnChange, Settings
from bnguard._test_guards import Guards
from bnguard._watch import watch
from bnguard.errors import StatsChangedError

if TYPE_CHECKING:
    from bnguard._output.pictures import Picture

__all__ = ["UsageError", "audit_target", "diff_states", "run_watched"]

CLEAN: Final = 0
FOUND: Final = 1
USAGE: Final = 2


class UsageError(Exception):
    """The user has asked for something that is not there; the text says what."""


def run_watched(
    target: str,
    args: Sequence[str],
    *,
    is_module: bool = False,
    fail_on: frozenset[str] = frozenset(),
    frozen: str | None = None,
    on_change: OnChange = "raise",
    every: int | Literal["auto"] | None = None,
    progress: float | None = None,
    outputs: Outputs,
) -> int:
    """Runs a script or a module under ``watch``, and prints the report, however it ends.

    Args:
        target: Path of the script, or name of the module.
        args: Its arguments.
        is_module: Whether it is a module.
        fail_on: Codes of findings that make a run fail that has not failed by itself.
        frozen: Pattern of the layers that are guarded; None guards none.
        on_change: What becomes of their updates.
        every: At which optimizer steps the drift is measured, as in ``watch``.
        progress: Seconds between two lines on stderr about how far the run is; None prints none.
        outputs: What to write; absolute paths, since the script may change its directory.

    Returns:
        The script's own exit code; where that is 0, 1 if a finding of ``fail_on`` was made or a guarded layer changed,
        2 if something could not be written.

    Raises:
        UsageError: There is no such script or module.
    """
    guards, lookout = Guards(), None
    if frozen is not None:
        place = f"bnguard run --frozen {frozen}"
        wording = Wording(
            place,
            place,
            "{}",
            (),
            "the report lists them all",
            "use --on-change restore",
            (('on_change="restore"', "--on-change restore"), ("use_running_stats=True", "")),
        )
        lookout = Lookout(
            guards,
            Settings(on_change, include=(frozen,), manner=Manner(wording, has_asides=False, is_outermost=True)),
        )
    record, process = watch(every=every), os.getpid()
    failure: StatsChangedError | None = None
    with record:
        with nullcontext() if progress is None else Progress(record, progress):
            if lookout is not None:
                lookout.begin()
            try:
                ending = _run(target, args, is_module)
                if os.getpid() != process:  # a child that the script has forked: the parent reports
                    ending.show()
                    return ending.exit_code
                wait_for_threads()
            finally:
                if lookout is not None:
                    lookout.end(for_good=True)
        try:
            for text in guards.end(ending.error):
                print(f"bnguard: {text}", file=sys.stderr)
        except StatsChangedError as found:
            failure = found
        record.stop(wait=ending.error is None)  # for other ranks, which may have failed likewise
    ending.show()
    with suppress(AttributeError, ValueError, OSError):  # a script may have closed or replaced it
        sys.stdout.flush()
    notes = [] if failure is None else [str(failure)]
    has_missed = lookout is not None and not lookout.has_guarded
    if has_missed:
        notes.append(f"--frozen {frozen} matched no layer of the models that ran.")
    document = dataclasses.replace(
        watch_document(record),
        title=f"bnguard run {'-m ' if is_module else ''}{target}",
        notes=tuple(notes),
    )
    written = CLEAN
    if record.speaks:  # of several ranks one has the report of all
        content = {"target": target, "exit_code": ending.exit_code, **json_file.of_watch(record)}
        written = _show(document, content, outputs, "run", lambda: _pictures_of(record))
    elif notes:
        print("\n".join(notes), file=sys.stderr)
    if not record.speaks and ending.error is not None:  # the one that reports for all may be stopped now
        print(f"\n{record.report()}", file=sys.stderr)
    if ending.is_interrupt:
        _die_of_interrupt()
    if ending.exit_code:
        return ending.exit_code
    if has_missed:
        print(f"bnguard run: {notes[-1]}", file=sys.stderr)
        return USAGE
    return FOUND if failure is not None or _codes(record.findings) & fail_on else written


def audit_target(target: str, outputs: Outputs) -> int:
    """Prints what is wrong with the model that ``module:callable`` makes.

    Returns:
        1 if there are findings worse than a note, 2 if something could not be written, else 0.

    Raises:
        UsageError: There is no such module or callable, or it makes no model.
    """
    findings = audit(_model_of(target))
    document = dataclasses.replace(audit_document(findings), title=f"bnguard audit {target}")
    written = _show(document, {"target": target, **json_file.of_findings(findings)}, outputs, "audit")
    return FOUND if any([finding.severity != "note" for finding in findings]) else written


def diff_states(before: str, after: str, key: str | None, outputs: Outputs) -> int:
    """Prints what moved between two checkpoint files.

    Returns:
        1 if anything differs or is broken, 2 if something could not be written, else 0.

    Raises:
        UsageError: One cannot be read.
    """
    try:
        found = diff(before, after, key=key)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    document = dataclasses.replace(diff_document(found), title=f"bnguard diff {before} {after}")
    content = {"before": before, "after": after, **json_file.of_diff(found)}

    def pictures() -> list[Picture]:
        from bnguard._output.pictures import diff_pictures  # needs an extra

        return diff_pictures(found.moved)

    written = _show(document, content, outputs, "diff", pictures)
    return written if found.is_clean else FOUND


def _show(
    document: Document,
    content: Mapping[str, Any],
    outputs: Outputs,
    command: str,
    pictures: Callable[[], list[Picture]] = no_pictures,
) -> int:
    """Prints a report, and writes the files."""
    if outputs.paths:
        more = "\n".join([f"Written: {path}" for path in outputs.paths])
    else:
        more = "More: --html FILE has all of it, --json FILE for programs."
    shown = dataclasses.replace(document, more=more if document.tables or outputs.paths else "")
    terminal.show(shown, apart=command == "run")  # from what the script has printed
    problems = outputs.write(document, content, pictures)
    for problem in problems:
        print(f"bnguard {command}: {problem}", file=sys.stderr)
    return USAGE if problems else CLEAN


def _die_of_interrupt() -> None:
    """Ends the process as Python does after Ctrl-C: of the signal, so that a shell script around it stops as well."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.flush()
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _pictures_of(record: watch) -> list[Picture]:
    from bnguard._output.pictures import watch_pictures  # needs an extra

    return watch_pictures(record.drift, record.series, record.update_series)


def _run(target: str, args: Sequence[str], is_module: bool) -> Ending:
    try:
        return run_module(target, args) if is_module else run_script(target, args)
    except (OSError, NotFoundError) as error:
        raise UsageError(str(error)) from error
    except SyntaxError as error:
        return Ending(1, error.with_traceback(None))


def _model_of(target: str) -> nn.Module:
    name, _, path = target.partition(":")
    if not path:
        raise UsageError(f"{target!r} names no callable: write module:callable, as in models:make_net")
    sys.path.insert(0, "")
    try:
        value: Any = importlib.import_module(name)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{target!r}: {error}") from error
    finally:
        sys.path.remove("")
    try:
        model = value() if callable(value) and not isinstance(value, nn.Module) else value
    except Exception as error:
        raise UsageError(
            f"{target!r} raised {type(error).__name__}: {error}; it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target!r} gives a {type(model).__name__}, no torch.nn.Module")
    return model


def _codes(findings: Iterable[Finding]) -> frozenset[str]:
    return frozenset([finding.code for finding in findings])
