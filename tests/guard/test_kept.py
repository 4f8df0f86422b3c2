"""A block that has ended is kept for the next guard of the model, weakly: entered again, it does what a new one does.

A run in which nothing is kept is the plain way that the other one must equal.
"""

from __future__ import annotations

import _thread
import contextlib
import gc
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.guard import frozen as frozen_module
from bnguard.guard import kept
from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.tree import Tree
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.guard.test_again import ERRORS, EVENTS, POLICIES, _batch, _forward, _stop_others, assert_same, make_net

OPTIONS = {name: options for name, options in POLICIES.items() if name != "affine"}


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The models that were walked."""
    seen: list[nn.Module] = []
    init = Tree.__init__

    def counting(tree: Tree, model: nn.Module) -> None:
        seen.append(model)
        init(tree, model)

    monkeypatch.setattr(Tree, "__init__", counting)
    yield seen
    seen.clear()


def mlp(width: int = 6) -> nn.Sequential:
    """A net with two layers."""
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.BatchNorm1d(width))


def _act(net: nn.Module, random_: random.Random, *acts: Callable[[nn.Module, random.Random], Any]) -> list[Any]:
    return [act(net, random_) for act in acts]


def _in_new_guard(options: dict[str, Any]) -> Callable[..., list[Any]]:
    def call(net: nn.Module, *args: Any) -> list[Any]:
        with bnguard.frozen(net, **options):
            return _act(net, *args)

    return call


WAYS: dict[str, Callable[[dict[str, Any]], Callable[..., list[Any]]]] = {
    "strict": lambda options: bnguard.strict(**options)(_act),
    "frozen": _in_new_guard,
}


def run(events: list[Any], way: str, options: dict[str, Any], seed: int) -> list[Any]:
    """What a program says and leaves: blocks of a new guard each, with events inside of them and in between."""
    random_ = random.Random(seed)
    net = make_net(random_)
    guarded = WAYS[way](options)

    def call(net: nn.Module, *acts: Callable[[nn.Module, random.Random], Any]) -> list[Any]:
        return guarded(net, random_, *acts)

    trace: list[Any] = []
    for event in events:
        for is_inside in [random_.random() < 0.5] if seed else [True, False]:
            with told(), contextlib.suppress(*ERRORS):
                for _ in range(3):
                    call(net, lambda net, random_: net.eval()(_batch(random_)))
            trace.append(_call(call, net, event, random_, inside=is_inside))
    with told():
        _stop_others(net, random_)
    return trace


def _call(call: Any, net: nn.Module, event: Any, random_: random.Random, *, inside: bool) -> list[Any]:
    outputs: list[Any] = []

    def in_mode(training: bool) -> Callable[[nn.Module, random.Random], Any]:
        return lambda net, random_: _forward(net.train(training), random_)

    with told() as said:
        try:
            if not inside:
                outputs.append(event(net, random_))
            outputs.append(call(net, *[event] * inside, in_mode(False), in_mode(True)))
        except ERRORS as error:
            outputs.append(f"{error} {getattr(error, '__notes__', '')}")
    with told(), contextlib.suppress(*ERRORS):
        outputs.append(net(_batch(random_)))
    lines = [line for text in (said.error or "", *said.warnings) for line in text.splitlines()]
    gradients = [parameter.grad for parameter in net.parameters()]
    if not net.__dict__.get("open_guards"):
        assert_clean(net)
    for clone in net.__dict__.get("kept_clone") or ():
        assert_clean(clone)
    return [outputs, lines, gradients, state_of(net), torch.get_rng_state()]


def assert_alike(events: list[Any], way: str, policy: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes the same whether anything is kept or not."""
    found = run(events, way, OPTIONS[policy], seed)
    with monkeypatch.context() as patch:
        patch.setattr(frozen_module, "take", lambda model, settings: None)
        fresh = run(events, way, OPTIONS[policy], seed)
    assert_same(found, fresh)


