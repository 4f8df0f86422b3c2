"""A compiled training step in a block against the same step without one: ``python -m benchmarks.compiled_step``.

Rounds of the two alternate in one process; each figure is a ratio of that run.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import bnguard

RESULTS = Path(__file__).parent / "results" / "compiled_step.md"
ROUNDS, STEPS = 25, 4


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut, as in ResNet-18."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = shortcut if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def make_net() -> nn.Sequential:
    """A small ResNet: 20 BatchNorm layers, for 32x32 images."""
    torch.manual_seed(0)
    widths = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    blocks = [Block(*width) for width in widths]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *blocks, *head)


def make_step(net: nn.Module) -> Callable[[], None]:
    """Forward, backward and SGD of the compiled net on one batch of eight."""
    compiled = torch.compile(net, fullgraph=True)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(images), labels).backward()
        optimizer.step()

    return step


def measure(options: dict[str, object], *, each_step: bool) -> tuple[float, float, float]:
    """The ratio guarded / unguarded: median of the rounds, and their quartiles."""
    net = make_net()
    step = make_step(net)

    def guarded() -> None:
        with bnguard.frozen(net, **options):
            step()

    def seconds(function: Callable[[], None]) -> float:
        return Timer("function()", globals={"function": function}).timeit(STEPS).mean

    for function in (step, guarded, step, guarded):  # compile both graphs
        function()
    ratios = []
    for _ in range(ROUNDS):
        plain = seconds(step)
        if each_step:
            held = seconds(guarded)
        else:
            with bnguard.frozen(net, **options):
                held = seconds(step)
        ratios.append(2 * held / (plain + seconds(step)))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def main() -> None:
    """Measures every case and writes the table."""
    torch.set_num_threads(1)
    cases = {
        "restore, block around the loop": ({"on_change": "restore"}, False),
        "restore, block at each step": ({"on_change": "restore"}, True),
        "use_running_stats=True, block around the loop": ({"use_running_stats": True}, False),
    }
    rows = []
    for name, (options, each_step) in cases.items():
        torch._dynamo.reset()
        middle, low, high = measure(options, each_step=each_step)
        rows.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
        print(rows[-1])
    head = [
        "# A compiled training step",
        "",
        f"Written by `python -m benchmarks.compiled_step`: torch {torch.__version__}, {platform.machine()} CPU, one",
        "thread, inductor, fullgraph, a small ResNet with 20 BatchNorm layers, batches of 8x3x32x32. Of",
        f"{ROUNDS} rounds each has {STEPS} steps without, {STEPS} with and {STEPS} without a guard.",
        "",
        "| case | guarded / unguarded, median | quartiles |",
        "| --- | --- | --- |",
    ]
    RESULTS.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
