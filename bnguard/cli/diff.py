"""The command ``diff``: compare the running statistics of two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnguard.cli.exit_codes import UsageError, exit_code_of
from bnguard.cli.options import Commands, add_outputs

if TYPE_CHECKING:
    from bnguard.report.files import Outputs
    from bnguard.report.picture import Picture


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "diff",
        help="compare the running statistics of two checkpoints",
        description="Prints which layers changed between two checkpoint files, what is missing, and what is broken.",
    )
    parser.add_argument("before", metavar="BEFORE", help=".pt, .pth, .ckpt or .safetensors; no code in it is executed")
    parser.add_argument("after", metavar="AFTER", help="the later checkpoint")
    parser.add_argument("--key", metavar="KEY", help="where the state dict is in the files (default: the usual places)")
    add_outputs(parser, "json", "plot", "html")
    parser.set_defaults(
        execute=lambda options, outputs: diff_states(options.before, options.after, options.key, outputs)
    )


def diff_states(before: str, after: str, key: str | None, outputs: Outputs) -> int:
    """Prints what changed between two checkpoint files.

    Returns:
        1 if anything differs or is broken, 2 if a file could not be written, else 0.

    Raises:
        UsageError: A checkpoint cannot be read.
    """
    from bnguard.findings.diff import diff, diff_content, diff_document  # imports torch
    from bnguard.report.files import publish

    try:
        found = diff(before, after, key=key)
    except OSError as error:
        raise UsageError(f"expected a checkpoint file, got {error.filename!r}: {error.strerror}") from error
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    about = {"exit code": str(exit_code_of(not found.is_clean, is_written=True))}
    document = diff_document(found)._replace(title=f"bnguard diff {before} {after}", about=about)
    content = {"before": before, "after": after, **diff_content(found)}

    def pictures() -> list[Picture]:
        from bnguard.report.plots import diff_pictures  # needs an extra

        return diff_pictures(found.moved)

    is_written = publish(document, content, outputs, "diff", pictures)
    return exit_code_of(not found.is_clean, is_written)
