"""``python -m benchmarks [key ...]``: measures everything, or what these keys name, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final

import torch

from benchmarks import compiled, cuda, enter_exit, forward, memory, readme, startup, step, suite, updating, watch
from benchmarks.results import Benchmark, Row, conditions, from_json, line, to_json, write

_CPU: Final[dict[str, Benchmark]] = {
    **forward.BENCHMARKS, **step.BENCHMARKS, **enter_exit.BENCHMARKS, **compiled.BENCHMARKS,
    **memory.BENCHMARKS, **startup.BENCHMARKS, **suite.BENCHMARKS, **updating.BENCHMARKS, **watch.BENCHMARKS,
}  # fmt: skip
_ALL: Final = {**_CPU, **cuda.BENCHMARKS}


def main() -> int:
    """The command: 1 if a benchmark failed, 2 if a key names none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="key", help="such as step/resnet50, or a pattern: 'enter_exit/*'")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, and all of cpu")
    parser.add_argument("--list", action="store_true", help="print the keys, and measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw the results as PNG, too; without keys")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)  # of one process to the other
    options = parser.parse_args()
    devices = [options.device] if options.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    if options.list:
        print("\n".join(_ALL))
        return 0
    if options.json:
        print(json.dumps([to_json(row) for key in options.keys for row in under_conditions(_ALL[key])]))
        return 0
    if "cuda" in devices and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device")
    if options.keys:
        keys = [key for key in _ALL if any(fnmatchcase(key, pattern) for pattern in options.keys)]
        if not keys:
            parser.error(f"no benchmark is called {' or '.join(options.keys)}; --list shows them all")
        rows, failed = measured(keys)
        return 1 if failed else 0
    any_failed = False
    for device in devices:
        rows, failed = measured(list(_CPU if device == "cpu" else cuda.BENCHMARKS))
        any_failed = any_failed or bool(failed)
        for path in write(device, rows, failed):
            print(f"written: {path}")
        if device == "cpu" and not failed:
            print(f"written: {readme.write()}")
        if options.plot:
            from benchmarks.plot import draw

            for path in draw(rows, device):
                print(f"drawn: {path}")
    return int(any_failed)


def under_conditions(benchmark: Benchmark) -> list[Row]:
    """The rows of a benchmark, with the load of its last minute, or of the one before it if that was higher."""
    before, rows, after = conditions(), benchmark(), conditions()
    return [replace(row, conditions=max(before, after, key=lambda noted: noted.load)) for row in rows]


def measured(keys: list[str]) -> tuple[list[Row], list[str]]:
    """The rows of these benchmarks, printed as they come, and what went wrong."""
    rows: list[Row] = []
    failed = []
    for number, key in enumerate(keys, 1):
        print(f"[{number}/{len(keys)}] {key}", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks", "--json", key]
        process = subprocess.run(command, capture_output=True, text=True)
        print(f": {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if process.returncode:
            failed.append(f"{key}: {process.stderr.strip().splitlines()[-1]}")
            print(failed[-1], file=sys.stderr)
            continue
        new = [from_json(item) for item in json.loads(process.stdout.splitlines()[-1])]
        print("\n".join([f"{new[0].title}:", *map(line, new), ""]), flush=True)
        rows += new
    return rows, failed


if __name__ == "__main__":
    sys.exit(main())
