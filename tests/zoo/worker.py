"""A child process of the zoo: reads names of one library's models from stdin, answers each with a line of JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import sys

__all__ = ["main"]


def main(library: str, memory: float) -> None:
    """Answers ``?`` with all names, a name with the result of its check."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    # Allocations beyond this fail with an error that belongs to the model.
    limit = int((memory + 2) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    import torch

    torch.set_num_threads(1)
    from tests.zoo.torchvision_ops import import_torchvision

    import_torchvision()
    catalogue = importlib.import_module(f"tests.zoo.catalogue.{library}_models")
    cases = {case.name: case for case in catalogue.cases()}
    from tests.zoo.check import check

    for line in sys.stdin:
        name = line.rstrip("\n")
        answer = list(cases) if name == "?" else dataclasses.asdict(check(library, cases[name], memory))
        answers.write(json.dumps(answer) + "\n")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > memory * 2**20 / 2:
            return  # the next one starts small


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
