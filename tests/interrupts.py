"""Interrupts blocks at random moments with a real signal, and looks from outside at what is left behind.

``python -m tests.interrupts --interrupts 10000`` prints how often what was left, and where the signal had arrived.
Nothing in here that looks for it shares code with bnguard. For comparison, context managers of others are interrupted
likewise: Python may deliver a signal when a ``with`` statement has called ``__exit__``, before the first line of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

import bnguard
from bnguard.guard import affine, hold
from bnguard.layers import swaps

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = str(Path(bnguard.__file__).parent)
IMAGES: Final = torch.arange(48.0).reshape(8, 6).requires_grad_()
HANGS: Final = 10.0  # seconds after which a thread that runs one block is taken to hang
PATIENCE: Final = 2.0  # seconds in which a signal is to arrive
CHUNK: Final = 5_000  # interrupts of one process


class OwnForward(nn.BatchNorm1d):
    """A layer whose updates cannot be predicted."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def make_net() -> nn.Sequential:
    """A layer of each way to be guarded, with gradients."""
    net = nn.Sequential(nn.BatchNorm1d(6), OwnForward(6), nn.InstanceNorm1d(8, affine=True, track_running_stats=True))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return net


@dataclass
class Case:
    """What is interrupted.

    Attributes:
        net: The model.
        step: Runs one block.
        moves: Whether it may move statistics.
        trains: Whether it may change parameters and gradients.
        guards: Guards that are used by each step; none of them may be open afterwards.
        begin: Called first.
        end: Called after the interrupt. Returns what is wrong.
    """

    net: nn.Module
    step: Callable[[], object]
    moves: bool = False
    trains: bool = False
    guards: Sequence[object] = ()
    begin: Callable[[], object] = object
    end: Callable[[], str] = str