# Both ways under every policy are in the random programs below.
EACH_WAY: list[tuple[str, str]] = [("strict", "restore"), *[("frozen", policy) for policy in OPTIONS]]


@pytest.mark.parametrize(("way", "policy"), EACH_WAY)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__.strip("_<>"))
def test_kept_block_is_like_a_new_one(way: str, policy: str, event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients, statistics, random numbers, what is said and left behind, of one event inside and outside."""
    assert_alike([event], way, policy, 0, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", OPTIONS)
def test_kept_block_is_like_a_new_one_in_random_programs(
    way: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for many events on nets of many forms."""
    for seed in range(1, 150):
        assert_alike(random.Random(seed).choices(EVENTS, k=6), way, policy, seed, monkeypatch)


@pytest.mark.parametrize("options", [{}, {"on_change": "restore", "include": "1"}, {"updates": 1}], ids=str)
def test_new_guard_of_a_model_walks_it_once(options: dict[str, Any], walks: list[nn.Module]) -> None:
    """``with frozen(model):`` around each step, and in an ``ExitStack``, with two sets of options in turns."""
    net = mlp().eval()

    def step() -> None:
        with bnguard.frozen(net, **options):
            net(torch.ones(2, 6))
        with contextlib.ExitStack() as stack:
            stack.enter_context(bnguard.frozen(net, "restore", exclude="3"))
            net(torch.ones(2, 6))

    for _ in range(2):  # the first block on a model looks at more
        step()
    walks.clear()
    for _ in range(5):
        step()
    selections = (5 if "include" in options else 0) + 5  # each is checked
    assert len(walks) == selections + (5 if sys.version_info >= (3, 14) else 0)  # ExitStack: a reference


def test_guard_that_somebody_has_can_be_asked_after_its_block() -> None:
    """However the block was ended; also when other blocks have followed."""
    net = mlp().eval()
    for _ in range(2):
        with bnguard.frozen(net, "warn"):
            net(torch.ones(2, 6))
    with bnguard.frozen(net, "warn") as named:
        net(torch.ones(2, 6))
    entered = bnguard.frozen(net, "warn")
    entered.__enter__()
    with pytest.warns(bnguard.BNGuardWarning):
        net.train()(torch.ones(2, 6))
    entered.__exit__(None, None, None)
    quiet = bnguard.frozen(net.eval(), "warn")
    quiet.__enter__()
    net(torch.ones(2, 6))
    quiet.__exit__(None, None, None)
    for _ in range(3):
        with bnguard.frozen(net, "warn"):
            net(torch.ones(2, 6))
    assert [change.names for change in entered.changes] == [("1",), ("3",)]
    for guard in (named, entered, quiet):
        assert [layer.names for layer in guard.layers] == [("1",), ("3",)]
        assert "guards 2 layers" in guard.report()
    assert named.changes == quiet.changes == ()


class _Wrapper:
    """A context manager of the user's around a guard."""

    def __init__(self, net: nn.Module) -> None:
        self.guard = bnguard.frozen(net, "warn")

    def __enter__(self) -> bnguard.frozen:
        self.guard.__enter__()
        return self.guard

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.guard.__exit__(kind, error, traceback)


class _OtherWrapper(_Wrapper):
    """Ends the guard by a name in a string."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        getattr(self.guard, "__exit__")(kind, error, traceback)  # noqa: B009  # so that it is a constant of the code


@pytest.mark.parametrize("wrapper", [_Wrapper, _OtherWrapper])
def test_guard_that_the_users_code_ends_describes_its_own_block(wrapper: type[_Wrapper]) -> None:
    """Not the model as it is later; another guard has not taken its block."""
    net = mlp()
    for _ in range(2):
        with bnguard.frozen(net, "warn"):
            net.eval()(torch.ones(2, 6))
    held = wrapper(net)
    with told(), held:
        net.train()(torch.randn(3, 6))
    changes = held.guard.changes
    assert [change.names for change in changes] == [("1",), ("3",)]
    with told(), bnguard.frozen(net, "warn"):
        net.eval()(torch.ones(2, 6))
    net.append(nn.BatchNorm1d(6))
    assert held.guard.changes == changes
    assert [layer.names for layer in held.guard.layers] == [("1",), ("3",)]
    assert "1 (BatchNorm1d)" in held.guard.report()


@pytest.mark.parametrize("way", WAYS)
def test_model_under_warn_is_walked_once(way: str, walks: list[nn.Module]) -> None:
    """A block whose updates were told of is kept as well; each says what it has seen, and counts for itself."""
    net = mlp()
    step = WAYS[way]({"on_change": "warn"})
    for number in range(6):
        with told() as said:
            step(net, random.Random(0), lambda net, random_: net(torch.randn(3, 6)))
        assert ["1 (BatchNorm1d) is in train mode" in text for text in said.warnings] == [True]
        if number == 1:  # the first block on a model looks at more
            walks.clear()
    assert walks == []
    assert int(net[1].num_batches_tracked) == 6  # type: ignore[arg-type]
    with told() as said:
        step(net.eval(), random.Random(0), lambda net, random_: net(torch.randn(3, 6)))
    assert said.warnings == []


def _in_a_variable(guard: Any, net: nn.Module) -> Any:
    with guard:
        net(torch.ones(2, 6))
    return guard


def _in_the_variable_of_a_caller(guard: Any, net: nn.Module) -> Any:
    _in_a_variable(guard, net)
    return guard


def _in_a_new_variable(guard: Any, net: nn.Module) -> Any:
    own = bnguard.frozen(net, "warn")
    with own:
        net(torch.ones(2, 6))
    return own


@pytest.mark.parametrize("run", [_in_a_variable, _in_the_variable_of_a_caller, _in_a_new_variable])
def test_guard_in_a_variable_can_be_asked_after_its_block(run: Any) -> None:
    """Though from Python 3.14 on a ``with`` statement may take no reference to it."""
    net = mlp()
    for _ in range(3):
        with told():
            guard = run(bnguard.frozen(net, "warn"), net)
        with told(), bnguard.frozen(net, "warn"):
            net(torch.ones(2, 6))
        assert [change.updates for change in guard.changes] == [1, 1]


def test_block_may_be_ended_by_no_python_code() -> None:
    """As by ``atexit``, or by a thread that runs nothing else."""
    net = mlp().eval()
    done = threading.Event()
    for _ in range(3):
        with bnguard.frozen(net):
            net(torch.ones(2, 6))

    def begin() -> Any:
        guard = bnguard.frozen(net)
        weakref.finalize(guard, done.set)
        return guard.__enter__().__exit__

    _thread.start_new_thread(begin(), (None, None, None))
    assert done.wait(60)
    assert_clean(net)


def test_interrupt_once_a_block_was_handed_on_is_none_of_the_next_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after another thread has entered the block that was left: it goes on holding."""
    net = mlp()
    for _ in range(3):
        with bnguard.frozen(net, "restore"):
            net(torch.randn(3, 6))
    others: list[bnguard.frozen] = []

    def keep_too_long(*args: Any) -> None:
        kept.keep(*args)
        others.append(bnguard.frozen(net, "restore").start())
        raise KeyboardInterrupt

    monkeypatch.setattr(frozen_module, "keep", keep_too_long)
    with pytest.raises(KeyboardInterrupt), bnguard.frozen(net, "restore"):
        pass
    monkeypatch.undo()
    before = state_of(net)
    net(torch.randn(3, 6))
    assert_same_bits(state_of(net), before)
    others[0].stop()
    assert_clean(net)


def test_no_more_is_kept_than_a_few_blocks_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever options the guards have."""
    net = mlp().eval()
    monkeypatch.setattr(kept, "_kept", table := ByIdentity[list[Any]]())
    for number in range(20):
        with bnguard.frozen(net, updates=number):
            net(torch.ones(2, 6))
    assert 0 < len(table.get(net) or ()) < 10


@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
def test_model_is_walked_once(policy: Any, walks: list[nn.Module]) -> None:
    """Not again at each call, wherever the model is found."""
    net = mlp().eval()

    @bnguard.strict(on_change=policy)
    def evaluate(model: nn.Module) -> Tensor:
        output: Tensor = model(torch.ones(2, 6))
        return output

    class Trainer:
        def __init__(self) -> None:
            self.model = net

        @bnguard.strict(on_change=policy)
        def evaluate(self) -> Tensor:
            output: Tensor = self.model(torch.ones(2, 6))
            return output

    trainer = Trainer()
    for _ in range(2):  # the first block on a model looks at more
        evaluate(net)
        trainer.evaluate()
    walks.clear()
    for _ in range(5):
        evaluate(net)
        trainer.evaluate()
    assert walks == []


def test_each_model_has_its_own(walks: list[nn.Module]) -> None:
    """Two models take turns; both are known from their second call on."""
    nets = [mlp(), mlp(4)]

    @bnguard.strict(on_change="restore")
    def step(model: nn.Module) -> None:
        model(torch.randn(3, 6))

    before = [state_of(net) for net in nets]
    for net in nets * 2:
        step(net)
    walks.clear()
    for _ in range(3):
        for net in nets:
            step(net)
    assert walks == []
    for net, state in zip(nets, before, strict=True):
        assert_same_bits(state_of(net), state)
        assert_clean(net)


@pytest.mark.parametrize("way", WAYS)
def test_last_reference_frees_the_model(way: str) -> None:
    """Without the garbage collector, and with it all of its parts."""
    net = mlp()
    guarded = WAYS[way]({"on_change": "restore"})

    def step(model: nn.Module) -> None:
        guarded(model, random.Random(0), lambda model, random_: model(torch.randn(3, 6)))

    parts = [weakref.ref(part) for part in net.modules()]
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            step(net)
        del net
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_part_that_is_gone_is_no_part_any_more() -> None:
    """A layer that was taken out between two calls is freed, and the rest is guarded."""
    net = mlp()

    @bnguard.strict(on_change="restore")
    def step(model: nn.Module) -> None:
        model(torch.randn(3, 6))

    for _ in range(3):
        step(net)
    gone = weakref.ref(net[3])
    net[3] = nn.Identity()
    assert gone() is None
    before = state_of(net)
    step(net)
    assert_same_bits(state_of(net), before)
    net.append(nn.BatchNorm1d(6))
    before = state_of(net)
    step(net)
    assert_same_bits(state_of(net), before)
    assert_clean(net)


@pytest.mark.parametrize("options", [{}, {"include": "*"}], ids=["all", "chosen"])
def test_model_that_has_lost_its_layers_guards_nothing_unsaid(options: dict[str, Any]) -> None:
    """The next place is looked at, at once; where no place has layers, that is said."""
    other = nn.BatchNorm1d(6)

    @bnguard.strict(on_change="restore", **options)
    def step(model: nn.Module, *others: nn.Module) -> None:
        model(torch.randn(3, 6))

    class Trainer:
        def __init__(self) -> None:
            self.other = other

        @bnguard.strict(on_change="restore", **options)
        def step(self, model: nn.Module) -> None:
            self.other(model(torch.randn(3, 6)))

    trainer, nets = Trainer(), [mlp(), mlp()]
    for _ in range(3):
        step(nets[0])
        trainer.step(nets[1])
    before = state_of(other)
    removed = [[net[1], net[3]] for net in nets]  # which somebody still has
    for net in nets:
        net[1], net[3] = nn.Identity(), nn.Identity()
    with told() as said:
        step(nets[0])
    assert any("Sequential has no layer with running statistics" in str(text) for text in said.warnings)
    with told():
        trainer.step(nets[1])
    assert_same_bits(state_of(other), before)
    for layer in [*removed[0], *removed[1], other]:
        assert_clean(layer)


def test_forward_that_is_kept_goes_on_working() -> None:
    """After the call it is that of the layer, as with a guard that is not kept; later calls are guarded."""
    net = mlp()
    forwards: list[Any] = []

    @bnguard.strict(on_change="restore")
    def step(model: nn.Module) -> None:
        forwards.append(model[1].forward)
        model(torch.randn(3, 6))

    for _ in range(3):
        step(net)
    before, twin = state_of(net[1]), nn.BatchNorm1d(6)
    batch = torch.randn(3, 6)
    assert_same_bits([forward(batch) for forward in forwards], [twin(batch) for _ in forwards])
    assert_same_bits(state_of(net[1]), state_of(twin))
    assert before["num_batches_tracked"] == 0
    state = state_of(net)
    step(net)
    assert_same_bits(state_of(net), state)


KEPT: dict[str, tuple[str, Callable[[nn.Module], Any], Callable[[Any, nn.Module], None]]] = {
    "state": (
        "restore",
        lambda layer: layer.__getstate__,
        lambda kept, layer: assert_same_bits(kept()["_buffers"], layer._buffers),
    ),
    "replica": (
        "restore",
        lambda layer: layer._replicate_for_data_parallel,
        lambda kept, layer: assert_same_bits(kept()._buffers, layer._buffers),
    ),
    "hook": (
        "raise",
        lambda layer: layer._forward_pre_hooks["bnguard"],
        lambda kept, layer: kept(layer, (torch.randn(3, 6),)),
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_of_a_layer_goes_on_working(what: str) -> None:
    """Somebody has it from inside of a block, and calls it after later blocks on the model, or without one."""
    policy, take, use = KEPT[what]
    net, found = mlp().eval(), []
    for _ in range(4):
        with bnguard.frozen(net, policy):
            found.append(take(net[1]))
    net.train()
    for each in found:
        use(each, net[1])
    assert_clean(net)


@pytest.mark.parametrize("policy", ["restore", "warn"])
def test_weak_reference_to_a_forward_goes_on_working(policy: str) -> None:
    """One to a method, or to the object: after the block, and in later ones."""
    net, twin = mlp()[1:2], mlp()[1:2]
    methods, objects = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            with bnguard.frozen(net, policy):
                methods.append(weakref.WeakMethod(net[0].forward))
                objects.append(weakref.ref(net[0].forward))
                net(torch.ones(3, 6))
    batch = torch.randn(3, 6)
    expected = twin(batch)
    for reference in [*methods, *objects]:
        forward = reference()
        if forward is not None:
            assert_same_bits(forward(batch), expected)
    assert_clean(net)


def test_call_inside_of_a_call_has_a_guard_of_its_own() -> None:
    """A function that calls itself, and two threads that call it at the same time."""
    net = mlp()
    before = state_of(net)
    barrier = threading.Barrier(2)

    @bnguard.strict(on_change="restore")
    def step(model: nn.Module, depth: int = 0, wait: bool = False) -> None:
        if depth:
            step(model, depth - 1)
        if wait:
            barrier.wait(10)
        model(torch.randn(3, 6))
        if wait:
            barrier.wait(10)

    for _ in range(4):
        step(net, 2)
        threads = [threading.Thread(target=step, args=(net, 0, True)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert_clean(net)
        assert_same_bits(state_of(net), before)


def test_generator_takes_the_guard_at_each_part(walks: list[nn.Module]) -> None:
    """What the caller does in between is in no block, also with the same function."""
    net = mlp()

    @bnguard.strict(on_change="restore")
    def steps(model: nn.Module) -> Iterator[Tensor]:
        for _ in range(3):
            yield model(torch.randn(3, 6))

    list(steps(net))
    walks.clear()
    before = state_of(net)
    for _ in steps(net):
        assert_clean(net)
        assert next(steps(net)) is not None
        assert_same_bits(state_of(net), before)
    assert walks == []


def test_call_that_fails_leaves_nothing() -> None:
    """The next call has a new guard, which finds the same."""
    net = mlp()

    @bnguard.strict
    def step(model: nn.Module, training: bool) -> None:
        model.train(training)(torch.randn(3, 6))

    for _ in range(3):
        step(net, False)
        with pytest.raises(bnguard.StatsChangedError, match=r"1 \(BatchNorm1d\) is in train mode"):
            step(net, True)
        assert_clean(net)


class EqualToAll:
    """Selects one layer, and says that it is equal to everything, as ``unittest.mock.ANY`` does."""

    def __call__(self, name: str, module: nn.Module) -> bool:
        return name == "3"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


class EqualToNothingElse(nn.BatchNorm1d):
    """Can be compared with layers of its own class alone."""

    def __eq__(self, other: Any) -> bool:
        return bool(self.num_features == other.num_features)

    __hash__ = nn.BatchNorm1d.__hash__


def test_selection_is_not_compared_with_what_the_user_gives() -> None:
    """A predicate or a module with an ``__eq__`` of its own selects what it says, not what a pattern did before."""
    net = mlp().append(EqualToNothingElse(6))
    for _ in range(3):
        with bnguard.frozen(net.eval(), "restore", include="1"):
            net(torch.ones(2, 6))
    for include, name in ((EqualToAll(), "3"), (net[4], "4")):
        with bnguard.frozen(net, "restore", include=include) as guard:
            assert [layer.names for layer in guard.layers] == [(name,)]


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "again"])
def test_statistic_that_is_no_longer_saved_stays_one(is_new: bool) -> None:
    """One that was taken out of the state dict between two blocks returns as such after it was deleted."""
    net = mlp()
    kept_guard = bnguard.frozen(net, "restore")
    for _ in range(3):
        with bnguard.frozen(net, "restore") if is_new else kept_guard:
            pass
    net[1].register_buffer("running_mean", net[1]._buffers["running_mean"], persistent=False)
    names = list(net.state_dict())
    with told() as said, bnguard.frozen(net, "restore") if is_new else kept_guard:
        del net[1].running_mean
    assert "running_mean" in said.warnings[0]
    assert list(net.state_dict()) == names
    assert "running_mean" in net[1]._buffers


class WithHeads(nn.Module):
    """Runs layers that it does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.heads: list[nn.Module] = []
        self.note = 1

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = nn.Sequential(self.norm, *self.heads)(input)
        return output


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "again"])
def test_layer_in_a_list_that_another_guard_has_found_is_named(is_new: bool) -> None:
    """Also where the model has as many attributes and items again as when it was searched before."""
    net = WithHeads().eval()
    kept_guard = bnguard.frozen(net)

    def step(**options: Any) -> None:
        with bnguard.frozen(net, **options) if is_new or options else kept_guard:
            net(torch.randn(4, 6))

    for _ in range(3):
        step()
    net.heads.append(nn.BatchNorm1d(6).eval())
    step(on_change="restore")
    del net.note
    net.heads[0].train()
    with told() as said:
        step()
    assert "heads.0 (BatchNorm1d)" in said.warnings[0]


class Waiting(Tensor):
    """A batch that waits when a layer asks for its number of dimensions."""

    is_there: threading.Event
    may_go_on: threading.Event

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.dim and not args[0].is_there.is_set():
            args[0].is_there.set()
            args[0].may_go_on.wait(30)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_forward_of_an_earlier_block_finds_its_layers() -> None:
    """It goes on while the guard is used for the last time, by a ``with`` statement that has the only reference."""
    net = mlp()
    batch = torch.randn(4, 6).as_subclass(Waiting)
    batch.is_there, batch.may_go_on = threading.Event(), threading.Event()
    guards = [bnguard.frozen(net, "warn")]
    for _ in range(3):
        with guards[0]:
            pass
    outputs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(net[1](batch)))
    with told():
        with guards[0]:
            thread.start()
            assert batch.is_there.wait(30)
        with guards.pop():
            pass
        batch.may_go_on.set()
        thread.join(30)
    assert_same_bits(outputs[0].as_subclass(Tensor), nn.BatchNorm1d(6)(batch.as_subclass(Tensor)))
    assert_clean(net)
