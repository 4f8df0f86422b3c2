"""What the commands ``run``, ``audit`` and ``diff`` do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from bnguard import _json
from bnguard._audit import audit
from bnguard._diff import diff
from bnguard._findings import Finding
from bnguard._lookout import Lookout
from bnguard._report import Wording
from bnguard._run_script import Ending, run_module, run_script
from bnguard._settings import Manner, OnChange, Settings
from bnguard._test_guards import Guards
from bnguard._watch import watch
from bnguard.errors import StatsChangedError

__all__ = ["UsageError", "audit_target", "diff_states", "run_watched"]

CLEAN: Final = 0
FOUND: Final = 1


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
    json: Path | None = None,
) -> int:
    """Runs a script or a module under ``watch``, and prints the report, however it ends.

    Args:
        target: Path of the script, or name of the module.
        args: Its arguments.
        is_module: Whether it is a module.
        fail_on: Codes of findings that make a run fail that has not failed by itself.
        frozen: Pattern of the layers that are guarded; None guards none.
        on_change: What becomes of their updates.
        json: Where to write what was recorded.

    Returns:
        The script's own exit code; where that is 0, 1 if a finding of ``fail_on`` was made or a guarded layer changed.

    Raises:
        UsageError: There is no such script or module.
    """
    guards, lookout = Guards(), None
    if frozen is not None:
        place = f"bnguard run --frozen {frozen}"
        wording = Wording(place, place, "--on-change {}", (), "the report lists them all", "use --on-change restore")
        lookout = Lookout(
            guards,
            Settings(on_change, include=(frozen,), manner=Manner(wording, has_asides=False, is_outermost=True)),
        )
    record = watch()
    failure: StatsChangedError | None = None
    with record:
        if lookout is not None:
            lookout.begin()
        try:
            ending = _run(target, args, is_module)
        finally:
            if lookout is not None:
                lookout.end(for_good=True)
        try:
            for text in guards.end(ending.error):
                print(f"bnguard: {text}", file=sys.stderr)
        except StatsChangedError as found:
            failure = found
    ending.show()
    sys.stdout.flush()
    print(f"\n{_title(target, is_module)}\n{record.report()}")
    if failure is not None:
        print(f"\n{failure}")
    if lookout is not None and not lookout.has_guarded:
        print(f"\n--frozen {frozen} matched no layer of the models that ran.")
    if json is not None:
        _json.write(json, {"target": target, "exit_code": ending.exit_code, **_json.of_watch(record)})
    if ending.exit_code:
        return ending.exit_code
    return FOUND if failure is not None or _codes(record.findings) & fail_on else CLEAN


def audit_target(target: str, json: Path | None = None) -> int:
    """Prints what is wrong with the model that ``module:callable`` makes.

    Returns:
        1 if there are findings, else 0.

    Raises:
        UsageError: There is no such module or callable, or it makes no model.
    """
    findings = audit(_model_of(target))
    print("\n\n".join([str(finding) for finding in findings]) if findings else "no finding")
    if json is not None:
        _json.write(json, {"target": target, **_json.of_findings(findings)})
    return FOUND if findings else CLEAN


def diff_states(before: str, after: str, key: str | None = None, json: Path | None = None) -> int:
    """Prints what moved between two checkpoint files.

    Returns:
        1 if anything differs or is broken, else 0.

    Raises:
        UsageError: One cannot be read.
    """
    try:
        found = diff(before, after, key=key)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    print(found.report())
    if json is not None:
        _json.write(json, {"before": before, "after": after, **_json.of_diff(found)})
    return CLEAN if found.is_clean else FOUND


def _run(target: str, args: Sequence[str], is_module: bool) -> Ending:
    try:
        return run_module(target, args) if is_module else run_script(target, args)
    except (OSError, ImportError) as error:
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
    model = value if isinstance(value, nn.Module) else value() if callable(value) else value
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target!r} gives a {type(model).__name__}, no torch.nn.Module")
    return model


def _codes(findings: Iterable[Finding]) -> frozenset[str]:
    return frozenset([finding.code for finding in findings])


def _title(target: str, is_module: bool) -> str:
    return f"bnguard run {'-m ' if is_module else ''}{target}"