def _frozen(on_change: Any, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        net = make_net()
        kept = bnguard.frozen(net, on_change, **options) if random.random() < 0.5 else None

        def step() -> None:
            with (
                contextlib.suppress(bnguard.StatsChangedError),
                kept or bnguard.frozen(net, on_change, **options),
            ):
                output = net(IMAGES)
                if "affine" in options:
                    output.sum().backward()

        moves = on_change == "warn" or "updates" in options
        return Case(net, step, moves, guards=[] if kept is None else [kept])

    return make


def _evaluated() -> Case:
    net = make_net().eval()

    def step() -> None:
        with bnguard.frozen(net):
            net(IMAGES)

    return Case(net, step)


def _usual(on_change: Any, **options: Any) -> Callable[[], Case]:
    """Torch's own layers alone, and blocks before: these begin and end in few functions."""

    def make() -> Case:
        net = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        net.train(on_change != "raise")
        moves = on_change == "warn" or "updates" in options
        kept = bnguard.frozen(net, on_change, **options) if random.random() < 0.7 else None

        def forwards(model: nn.Module) -> None:
            for _ in range(12):  # a block of half a millisecond, in which the places of Python's own are rare
                model(IMAGES)

        run = bnguard.strict(on_change=on_change, **options)(forwards)
        is_strict = kept is None and random.random() < 0.5

        def step() -> None:
            if is_strict:
                run(net)
                return
            with kept or bnguard.frozen(net, on_change, **options):
                forwards(net)

        for _ in range(random.randrange(1, 4)):
            step()
        return Case(net, step, moves, guards=[] if kept is None else [kept])

    return make


def _nested() -> Case:
    net = make_net()

    def step() -> None:
        with bnguard.frozen(net, "rollback"), bnguard.frozen(net[1], "restore", affine=True):
            with bnguard.frozen(net, use_running_stats=True):
                net(IMAGES)
            net(IMAGES)

    return Case(net, step)


def _strict() -> Case:
    net = make_net()

    @bnguard.strict(on_change="restore", affine=True)
    def run(model: nn.Module) -> None:
        model(IMAGES).sum().backward()

    return Case(net, lambda: run(net))


def _watch() -> Case:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watched = net if random.random() < 0.5 else None

    def step() -> None:
        with bnguard.watch(watched, every=1):
            net(IMAGES).sum().backward()
            optimizer.step()

    return Case(net, step, moves=True, trains=True)


def _recompute() -> Case:
    net = make_net()

    def step() -> None:
        with bnguard.recompute_frozen(net):
            net(IMAGES)

    return Case(net, step, moves=True)


def _beside(stays: bool) -> Callable[[], Case]:
    """Another thread stays in a block, or runs one after the other."""

    def make() -> Case:
        net = make_net()
        is_inside, may_end = threading.Event(), threading.Event()

        def stay() -> None:
            with bnguard.frozen(net, "restore", affine=True):
                is_inside.set()
                may_end.wait()

        def repeat() -> None:
            while not may_end.is_set():
                with bnguard.frozen(net, "restore"):
                    net(IMAGES)
                is_inside.set()

        thread = threading.Thread(target=stay if stays else repeat, daemon=True)

        def begin() -> None:
            thread.start()
            is_inside.wait()

        def step() -> None:
            with bnguard.frozen(net, use_running_stats=True, affine=True):
                net(IMAGES)

        def end() -> str:
            may_end.set()
            thread.join(HANGS)
            return "lock" if thread.is_alive() else ""

        return Case(net, step, begin=begin, end=end)

    return make


CASES: Final[dict[str, Callable[[], Case]]] = {
    "raise": _frozen("raise"),
    "evaluated": _evaluated,
    "warn": _frozen("warn"),
    "restore": _frozen("restore"),
    "rollback": _frozen("rollback"),
    "running": _frozen("raise", use_running_stats=True),
    "affine": _frozen("restore", affine=True),
    "budget": _frozen("restore", updates=1),
    "deferred": _frozen("rollback", check="deferred"),
    "usual raise": _usual("raise"),
    "usual restore": _usual("restore"),
    "usual running": _usual("restore", use_running_stats=True),
    "usual warn": _usual("warn"),
    "usual budget": _usual("restore", updates=1),
    "nested": _nested,
    "strict": _strict,
    "watch": _watch,
    "recompute": _recompute,
    "beside a block": _beside(stays=True),
    "beside blocks": _beside(stays=False),
}

# For comparison.

_open: Final[list[object]] = []


class Plain:
    """Notes that it is open."""

    def __enter__(self) -> Plain:
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _open.remove(self)


@contextlib.contextmanager
def generator() -> Iterator[None]:
    """Notes that it is open."""
    _open.append(None)
    try:
        yield
    finally:
        _open.remove(None)


def _of_others(manager: Callable[[], Any]) -> Callable[[], Case]:
    def make() -> Case:
        net = make_net().eval()

        def step() -> None:
            with manager():
                net(IMAGES)

        return Case(net, step)

    return make


CONTROLS: Final[dict[str, Callable[[], Case]]] = {
    "a class": _of_others(Plain),
    "contextlib": _of_others(generator),
    "torch.no_grad": _of_others(torch.no_grad),
}


class Picture:
    """What can be seen of a model and of the process, by kind."""

    def __init__(self, case: Case) -> None:
        modules, parameters = list(case.net.modules()), list(case.net.parameters())
        buffers = [buffer for module in modules for buffer in module._buffers.values()]
        self.kinds: dict[str, Any] = {
            "guard": [[*map(id, vars(module).values()), *vars(module), *_hooks_of(module)] for module in modules],
            "statistics": [*map(id, buffers), *([] if case.moves else map(_bits, buffers))],
            "gradients": [p.requires_grad for p in parameters],
            "modes": [
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch._C._len_torch_dispatch_stack(),
                torch._C._len_torch_function_stack(),
                torch._C._is_torch_function_enabled(),
            ],
            "process": [
                *[[*value] for name, value in vars(torch_module).items() if name.startswith("_global_") and value],
                [*torch_optimizer._global_optimizer_post_hooks],
                id(getattr(torch_module, "_has_any_global_hook", None)),
                id(torch.autograd._engine_run_backward),
                id(torch.amp.GradScaler.step),
                *[len(table) for table in (hold.guards, affine._held, swaps.swaps, _open)],
            ],
        }
        if not case.trains:
            self.kinds["gradients"] += [(id(p.grad), _bits(p.grad), _bits(p)) for p in parameters]

    def differences(self, earlier: Picture) -> list[str]:
        """The kinds that differ."""
        return [kind for kind, value in self.kinds.items() if value != earlier.kinds[kind]]


def _hooks_of(module: nn.Module) -> list[tuple[str, Any, int]]:
    tables = [(name, value) for name, value in vars(module).items() if "hooks" in name and value]
    return [(name, key, id(hook)) for name, table in tables for key, hook in table.items()]


def _bits(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.detach().numpy().tobytes()


@dataclass
class Seen:
    """What came of some interrupts.

    Attributes:
        interrupts: How many there were.
        inside: How many of them arrived in bnguard, or in what it had called.
        lost: Further signals, which arrived where Python drops exceptions, as in a callback of the garbage collector.
        left: What was left behind: for each interrupt the case, the kinds, and where the signal arrived.
        window: How many of these arrived before the first line of ``__exit__``.
    """

    interrupts: int = 0
    inside: int = 0
    lost: int = 0
    left: list[tuple[str, str, str]] = field(default_factory=list)
    window: int = 0

    def add(self, other: Seen) -> None:
        """Adds what another process has seen."""
        self.interrupts += other.interrupts
        self.inside += other.inside
        self.lost += other.lost
        self.left += other.left
        self.window += other.window

    def __str__(self) -> str:
        kinds = Counter(kind for _, several, _ in self.left for kind in several.split())
        what = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "nothing"
        places = Counter((case, place) for case, _, place in self.left)
        lines = [f"    {count}: {case}, {place}" for (case, place), count in places.most_common(20)]
        head = f"{self.interrupts} interrupts, {self.inside} in bnguard, {self.lost} lost"
        tail = f"{len(self.left)} left something, {self.window} because __exit__ had not begun: {what}"
        return "\n".join([f"{head}; {tail}", *lines])


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupt(name: str, case: Case, duration: float, seen: Seen) -> bool:
    """Interrupts the steps of a case once; False if a thread hangs."""
    earlier = Picture(case)
    case.begin()
    kinds: list[str] = []
    place, is_hit, is_inside, is_window = "", True, False, False
    until = time.monotonic() + PATIENCE
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-5 + 3 * duration * random.random())
        while time.monotonic() < until:
            case.step()
        is_hit = False
    except KeyboardInterrupt as error:
        place, is_inside, is_window = _place(error.__traceback__)
    except Exception as error:
        kinds.append("error")
        place = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    wrong = case.end()
    if not is_hit:
        seen.lost += 1
        return not wrong
    kinds += [wrong] if wrong else Picture(case).differences(earlier)
    kinds += ["open" for guard in case.guards if "closed" not in repr(guard)]
    torch.set_grad_enabled(True)
    _open.clear()
    if not wrong and not _can_be_guarded(case.net):
        kinds.append("lock")
    seen.interrupts += 1
    seen.inside += is_inside
    if kinds:
        seen.left.append((name, " ".join(kinds), place))
    seen.window += bool(kinds) and is_window
    return "lock" not in kinds


def _can_be_guarded(net: nn.Module) -> bool:
    """Whether another thread can run blocks."""

    def run() -> None:
        for options in ({"affine": True}, {"use_running_stats": True}, {"include": OwnForward}):
            with bnguard.frozen(net, "restore", **options):  # type: ignore[arg-type]
                net(IMAGES.detach())
        with bnguard.watch():
            net(IMAGES.detach())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANGS)
    return not thread.is_alive()


