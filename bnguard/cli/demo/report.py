"""Print what the demo measured: a table, and the error of the guard that raises."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bnguard.cli.demo.finetune import DemoResult

_NOTES = """\
source: the backbone with the head that it was trained with, in eval mode
largest shift: of a channel's running mean, in standard deviations
same bits: the output of the source for one fixed test batch, before and after
new head: accuracy on shifted images in eval mode, with the frozen statistics;
  use_running_stats trains the head with these, restore with those of each batch
step time: relative to unguarded, the median over all steps
"""


def show(result: DemoResult) -> None:
    """Prints the table, and the error of the guard that raises."""
    console = Console(highlight=False, markup=False)
    console.print(
        f"A Conv-BN network was trained on scikit-learn's digits ({result.train_images} images for training, "
        f"{result.test_images} for testing). Then its backbone was frozen with requires_grad_(False), and a new head "
        "was fine-tuned on shifted images in train mode. No optimizer has updated the backbone. Is the source network "
        "unchanged?\n"
    )
    console.print(_table(result))
    # print, because the console would wrap the lines.
    print(_NOTES)
    print('With on_change="raise", the default, the run ends at the first forward:\n')
    print(f"{type(result.error).__name__}: {result.error}")


def as_json(result: DemoResult) -> dict[str, Any]:
    """The numbers, for the JSON file."""
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
