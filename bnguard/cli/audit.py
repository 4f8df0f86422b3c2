"""The command ``audit``: look at a model without running it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from bnguard.cli.config import load_config
from bnguard.cli.exit_codes import ALL, UsageError, exit_code_of, fails
from bnguard.cli.options import COMMAND_LINE, Commands, add_ignore, add_output_format, add_outputs, chosen_ignores
from bnguard.findings.file_kinds import kind_of
from bnguard.findings.ignores import Ignore, filter_findings, with_ignored
from bnguard.report.places import path_from

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
    add_ignore(parser)
    add_outputs(parser, "json", "html")
    add_output_format(parser)
    parser.set_defaults(execute=_audit)


def _audit(options: argparse.Namespace, outputs: Outputs) -> int:
    given = chosen_ignores(options)
    return audit_target(options.target, load_config().ignore if given is None else given, outputs)


def audit_target(target: str, ignores: tuple[Ignore, ...], outputs: Outputs) -> int:
    """Prints the findings about the model that ``module:callable`` returns.

    Args:
        target: ``module:callable``.
        ignores: Entries that ignore findings.
        outputs: The files to write.

    Returns:
        1 if there are findings worse than a note, 2 if a file could not be written, else 0.

    Raises:
        UsageError: There is no such module or callable, or it does not return a model.
    """
    from bnguard.findings.audit import audit, audit_document, findings_content  # imports torch
    from bnguard.report.files import publish

    model = _model_of(target)
    filtered = filter_findings(audit(model), ignores, os.getcwd())
    # The entries of a project are about its runs: most have nothing to ignore in an audit.
    unused = tuple([one for one in filtered.unused if one.source == COMMAND_LINE])
    document = with_ignored(audit_document(filtered.kept, model), filtered._replace(unused=unused))
    file = sys.modules[target.partition(":")[0]].__file__ or ""  # a package in several folders has none
    has_found = fails(filtered.kept, frozenset([ALL]))
    document = document._replace(
        title=f"bnguard audit {target}",
        file=path_from(os.getcwd(), file),
        about={"exit code": str(exit_code_of(has_found, is_written=True))},
    )
    content = {"target": target, **findings_content(filtered.kept), **filtered.content()}
    is_written = publish(document, content, outputs, "audit")
    return exit_code_of(has_found, is_written)


def _hint(path: str, name: str = "NAME") -> str:
    """What to write instead of the path of a file."""
    if not os.path.isfile(path):
        return ""
    if not path.endswith(".py"):
        return f", which is {kind_of(path)}"
    return f": write {os.path.relpath(path)[:-3].replace(os.sep, '.')}:{name}"


def _model_of(target: str) -> nn.Module:
    from torch import nn

    name, _, path = target.partition(":")
    if not path:
        raise UsageError(f"expected module:callable, such as models:make_net, got {target!r}{_hint(target)}")
    if "/" in name or name.endswith(".py"):
        raise UsageError(f"expected module:callable, such as models:make_net, got {target!r}{_hint(name, path)}")
    sys.path.insert(0, "")
    try:
        value: Any = importlib.import_module(name)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        near = difflib.get_close_matches(str(error.name), dir(error.obj)) if isinstance(error, AttributeError) else []
        raise UsageError(f"{target!r}: {error}{f'; did you mean {near[0]!r}?' if near else ''}") from error
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
