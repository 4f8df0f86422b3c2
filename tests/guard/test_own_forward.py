"""Layers with a forward of their own: the layer itself runs, whatever its form, and keeps what is stored on it."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import bnguard
from bnguard.guard.hooks import guard_of
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.nets import images
from tests.policies import EVERY_GUARD, GUARDS

HOLDING = pytest.mark.parametrize("guard", ["restore", "running"])


class Norm(nn.Module):
    """Owns a running mean, and moves it in train mode."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(input.detach().mean(0), 0.1)
        return input - self.running_mean


def batch(seed: int = 0) -> Tensor:
    """Eight rows of three features."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))


@EVERY_GUARD
def test_what_a_hook_stores_on_the_model_is_there_in_its_forward(guard: str) -> None:
    """A hook of a child that keeps features on the model, and a forward that reads them."""

    class Net(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.body.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.features = output

        def forward(self, input: Tensor) -> Tensor:
            self.body(input - self.running_mean)
            return self.features

    net = Net().eval()
    expected = [net(batch(seed)) for seed in range(2)]
    with bnguard.frozen(net, **GUARDS[guard]):
        assert_same_bits([net(batch(seed)) for seed in range(2)], expected)


@EVERY_GUARD
def test_child_that_writes_to_its_parent_is_kept(guard: str) -> None:
    """A closure in a child's hook, an attribute that the forward deletes, and one that a property sets."""

    class Net(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Identity()
            self.draft: int | None = 1

        @property
        def level(self) -> float:
            return self.__dict__.get("_level", 0.0)

        @level.setter
        def level(self, value: float) -> None:
            self.__dict__["_level"] = value

        def forward(self, input: Tensor) -> Tensor:
            self.level += 1
            if "draft" in self.__dict__:
                del self.draft
            return super().forward(self.child(input))

    net, seen = Net(), []
    net.child.register_forward_pre_hook(lambda module, args: seen.append(id(net)))
    with told(), bnguard.frozen(net, **GUARDS[guard]):
        net(batch())
    assert seen == [id(net)]
    assert net.level == 1
    assert not hasattr(net, "draft")


@pytest.mark.filterwarnings("ignore:also moved")
@EVERY_GUARD
@pytest.mark.parametrize("on_instance", [False, True])
def test_other_buffers_that_a_forward_assigns_are_kept(guard: str, on_instance: bool) -> None:
    """Buffers that are no statistics move as without a guard, also under a forward on the instance."""

    class Counted(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, input: Tensor) -> Tensor:
            self.steps = self.steps + 1
            return self.body(input - self.running_mean)

    net = Counted()
    if on_instance:
        own = net.forward
        net.forward = lambda input: own(input)  # type: ignore[method-assign]
    with bnguard.frozen(net, **GUARDS[guard]):
        for _ in range(3):
            net(batch())
    assert net.steps == 3
    assert_same_bits(net.running_mean, torch.zeros(3))


class Dispatching(Norm):
    """Chooses its forward by the type of the input."""

    @functools.singledispatchmethod
    def forward(self, input: Any) -> Tensor:
        raise NotImplementedError(type(input))

    @forward.register
    def _(self, input: Tensor) -> Tensor:
        return Norm.forward(self, input)


class Static(Norm):
    """Has a forward that does not know the layer."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:  # type: ignore[override]
        return input + 1


class OfClass(Norm):
    """Has a forward that knows the class."""

    scale = 3.0

    @classmethod
    def forward(cls, input: Tensor) -> Tensor:  # type: ignore[override]
        return input * cls.scale


class Slots(Norm):
    """Keeps an attribute outside of ``__dict__``."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class MadeWithArguments(Norm):
    """Cannot be made without an argument."""

    def __new__(cls, features: int) -> MadeWithArguments:
        return super().__new__(cls)


class Described(Norm):
    """Has a forward that is an object with ``__get__``."""

    class _Forward:
        def __get__(self, instance: Any, owner: type) -> Any:
            return lambda input: Norm.forward(instance, input) * 5

    forward: Any = _Forward()


FORMS: dict[str, Callable[[], nn.Module]] = {
    "dispatching": Dispatching,
    "static": Static,
    "class": OfClass,
    "slots": Slots,
    "new": lambda: MadeWithArguments(3),
    "descriptor": Described,
}


@EVERY_GUARD
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_of_every_form_runs_as_in_the_twin(form: str, guard: str, mode: str) -> None:
    """However Python binds the forward, outputs are the twin's, and the statistics stay where they are held."""
    net, twin = FORMS[form](), FORMS[form]()
    net.train(mode == "train")
    twin.train(mode == "train" and guard != "running")
    moves = mode == "train" and form not in ("static", "class")
    expected = twin(batch())
    with told() as said, bnguard.frozen(net, **GUARDS[guard]):
        assert_same_bits(net(batch()), expected if guard != "restore" or not moves else net_of_a_copy(form))
    assert (said.error is not None) == (guard == "raise" and moves)
    if guard in ("raise", "restore", "running", "rollback"):
        assert_same_bits(net.get_buffer("running_mean"), torch.zeros(3))
    assert_clean(net)


def net_of_a_copy(form: str) -> Tensor:
    """What a fresh layer gives in train mode."""
    output: Tensor = FORMS[form]()(batch())
    return output


@EVERY_GUARD
def test_signature_of_a_guarded_forward_is_its_own(guard: str) -> None:
    """Tools that look at the parameters of ``forward``, to choose columns or to export, see those of the layer."""

    class Net(Norm):
        def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
            """Says what it does."""
            return images - self.running_mean

    net = Net().eval()
    with bnguard.frozen(net, **GUARDS[guard]):
        assert inspect.signature(net.forward) == inspect.signature(Net().forward)
        assert net.forward.__name__ == "forward"
    norm = nn.BatchNorm1d(3).eval()
    with bnguard.frozen(norm, **GUARDS[guard]):
        assert list(inspect.signature(norm.forward).parameters) == ["input"]


def test_forward_of_the_class_that_is_patched_inside_is_used() -> None:
    """A test double on the class, put there while the block is open."""
    net = Norm()
    with pytest.MonkeyPatch.context() as patch, bnguard.frozen(net, "restore"):
        patch.setattr(Norm, "forward", lambda self, input: input * 7)
        assert_same_bits(net(batch()), batch() * 7)


@EVERY_GUARD
def test_forward_on_a_layer_that_was_taken_off_between_blocks_stays_off(guard: str) -> None:
    """A guard that is used again calls the forward of the class, and does not bring the other one back."""
    net = nn.Sequential(Norm()).eval()
    expected = net(batch())
    block = bnguard.frozen(net, **GUARDS[guard])
    net[0].forward = lambda input: input * 100
    with block:
        net(batch())
    del net[0].forward
    with block:
        assert_same_bits(net(batch()), expected)
    assert "forward" not in vars(net[0])


def test_budget_on_a_layer_that_gives_its_statistics_a_shape() -> None:
    """The first update decides how many features there are."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(1))

        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                self.running_mean = 0.9 * self.running_mean + 0.1 * input.mean(0)
            return input - self.running_mean

    net, twin = Grows(), Grows()
    expected = twin(batch())
    with bnguard.frozen(net, updates=1):
        assert_same_bits(net(batch()), expected)
    assert_same_bits(net.running_mean, twin.running_mean)


@pytest.mark.parametrize("ending", [ZeroDivisionError, KeyboardInterrupt])
@EVERY_GUARD
def test_forward_that_fails_leaves_nothing(ending: type[BaseException], guard: str) -> None:
    """What it wrote before it failed is put back where the guard holds; the error is its own, and goes on."""

    class Failing(Norm):
        def forward(self, input: Tensor) -> Tensor:
            self.running_mean.add_(1)
            raise ending("mine")

    net = Failing()
    with pytest.raises(ending, match="mine"), told(), bnguard.frozen(net, **GUARDS[guard]):
        net(batch())
    if guard in ("raise", "restore", "rollback"):
        assert_same_bits(net.running_mean, torch.zeros(3))
    assert_clean(net)
    net.forward = lambda input: input  # type: ignore[method-assign]
    with bnguard.frozen(net, **GUARDS[guard]):
        net(batch())


def test_failure_that_is_caught_inside_does_not_disturb_the_next_forward() -> None:
    """What the hooks noted for a forward that Ctrl-C ended is not taken for the next one's."""

    class Interrupted(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.fails = True

        def forward(self, input: Tensor) -> Tensor:
            if self.fails:
                raise KeyboardInterrupt
            return input - self.running_mean

    net = Interrupted()
    with bnguard.frozen(net):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                net(batch())
        net.fails = False
        assert_same_bits(net(batch()), batch())
    assert_clean(net)


class Learning(Norm):
    """Calls something, and fails, in the middle of its forward, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.action: Callable[[], object] = lambda: None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.action()
        return output


def fail(error: BaseException) -> None:
    """Raises it."""
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("on_change", ["raise", "warn"])
def test_interrupted_forward_accuses_no_later_one(error: BaseException, on_change: Any) -> None:
    """Torch calls no hook after such an exception; forwards that come later and update nothing are no finding."""
    layer = Learning()
    with told(), bnguard.frozen(layer, on_change) as guard:
        layer.action = lambda: fail(error)
        with pytest.raises(type(error)):
            layer(batch())
        layer.action = lambda: None
        layer.eval()
        for _ in range(3):
            layer(batch())
        assert sum(change.updates for change in guard.changes) == 0
    assert_clean(layer)


def test_forward_is_recognised_whatever_a_hook_makes_of_its_arguments() -> None:
    """A pre-hook that is added inside the block and returns other arguments hides no update."""
    layer = Learning()
    with told(), bnguard.frozen(layer):
        handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        with pytest.raises(bnguard.StatsChangedError):
            layer(batch())
        handle.remove()
        layer.eval()(batch())
        layer.train()
    assert_clean(layer)


def test_forward_in_a_pool_that_ends_badly_leaves_nothing() -> None:
    """A worker that lives on after ``SystemExit`` in a forward keeps no hook on the layer."""
    layer = Learning()
    layer.action = lambda: fail(SystemExit(1))
    with ThreadPoolExecutor(1) as pool:
        with told(), bnguard.frozen(layer, "warn"):
            assert isinstance(pool.submit(layer, batch()).exception(), SystemExit)
        assert_clean(layer)


@pytest.mark.parametrize("guard", ["restore", "rollback", "budget"])
def test_mode_that_a_forward_changes_stays(guard: str) -> None:
    """A layer that puts itself into eval mode is in eval mode afterwards."""
    layer = Learning()
    layer.action = layer.eval
    with bnguard.frozen(layer, **GUARDS[guard]):
        layer(batch())
    assert not layer.training


def test_copy_taken_inside_a_forward_has_the_mode_of_the_layer() -> None:
    """While the layer runs in eval mode, its own mode is what a copy gets, and its own statistics."""
    layer, copies = Learning(), []
    layer.action = lambda: copies or copies.append(copy.deepcopy(nn.ModuleList([layer])))
    before = layer.running_mean.clone()
    with bnguard.frozen(layer, use_running_stats=True):
        layer(batch())
    assert copies[0][0].training
    assert_same_bits(copies[0][0].running_mean, before)


@HOLDING
def test_forward_without_a_signature_is_guarded(guard: str) -> None:
    """A builtin function on the instance."""
    layer = Norm()
    layer.forward = torch.relu  # type: ignore[assignment]
    with bnguard.frozen(layer, **GUARDS[guard]):
        assert_same_bits(layer(batch()), torch.relu(batch()))


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"momentum": 0.0}], ids=str)
def test_layer_that_tracks_nothing_normalises_with_its_batch(options: dict[str, Any]) -> None:
    """In train mode it does, with statistics that it has and does not use."""
    layer = nn.BatchNorm1d(3, momentum=options.get("momentum", 0.1))
    layer.running_mean.add_(5)
    layer.num_batches_tracked = None
    layer.track_running_stats = options.get("track_running_stats", True)
    twin = copy.deepcopy(layer)
    for guard in GUARDS:
        if guard != "running":
            with told(), bnguard.frozen(layer, **GUARDS[guard]):
                assert_same_bits(layer(batch()), twin(batch()))


def test_statistic_that_becomes_a_plain_attribute_breaks_no_forward() -> None:
    """Outputs are torch's own, and the end of the block finds what happened."""
    layer = nn.BatchNorm1d(3)
    with told(), bnguard.frozen(layer, "restore"):
        mean = layer.running_mean
        del layer.running_mean
        layer.running_mean = mean
        layer(batch())
    assert_clean(layer)


# Copies.


@HOLDING
def test_copy_after_the_forward_of_the_block_was_kept(guard: str) -> None:
    """As libraries that wrap ``forward`` do: the reference that they put back works, and so do copies of the model."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    layer: Any = net[0]
    with bnguard.frozen(net, **GUARDS[guard]):
        layer._old_forward = layer.forward
        layer.forward = functools.update_wrapper(functools.partial(layer._old_forward), layer._old_forward)
        net(batch())
    layer.forward = layer._old_forward
    del layer._old_forward
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    expected = copy.deepcopy(net.state_dict())
    for clone in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        clone(batch())
        assert clone[0].num_batches_tracked == 1
        assert_same_bits(net.state_dict(), expected)


def cloned_by_dict(module: nn.Module) -> nn.Module:
    """As meta-learning libraries clone: a new object with a copy of ``__dict__`` and tables of its own."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {k: None if v is None else v.clone() for k, v in module._parameters.items()}
    clone._buffers = {k: None if v is None else v.clone() for k, v in module._buffers.items()}
    clone._modules = {k: cloned_by_dict(child) for k, child in module._modules.items() if child is not None}
    return clone


@EVERY_GUARD
@pytest.mark.parametrize("make", [nn.BatchNorm1d, Norm])
def test_clone_by_dict_made_inside_runs_by_itself(guard: str, make: Any) -> None:
    """It runs on its own weights and statistics, unguarded, inside the block and after it; the model does not move."""
    net = nn.Sequential(make(3))
    net(batch())
    twin, before = copy.deepcopy(net), state_of(net)

    def adapted(model: nn.Module) -> tuple[nn.Module, Tensor]:
        task = cloned_by_dict(model)
        for part in task.modules():
            for name, parameter in part._parameters.items():
                part._parameters[name] = parameter + 1.0  # type: ignore[assignment]
        return task, task(batch(1))

    expected_task, expected = adapted(twin)
    with bnguard.frozen(net, **GUARDS[guard]):
        task, output = adapted(net)
    assert_same_bits(output, expected)
    assert_same_bits(task(batch(2)), expected_task(batch(2)))
    assert_same_bits(net.state_dict(), before)


def test_clone_by_dict_that_first_runs_after_the_block_runs_by_itself() -> None:
    """What it took along of the block is gone with its first forward."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"):
        task = cloned_by_dict(net)
    assert_same_bits(task(batch()), twin(batch()))
    assert_same_bits(task[0].running_mean, twin[0].running_mean)  # type: ignore[index]
    assert_same_bits(net[0].running_mean, torch.zeros(3))


@EVERY_GUARD
def test_clone_by_dict_of_a_layer_with_a_forward_on_it_runs_that_forward(guard: str) -> None:
    """What the user has put on the instance goes with the clone, as it does without a guard."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    net[0].forward = torch.tanh  # type: ignore[method-assign]
    with bnguard.frozen(net, **GUARDS[guard]):
        task = cloned_by_dict(net)
        assert_same_bits(task(batch()), batch().tanh())
    assert_same_bits(task(batch()), batch().tanh())
    assert net[0].forward is torch.tanh


@HOLDING
@pytest.mark.parametrize("make", [nn.BatchNorm1d, Norm])
@pytest.mark.parametrize("other", [nn.Module, None], ids=["another-class", "same-class"])
def test_module_that_is_given_the_forward_of_a_layer_runs_the_layer(guard: str, make: Any, other: Any) -> None:
    """With ``other.forward = layer.forward`` inside a block, the layer runs: held inside, as the twin afterwards."""
    layer, module = make(3), (other or functools.partial(make, 3))()
    layer(batch())
    twin, before, unused = copy.deepcopy(layer), state_of(layer), state_of(module)
    with bnguard.frozen(layer, **GUARDS[guard]):
        module.forward = layer.forward
        output = module(batch(1))
    assert_same_bits(layer.state_dict(), before)
    with torch.no_grad():
        expected = copy.deepcopy(twin).train(guard == "restore")(batch(1))
    assert_same_bits(output, expected)
    assert_same_bits(module(batch(2)), twin(batch(2)))
    assert_same_bits(layer.state_dict(), twin.state_dict())
    assert_same_bits(module.state_dict(), unused)


def test_model_goes_with_its_last_reference() -> None:
    """A guard leaves no cycle of references behind, whatever its policy."""
    gc.collect()
    gc.disable()
    try:
        for options in GUARDS.values():
            net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Norm())
            # Not told(): the generator of a context manager keeps an exception in a cycle from Python 3.12 on.
            with suppress(bnguard.StatsChangedError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with bnguard.frozen(net, **options) as guard:
                    net(batch())
                    net.eval()(batch())
            gone = weakref.ref(net)
            del net, guard
            assert gone() is None, options
    finally:
        gc.enable()


def test_strides_of_statistics_do_not_matter() -> None:
    """Statistics that are columns of a matrix are compared, put back, and held in forwards with the twin's outputs."""

    def make() -> nn.BatchNorm1d:
        norm = nn.BatchNorm1d(3)
        norm.running_mean, norm.running_var = torch.tensor([[0.0, 1.0]] * 3).unbind(1)
        return norm

    net, twin, other = make(), make(), nn.BatchNorm1d(3)
    other(batch(4))
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net.load_state_dict(other.state_dict())
    assert_same_bits(state_of(net), state_of(twin))
    with bnguard.frozen(net, "restore"):
        assert_same_bits(net(batch(5)), twin(batch(5)))
    assert_same_bits(state_of(net), state_of(make()))


def test_default_device_of_the_user_does_not_matter() -> None:
    """A ``torch.device`` block around the end of a guard does not decide where the guard works."""
    norm, other, input = nn.BatchNorm1d(3), nn.BatchNorm1d(3), batch()
    other(input)
    with told(), torch.device("meta"), bnguard.frozen(norm, "restore"):
        norm.load_state_dict(other.state_dict())
    assert_same_bits(norm.running_mean, torch.zeros(3))
    assert norm.num_batches_tracked == 0
    with torch.device("meta"), bnguard.frozen(norm, updates=1):
        norm(input)
    assert_same_bits(norm.running_mean, other.running_mean)


class Nested(nn.BatchNorm2d):
    """A layer that runs itself in its forward, inside a block of its own."""

    guard: Callable[[nn.Module], Any] | None = None

    def forward(self, input: Tensor) -> Tensor:
        guard, self.guard = self.guard, None
        if guard is not None:
            with guard(self):
                input = self(input)
        return super().forward(input)


@pytest.mark.parametrize("updates", [0, 1])
def test_block_inside_the_forward_of_its_own_layer_holds_what_runs_in_it(updates: int) -> None:
    """The outer guard goes on to watch the forward around it, and judges what that does afterwards."""
    layer, twin = Nested(2), nn.BatchNorm2d(2)
    first = twin if updates else nn.BatchNorm2d(2)
    before, objects = state_of(layer), dict(layer.named_buffers())
    layer.guard = lambda layer: bnguard.frozen(layer, "restore", updates=updates)
    with bnguard.frozen(layer, "warn") as guard, told() as said:
        assert_same_bits(layer(images()), twin(first(images())))
    assert len(said.warnings) == 1
    assert guard.changes[0].updates == 1 + updates
    assert_same_bits(state_of(layer), state_of(twin))
    layer.load_state_dict(before)
    layer.guard = lambda layer: bnguard.frozen(layer, "restore")
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer):
        layer(images())
    assert_same_bits(state_of(layer), before)
    assert all(tensor is objects[name] for name, tensor in layer.named_buffers())
    assert_clean(layer)


def test_block_that_ends_right_before_a_forward_does_not_see_it() -> None:
    """A hook on all modules runs before those of the layer, and may end the block: the layer updates as its twin."""
    layer, twin = Nested(2), Nested(2)
    guard = bnguard.frozen(layer).start()
    its_guard = guard_of(layer)
    handle = register_module_forward_pre_hook(lambda *_: guard.stop())
    try:
        assert_same_bits(layer(images()), twin(images()))
    finally:
        handle.remove()
    assert_same_bits(state_of(layer), state_of(twin))
    assert guard.changes == ()
    assert its_guard is not None
    assert not its_guard.under_way
    assert_clean(layer)


def test_budget_of_a_block_that_its_forward_ends_is_spent() -> None:
    """The update was within it, and stands."""

    class Ending(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            guard.stop()
            return output

    layer, twin = Ending(2), nn.BatchNorm2d(2)
    guard = bnguard.frozen(layer, "restore", updates=1).start()
    assert_same_bits(layer(images()), twin(images()))
    assert_same_bits(state_of(layer), state_of(twin))
    assert_clean(layer)


def test_statistics_that_a_stopped_forward_gave_another_shape_come_back() -> None:
    """The same tensors with the same bits, although their data was exchanged."""

    class Reshaping(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            self.running_mean.data = torch.zeros(5)
            return input

    layer = Reshaping(2)
    before, objects = state_of(layer), dict(layer.named_buffers())
    guard = bnguard.frozen(layer).start()
    with pytest.raises(bnguard.StatsChangedError):
        layer(images())
    assert_same_bits(state_of(layer), before)
    assert all(tensor is objects[name] for name, tensor in layer.named_buffers())
    with pytest.raises(bnguard.StatsChangedError, match="was caught"):
        guard.stop()
