"""What the tests assert again and again: same bits, nothing left behind, a warning at the user's line."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import bnguard
from bnguard.testing import assert_stats_unchanged
from tests.old_torch import OLD_AUTOCAST, RELEASE

T = TypeVar("T")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the state dict."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(one: Any, other: Any) -> None:
    """Two tensors, or mappings or sequences of them, have the same dtypes, shapes and bits: NaN is NaN, -0.0 is not."""
    if isinstance(one, Mapping):
        assert list(one) == list(other)
        for name in one:
            try:
                assert_same_bits(one[name], other[name])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_bits(left, right)
    elif one is None or other is None:
        assert one is None, "expected None"
        assert other is None, "unexpected None"
    else:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
        assert torch.equal(left, right), f"bits differ:\n{one}\n{other}"


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    """The gradients of two models have the same bits."""
    assert_same_bits([p.grad for p in one.parameters()], [p.grad for p in other.parameters()])


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``model`` that are running statistics, by name, every name of a shared one."""
    buffers = model.named_buffers(remove_duplicate=False)
    words = ("running_", "moving_", "num_batches_tracked")
    return {name: tensor for name, tensor in buffers if name.rpartition(".")[2].startswith(words)}


def values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of named tensors, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def outcome(model: nn.Module, input: Tensor, *, backward: bool = True) -> dict[str, Tensor | None]:
    """One forward and backward pass with a fixed seed: the output and the gradients of the input and the parameters."""
    input = input.detach().clone().requires_grad_(backward)
    torch.manual_seed(11)
    output = model(input)
    if not backward:
        return {"output": output}
    output.float().square().sum().backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), "input.grad": input.grad, **gradients}


def assert_clean(model: nn.Module) -> None:
    """Nothing of bnguard is on any module."""
    for name, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            assert not _is_ours(value), f"{name or '(root)'}.{attribute}"
        for attribute in _HOOKS:
            hooks = getattr(module, attribute)
            assert not any(_is_ours(hook) for hook in hooks.values()), f"{name or '(root)'}.{attribute}"
        for attribute in ("__getstate__", "_replicate_for_data_parallel"):
            assert attribute not in module.__dict__, f"{name or '(root)'}.{attribute}"


def assert_untouched(model: nn.Module, fn: Callable[[], T]) -> T:
    """Runs ``fn()``, and returns what that does: every buffer is the same object afterwards, with the same bits."""
    objects = dict(model.named_buffers(remove_duplicate=False))
    result = assert_stats_unchanged(model, fn)
    now = dict(model.named_buffers(remove_duplicate=False))
    assert list(now) == list(objects)
    for name, tensor in now.items():
        assert tensor is objects[name], name
    return result


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _is_ours(value: object) -> bool:
    owner = getattr(value, "__self__", value)
    homes = (type(owner).__module__, getattr(value, "__module__", None))
    return any(home.partition(".")[0] == "bnguard" for home in homes if isinstance(home, str))


@dataclass
class Caught:
    """What ``warns`` has caught; ``message`` once the block is over."""

    messages: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The one message."""
        assert len(self.messages) == 1, self.messages
        return self.messages[0]


@contextmanager
def warns(at: str | None = None, count: int = 1) -> Iterator[Caught]:
    """Expects ``count`` BNGuardWarnings and no other warning, pointing at a line of this test that contains ``at``."""
    caught = Caught()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        yield caught
    if RELEASE < (2, 5):
        records = [record for record in records if not str(record.message).startswith(OLD_AUTOCAST)]
    assert [record.category for record in records] == [bnguard.BNGuardWarning] * count, [
        str(r.message) for r in records
    ]
    caught.messages += [str(record.message) for record in records]
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in (__file__, inspect.getsourcefile(contextmanager)):
        frame = frame.f_back
    if at is not None and frame is not None:
        filename = frame.f_code.co_filename
        with open(filename, encoding="utf-8") as file:
            lines = file.read().splitlines()
        for record in records:
            assert record.filename == filename
            assert at in lines[record.lineno - 1], lines[record.lineno - 1]


@dataclass
class Told:
    """What bnguard said; complete once the block is over."""

    warnings: list[str] = field(default_factory=list)
    error: str | None = None


@contextmanager
def told() -> Iterator[Told]:
    """Catches what bnguard says: the texts of its warnings, and of its error. torch's warnings are passed over."""
    found = Told()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            yield found
        except bnguard.StatsChangedError as error:
            found.error = str(error)
    found.warnings += [str(record.message) for record in records if issubclass(record.category, bnguard.BNGuardWarning)]


def run_threads(*functions: Callable[[], object], timeout: float = 30) -> None:
    """Runs functions at the same time, each in a thread of its own; the first error of one of them is raised here."""
    join_threads(start_threads(*functions), timeout)


def start_threads(*functions: Callable[[], object]) -> list[GuardedThread]:
    """Starts a thread for each function."""
    threads = [GuardedThread(function) for function in functions]
    for thread in threads:
        thread.start()
    return threads


def join_threads(threads: Sequence[GuardedThread], timeout: float = 30) -> None:
    """Waits for threads, each at most ``timeout`` seconds; the first error of one of them is raised here."""
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a thread hangs"
    for thread in threads:
        if thread.error is not None:
            raise thread.error


class GuardedThread(threading.Thread):
    """A thread that keeps the error of its function."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.error: BaseException | None = None

    def run(self) -> None:
        """Runs the function."""
        try:
            self.function()
        except BaseException as error:
            self.error = error


# The beginning of a script that runs where bnguard cannot be imported.
WITHOUT_BNGUARD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bnguard":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
"""