def _place(traceback: TracebackType | None) -> tuple[str, bool, bool]:
    """Where an interrupt arrived, whether bnguard was running, and whether it was before the first line of an end."""
    lines: list[str] = []
    is_inside = is_window = False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code is _interrupt.__code__:
            break
        is_inside = is_inside or code.co_filename.startswith(PACKAGE)
        is_window = code.co_name == "__exit__" and traceback.tb_lineno == code.co_firstlineno
        lines.append(f"{Path(code.co_filename).name}:{traceback.tb_lineno} {code.co_qualname}")
        traceback = traceback.tb_next
    return " < ".join(reversed(lines[-5:])), is_inside, is_window


def run_here(names: Sequence[str], interrupts: int, seed: int) -> Seen:
    """Interrupts this process, until a thread hangs."""
    warnings.simplefilter("ignore", bnguard.BNGuardWarning)
    random.seed(seed)
    sys.setswitchinterval(1e-4)
    cases = {**CASES, **CONTROLS}
    durations = {name: _duration_of(cases[name]()) for name in names}
    signal.signal(signal.SIGALRM, _interrupt)
    seen = Seen()
    while seen.interrupts < interrupts:
        name = names[(seen.interrupts + seen.lost) % len(names)]
        if not interrupt(name, cases[name](), durations[name], seen):
            break
    return seen


def _duration_of(case: Case) -> float:
    case.begin()
    for _ in range(3):
        case.step()
    begun = time.perf_counter()
    for _ in range(5):
        case.step()
    duration = (time.perf_counter() - begun) / 5
    case.end()
    return duration


def run(names: Sequence[str], interrupts: int, seed: int = 0) -> Seen:
    """Interrupts other processes, one after the other: one in which a thread hangs is of no more use."""
    seen = Seen()
    while seen.interrupts < interrupts:
        seed += 1
        command = [sys.executable, "-m", "tests.interrupts", "--here", "--cases", ",".join(names)]
        command += ["--interrupts", str(min(CHUNK, interrupts - seen.interrupts)), "--seed", str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout}\n{done.stderr}")
        found = json.loads(done.stdout)
        seen.add(Seen(**{**found, "left": [tuple(item) for item in found["left"]]}))
    return seen


def main() -> None:
    """Interrupts, and prints what was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--here", action="store_true", help="in this process; prints JSON")
    options = parser.parse_args()
    names = options.cases.split(",")
    if options.here:
        print(json.dumps(asdict(run_here(names, options.interrupts, options.seed))), flush=True)
        os._exit(0)  # a thread may hang
    print("bnguard:", run(names, options.interrupts, options.seed), flush=True)
    for name in CONTROLS:
        print(f"{name}:", run([name], options.interrupts // 4, options.seed), flush=True)


if __name__ == "__main__":
    main()
