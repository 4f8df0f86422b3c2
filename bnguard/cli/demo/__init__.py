"""The command ``demo``: fine-tune on real data, with and without a guard."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

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
            "fine-tunes a new head on shifted images: without a guard and with one. Needs the extra 'demo'."
        ),
    )
    add_outputs(parser, "json", "plot")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of every run (default: 0)")
    parser.set_defaults(execute=_demo, extras=("demo",))


def _demo(options: argparse.Namespace, outputs: Outputs) -> int:
    import torch

    from bnguard.cli.demo import finetune, report  # need the extra

    # The network is small, and on a busy machine threads that wait for each other cost ten times what they save.
    torch.set_num_threads(1)
    result = finetune.run(seed=options.seed)
    report.show(result)
    if outputs.plot is not None:
        from bnguard.cli.demo import plot  # needs another extra

        plot.draw(result, outputs.plot)
        print(f"\nDrift per layer and step: {outputs.plot}")
    if outputs.json is not None:
        from bnguard.report import json as json_file

        json_file.write(outputs.json, {"seed": options.seed, **report.as_json(result)})
    return 0
