"""What the commands ``audit`` and ``diff`` do."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from bnguard.cli.exit_codes import UsageError, exit_code_of
from bnguard.findings.audit import audit
from bnguard.findings.diff import diff
from bnguard.report import json as json_file
from bnguard.report.documents import audit_document, diff_document
from bnguard.report.files import Outputs
from bnguard.report.publish import publish

if TYPE_CHECKING:
    from bnguard.report.plots import Picture

__all__ = ["audit_target", "diff_states"]


def audit_target(target: str, outputs: Outputs) -> int:
    """Prints what is wrong with the model that ``module:callable`` makes.

    Returns:
        1 if there are findings worse than a note, 2 if something could not be written, else 0.

    Raises:
        UsageError: There is no such module or callable, or it makes no model.
    """
    findings = audit(_model_of(target))
    document = dataclasses.replace(audit_document(findings), title=f"bnguard audit {target}")
    is_written = publish(document, {"target": target, **json_file.of_findings(findings)}, outputs, "audit")
    return exit_code_of(any([finding.severity != "note" for finding in findings]), is_written)


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
        from bnguard.report.plots import diff_pictures  # needs an extra

        return diff_pictures(found.moved)

    is_written = publish(document, content, outputs, "diff", pictures)
    return exit_code_of(not found.is_clean, is_written)


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
