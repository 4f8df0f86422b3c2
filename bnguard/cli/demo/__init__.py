"""The command ``demo``: fine-tune on real data, with and without a guard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bnguard.cli.exit_codes import exit_code_of
from bnguard.cli.options import Commands, add_outputs, seed

if TYPE_CHECKING:
    from bnguard.report.files import Outputs


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="fine-tune on real data, with and without a guard (under a minute, no download)",
        description=(
            "Trains a small network on scikit-learn's digits, freezes its backbone with requires_grad_(False) and "
            "fine-tunes a new head on shifted images: without a guard and with one. "
            "Shows what becomes of the old head. Needs the extra 'demo'."
        ),
    )
    add_outputs(parser, "json", "plot")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of every run (default: 0)")
    parser.set_defaults(execute=_demo, extras=("demo",))


def _demo(options: argparse.Namespace, outputs: Outputs) -> int:
    import torch

    from bnguard.cli.demo import finetune, report  # need the extra
    from bnguard.report import json as json_file
    from bnguard.report.files import tell_files, write_files

    # The network is small, and on a busy machine threads that wait for each other cost ten times what they save.
    torch.set_num_threads(1)
    result = finetune.run(seed=options.seed)
    report.show(result)

    def draw() -> None:
        from bnguard.cli.demo import plot  # needs another extra

        plot.draw(result, cast("Path", outputs.plot))

    def save() -> None:
        json_file.write(cast("Path", outputs.json), {"seed": options.seed, **report.as_json(result)})

    return exit_code_of(
        has_found=False, is_written=tell_files(write_files((outputs.plot, draw), (outputs.json, save)), "demo")
    )
