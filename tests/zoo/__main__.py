"""``python -m tests.zoo [library ...]``: checks the models of these libraries, or of all, and writes the table."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.zoo.table import write_table

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = tuple(
    sorted(path.stem.removesuffix("_models") for path in Path(__file__).parent.glob("catalogue/*_models.py"))
)
LEFT = "the worker has left to give its memory back"
MODELS_A_WORKER = 60  # then a fresh one: what libraries cache is given back


def main() -> int:
    """The command; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("libraries", nargs="*", metavar="library", help=f"of {', '.join(LIBRARIES)}; default: all")
    parser.add_argument("-k", dest="pattern", default="", help="only models whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at the same time (2)")
    parser.add_argument("--memory", type=float, default=6, help="GiB for a process; larger models are skipped (6)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a model (240)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "build" / "zoo.jsonl", help="where it goes on (build/zoo.jsonl)"
    )
    parser.add_argument("--again", choices=("failed", "skipped", "none", "passed", "all"), action="append", default=[],
                        help="check these again; may be repeated")  # fmt: skip
    parser.add_argument("--table-only", action="store_true", help="check nothing, write the table")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.md")
    options = parser.parse_args()
    unknown = set(options.libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"no such library: {', '.join(sorted(unknown))}; choose from {', '.join(LIBRARIES)}")

    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read_results(options.results)
    chunks: list[list[tuple[str, list[str]]]] = []
    for library in () if options.table_only else options.libraries or LIBRARIES:
        with Worker(library, options.memory) as worker:
            names = worker.ask("?", options.timeout)
        if not isinstance(names, list):
            print(f"{library}: cannot be listed: {names}")
            return 1
        known[library, ""] = {"library": library, "name": "", "status": "listed", "count": len(names)}
        record(options.results, known[library, ""])
        names = [
            name for name in names if options.pattern in name and is_due(known.get((library, name)), options.again)
        ]
        print(f"{library}: {len(names)} to check", flush=True)
        starts = range(0, len(names), MODELS_A_WORKER)
        chunks.append([(library, names[start : start + MODELS_A_WORKER]) for start in starts])
    waiting: queue.Queue[tuple[str, list[str]]] = queue.Queue()
    for turn in itertools.zip_longest(*chunks):
        for chunk in filter(None, turn):
            waiting.put(chunk)

    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                library, names = waiting.get_nowait()
            except queue.Empty:
                return
            for result in run(library, names, options.memory, options.timeout):
                with lock:
                    known[library, result["name"]] = result
                    record(options.results, result)
                    print(line(result), flush=True)

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_table(options.table, list(known.values()))
    return int(any(result["status"] == "failed" for result in known.values()))


def is_due(result: dict[str, Any] | None, again: list[str]) -> bool:
    """Whether a model is to be checked: it has not been, or it is to be again."""
    return result is None or "all" in again or result["status"] in again


def record(path: Path, result: dict[str, Any]) -> None:
    """Adds a result to the file."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def read_results(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last result of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("}")]
    return {(result["library"], result["name"]): result for result in results}


def run(library: str, names: list[str], memory: float, timeout: float) -> Iterator[dict[str, Any]]:
    """The results of some models of one library, in one process as long as it lives."""
    names = list(names)
    while names:
        with Worker(library, memory) as worker:
            while names:
                answer = worker.ask(names[0], timeout)
                if answer == LEFT:
                    break
                name = names.pop(0)
                if isinstance(answer, dict):
                    yield answer
                    continue
                failed = [f"check: {answer}"] if answer.startswith("crash") else []
                yield {"library": library, "name": name, "status": "failed" if failed else "skipped",
                       "reason": answer, "failures": failed}  # fmt: skip
                break


class Worker:
    """A child process that checks models of one library."""

    def __init__(self, library: str, memory: float) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.worker", library, str(memory)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "YOLO_OFFLINE": "True", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | offline,
        )
        self.errors = b""
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read_errors(self) -> None:
        for chunk in iter(lambda: self.process.stderr.read1(65536), b""):
            self.errors = (self.errors + chunk)[-4000:]

    def ask(self, question: str, timeout: float) -> Any:
        """The answer, or a text that says why there is none."""
        try:
            self.process.stdin.write(f"{question}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        ready, _, _ = select.select([self.process.stdout], [], [], timeout + 60 * (question == "?"))
        if not ready:
            return f"timeout: more than {timeout:g} s"
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if code == 0:
            return LEFT
        last = self.errors.decode(errors="replace").strip().splitlines()[-1:]
        return f"crash: exit status {code}: {' '.join(last)}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def line(result: dict[str, Any]) -> str:
    """One result in one line."""
    what = "; ".join(result.get("failures", [])) or result.get("reason", "")
    layers = sum(result.get("layers", {}).values())
    return f"{result['library']} {result['name']}: {result['status']} {layers} {result.get('seconds', '')} {what}"


if __name__ == "__main__":
    sys.exit(main())
