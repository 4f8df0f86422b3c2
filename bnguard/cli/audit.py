"""The command ``audit``: look at a model without running it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import TYPE_CHECKING, Any

from bnguard.cli.exit_codes import UsageError, exit_code_of
from bnguard.cli.options import Commands, add_outputs

if TYPE_CHECKING:
    from torch import nn

    from bnguard.report.files import Outputs


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "audit",
        help="look at a model without running it",
        description="Prints the findings about the running statistics of the model that a callable returns.",
    )
    parser.add_argument("target", metavar="module:callable", help="what returns the model, such as models:make_net")
    add_outputs(parser, "json", "html")
    parser.set_defaults(execute=lambda options, outputs: audit_target(options.target, outputs))


def audit_target(target: str, outputs: Outputs) -> int:
    """Prints the findings about the model that ``module:callable`` returns.

    Returns:
        1 if there are findings worse than a note, 2 if a file could not be written, else 0.

    Raises:
        UsageError: There is no such module or callable, or it does not return a model.
    """
    from bnguard.findings.audit import audit, audit_document, findings_content  # imports torch
    from bnguard.report.files import publish

    findings = audit(_model_of(target))
    document = dataclasses.replace(audit_document(findings), title=f"bnguard audit {target}")
    is_written = publish(document, {"target": target, **findings_content(findings)}, outputs, "audit")
    return exit_code_of(any([finding.severity != "note" for finding in findings]), is_written)


def _model_of(target: str) -> nn.Module:
    from torch import nn

    name, _, path = target.partition(":")
    if not path:
        raise UsageError(f"{target!r} names no callable: write module:callable, such as models:make_net")
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
        raise UsageError(f"{target!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model
