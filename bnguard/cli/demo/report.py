"""What the demo measured, as a table, and the error."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bnguard.cli.demo import DemoResult

__all__ = ["as_json", "show"]

_NOTES = """\
source: this backbone with the head it was trained with, in eval mode
largest shift: of a channel's running mean, in standard deviations
same bits: the source's output for one fixed test batch, before and after
new head: accuracy on shifted images in eval mode, on the frozen statistics;
  use_running_stats has trained it on these, restore on those of each batch
step time: relative to unguarded, the median over all steps
"""


def show(result: DemoResult) -> None:
    """Prints the table, and the error of the guard that raises."""
    console = Console(highlight=False, markup=False)
    console.print(
        f"A Conv-BN network learned scikit-learn's digits ({result.train_images} images for training, "
        f"{result.test_images} for testing). Then its backbone was frozen with requires_grad_(False), and a new head "
        "fine-tuned on shifted images in train mode. No optimizer touched the backbone: is the source network still "
        "what it was?\n"
    )
    console.print(_table(result))
    # print, because the console would wrap the lines.
    print(_NOTES)
    print('The same under on_change="raise", the default, ends at the first forward:\n')
    print(f"{type(result.error).__name__}: {result.error}")


def as_json(result: DemoResult) -> dict[str, Any]:
    """The numbers, for programs."""
    names = ("train_images", "test_images")
    return {
        **{name: getattr(result, name) for name in names},
        "runs": [dataclasses.asdict(run) for run in result.runs],
        "error": str(result.error),
    }


def _table(result: DemoResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("guard", no_wrap=True)
    titles = (
        "source\naccuracy\nbefore",
        "source\naccuracy\nafter",
        "largest\nshift",
        "same\nbits",
        "new\nhead",
        "step\ntime",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for run in result.runs:
        table.add_row(
            run.name,
            f"{run.source_before:.1%}",
            f"{run.source_after:.1%}",
            f"{run.largest_shift:.2f}",
            "yes" if run.is_same_output else "no",
            f"{run.new_head:.1%}",
            f"{run.step_time:.2f}",
        )
    return table
