"""Print what the demo measured: the old head, the new head, and the error of the guard that raises."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from bnguard.cli.demo.finetune import DemoResult, FineTuning

_WIDEST: Final = 88  # columns
_ABOUT: Final = """\
Two heads share a backbone that requires_grad_(False) has frozen. It was trained with the old head on scikit-learn's \
digits ({train_images} images for training, {test_images} for testing). Now the new head is fine-tuned on shifted \
images, in train mode; nothing trains the old head or the backbone. What becomes of the old head?"""
_VERDICT: Final = "Without a guard it {goes} from {before:.1%} to {after:.1%}. With a guard it stays at {guarded:.1%}."
_WHY: Final = """\
Each forward in train mode moved the running statistics of the frozen backbone, by up to {shift:.2f} standard \
deviations in all. With a guard, the outputs of the old head have the same bits as before."""
_ABOUT_RESTORE: Final = """\
"restore" is for forwards from which nothing learns, such as those of a teacher. It normalises with each batch: a head \
that is trained so has never seen the frozen statistics with which it is evaluated here. To train a head on a frozen \
backbone, take use_running_stats=True: training and evaluation normalise alike."""
_NEXT: Final = """\
Next, on your own script (nothing in it is changed):

  bnguard run train.py                        which line moves which running statistics
  bnguard run --frozen 'backbone*' train.py   stop at the first update of the backbone

or in its code:

  with bnguard.frozen(model.backbone, use_running_stats=True):
      train(model)
"""
_NAMES: Final = {
    "unguarded": "no guard",
    "use_running_stats": "frozen(backbone, use_running_stats=True)",
    "restore": 'frozen(backbone, "restore")',
}
_MODES: Final = {"unguarded": "the batch's", "use_running_stats": "the frozen", "restore": "the batch's"}


def show(result: DemoResult) -> None:
    """Prints the tables, and the error of the guard that raises."""
    console = Console(highlight=False, markup=False)
    runs = {run.name: run for run in result.runs}
    _say(_ABOUT.format(train_images=result.train_images, test_images=result.test_images), console)
    old, guarded = runs["unguarded"], runs["use_running_stats"]
    values = {"before": old.source_before, "after": old.source_after, "guarded": guarded.source_after}
    goes = "falls" if old.source_after < old.source_before else "goes"
    console.print(f"\n{_VERDICT.format(goes=goes, **values)}", style="bold")
    console.print(_old_head(runs, result.test_images))
    _say(_WHY.format(shift=old.largest_shift), console)
    console.print(_new_head(runs))
    _say(_ABOUT_RESTORE, console)
    print("\nfrozen(backbone) alone stops at the first forward that would update:\n")
    print(textwrap.indent(f"{type(result.error).__name__}: {result.error}", "  "))
    print(f"\n{_NEXT}", end="")


def as_json(result: DemoResult) -> dict[str, Any]:
    """The numbers, for the JSON file."""
    names = ("train_images", "test_images")
    return {
        **{name: getattr(result, name) for name in names},
        "runs": [dataclasses.asdict(run) for run in result.runs],
        "error": str(result.error),
    }


def _say(text: str, console: Console) -> None:
    print(textwrap.fill(text, min(_WIDEST, console.width)))


def _old_head(runs: dict[str, FineTuning], images: int) -> Table:
    table = _table("The old head: accuracy on its own test images", "before", "after", "wrong images")
    for name in ("unguarded", "use_running_stats", "restore"):
        run = runs[name]
        has_fallen = run.source_after < run.source_before
        table.add_row(
            _NAMES[name],
            f"{run.source_before:.1%}",
            f"{run.source_after:.1%}",
            f"{_wrong(run.source_before, images)} to {_wrong(run.source_after, images)}",
            style="bold red" if has_fallen else "green" if run.is_same_output else "",
        )
    return table


def _wrong(accuracy: float, images: int) -> int:
    return round((1 - accuracy) * images)


def _new_head(runs: dict[str, FineTuning]) -> Table:
    title = "The new head: accuracy on the shifted test images, in eval mode"
    table = _table(title, "accuracy", "statistics", "step time")
    for name in ("unguarded", "use_running_stats", "restore"):
        run = runs[name]
        table.add_row(_NAMES[name], f"{run.new_head:.1%}", _MODES[name], f"x {run.step_time:.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("guard", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
