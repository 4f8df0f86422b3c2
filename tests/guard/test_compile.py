"""``torch.compile``: what a graph updates is held, or found at the end of the block."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, state_of, warns
from tests.old_torch import needs_guarded_graphs

pytestmark = [
    needs_guarded_graphs,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf",  # dynamo looks, after a graph break
    ),
]
HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
HAS_COMPILER = HAS_HEADERS and any(map(shutil.which, ("g++", "clang++", "c++")))
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
FULLGRAPH = pytest.mark.parametrize(
    "fullgraph", [pytest.param(True, id="fullgraph"), pytest.param(False, id="breaks", marks=pytest.mark.slow)]
)
HOLDS = pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"use_running_stats": True}], ids=["restore", "running"]
)


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Net(nn.Module):
    """One layer of each kind of update; on demand, a graph break in the middle."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.breaks = breaks
        self.conv = nn.Conv2d(3, 4, 1)
        self.stock = nn.BatchNorm2d(4)
        self.own = Doubled(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.sync = nn.SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.stock(self.conv(x)).relu())
        if self.breaks:
            torch._dynamo.graph_break()
        return self.sync(self.instance(x))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def by_function(net: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """``torch.compile(model)``."""
    return torch.compile(net, **options)


def by_method(net: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """``model.compile()``."""
    net.compile(**options)
    return net


def by_step(net: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """A compiled step function that closes over the model."""

    @torch.compile(**options)
    def step(x: Tensor) -> Tensor:
        return net(x) * 1

    return step


FORMS = pytest.mark.parametrize("form", [by_function, by_method, by_step])


def make_input(seed: int = 1, number: int = 4) -> Tensor:
    """A batch that needs a gradient."""
    return torch.randn(number, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def graphs() -> int:
    """Graphs made since the test began."""
    return int(counters["stats"]["unique_graphs"])


def graphs_of_an_unguarded_run(form: Callable[..., Any], options: dict[str, Any], inputs: list[Tensor]) -> int:
    """How many graphs a net needs in train mode and no guard; nothing of it stays."""
    net = Net(breaks=not options["fullgraph"])
    run = form(net, **options)
    for x in inputs:
        run(x)
    number = graphs()
    torch._dynamo.reset()
    counters.clear()
    return number


def run(net: nn.Module, function: Callable[[Tensor], Tensor], seed: int = 1) -> dict[str, Tensor | None]:
    """Output and gradients of a forward and backward pass."""
    net.zero_grad()
    x = make_input(seed)
    output = function(x)
    output.square().sum().backward()
    return {
        "output": output.detach(),
        "input": x.grad,
        **{name: parameter.grad for name, parameter in net.named_parameters()},
    }


def set_mode(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Puts the twin's normalisation layers in eval mode where the guard makes them behave so."""
    for module in net.modules():
        if options.get("use_running_stats") and isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return net


@BACKENDS
@HOLDS
def test_warm_graph_is_held_with_one_more_graph(backend: str, options: dict[str, Any]) -> None:
    """A model compiled before is held in any number of blocks, and runs its old graph outside; no graph breaks."""
    net, x = Net(), make_input()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    compiled(x)
    for _ in range(3):
        before = state_of(net)
        with bnguard.frozen(net, **options):
            compiled(x)
        assert_same_bits(net.state_dict(), before)
        compiled(x)
    assert graphs() == 2
    compiled_twin = torch.compile(twin, backend=backend, fullgraph=True)
    for _ in range(4):
        compiled_twin(x)
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert_clean(net)


@FORMS
@FULLGRAPH
@HOLDS
def test_every_form_of_compiling_is_held(form: Callable[..., Any], options: dict[str, Any], fullgraph: bool) -> None:
    """However a model is compiled, a warm graph moves nothing inside, and each mode costs its graphs once."""
    compile_options = {"backend": "aot_eager", "fullgraph": fullgraph}
    once = graphs_of_an_unguarded_run(form, compile_options, [make_input()])
    net = Net(breaks=not fullgraph)
    before = state_of(net)
    function = form(net, **compile_options)
    function(make_input())
    moved = state_of(net)
    for _ in range(3):
        with bnguard.frozen(net, **options):
            function(make_input())
        assert_same_bits(state_of(net), moved)
    number = graphs()
    assert once < number <= 2 * once
    net.load_state_dict(before)
    function(make_input())
    assert_same_bits(state_of(net), moved)
    assert graphs() == number
    assert_clean(net)


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler and the headers of Python")
@torch.no_grad()
def test_warm_graph_of_inductor_is_held() -> None:
    """One layer in a graph of inductor, whose other tests are slow: held inside a block, and not before or after."""
    net, twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    compiled = torch.compile(net, backend="inductor", fullgraph=True)
    compiled(make_input())
    twin(make_input())
    torch.testing.assert_close(state_of(net), state_of(twin))
    before = state_of(net)
    with bnguard.frozen(net, "restore"):
        torch.testing.assert_close(compiled(make_input()), F.batch_norm(make_input(), None, None, training=True))
    assert_same_bits(state_of(net), before)
    compiled(make_input(2))
    assert net.num_batches_tracked == 2
    assert graphs() == 2


@BACKENDS
@HOLDS
def test_held_graph_computes_what_an_unguarded_graph_does(backend: str, options: dict[str, Any]) -> None:
    """Outputs and gradients inside are those of a compiled twin, in eval mode where running statistics are used."""
    net = Net()
    twin = set_mode(copy.deepcopy(net), options)
    with bnguard.frozen(net, **options):
        inside = run(net, torch.compile(net, backend=backend, fullgraph=True))
    expected = run(twin, torch.compile(twin, backend=backend, fullgraph=True))
    assert_same_bits(inside, expected)


@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
@FORMS
def test_model_compiled_inside_trains_on_after_the_block(form: Callable[..., Any], policy: str) -> None:
    """A graph that was traced inside a block does not outlive it: afterwards the net moves as its twin."""
    net = Net()
    twin, before = copy.deepcopy(net), state_of(net)
    guard = bnguard.frozen(net, policy).start()
    function = form(net, backend="aot_eager", fullgraph=True)
    function(make_input())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        try:
            guard.stop()
        except bnguard.StatsChangedError:
            assert policy == "raise"
    net.load_state_dict(before)
    twin_function = form(twin, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        assert_same_bits(run(net, function, seed), run(twin, twin_function, seed))
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert_clean(net)


def test_model_compiled_after_a_block_trains_as_its_twin() -> None:
    """A block leaves nothing that a later graph could take in."""
    net = Net()
    twin = copy.deepcopy(net)
    with bnguard.frozen(net, "restore"):
        net(make_input())
    functions = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in (net, twin)]
    assert_same_bits(run(net, functions[0]), run(twin, functions[1]))
    assert_same_bits(net.state_dict(), twin.state_dict())


def test_any_number_of_blocks_of_any_mode_makes_one_graph_a_mode() -> None:
    """Rounds of all modes, nested ones too: the second round and every later one traces nothing."""
    net, x = Net(), make_input()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    modes: list[dict[str, Any]] = [
        {"on_change": "restore"},
        {"use_running_stats": True},
        {"on_change": "restore", "updates": 1},
        {"on_change": "warn"},
        {"on_change": "raise"},
    ]

    def round_of_blocks() -> None:
        compiled(x)
        for options in modes:
            guard = bnguard.frozen(net, **options).start()
            compiled(x)
            with bnguard.frozen(net, "restore"), bnguard.frozen(net, "restore"):
                compiled(x)
            compiled(x)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bnguard.BNGuardWarning)
                try:
                    guard.stop()
                except bnguard.StatsChangedError:
                    assert options["on_change"] == "raise"
            compiled(x)

    round_of_blocks()
    number = graphs()
    assert number <= 1 + len(modes)
    for _ in range(3):
        round_of_blocks()
    assert graphs() == number
    assert not counters["graph_break"]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@HOLDS
def test_dynamic_shapes_are_held(options: dict[str, Any], dynamic: bool | None) -> None:
    """Batches of several sizes: each as held as the first, with no more graphs a mode than without a guard."""
    sizes = [2, 3, 5, 7, 4]
    compile_options = {"backend": "aot_eager", "fullgraph": True, "dynamic": dynamic}
    once = graphs_of_an_unguarded_run(by_function, compile_options, [make_input(number=size) for size in sizes])
    net = Net()
    twin, before = set_mode(copy.deepcopy(net), options), state_of(net)
    compiled, twin_compiled = (torch.compile(model, **compile_options) for model in (net, twin))
    for _ in range(2):
        for size in sizes:
            x = make_input(number=size)
            with bnguard.frozen(net, **options):
                output = compiled(x)
            assert_same_bits(output, twin_compiled(x))
    assert_same_bits(state_of(net), before)
    torch._dynamo.reset()
    counters.clear()
    for size in sizes:
        with bnguard.frozen(net, **options):
            compiled(make_input(number=size))
    assert graphs() <= once


@HOLDS
def test_compiled_train_step_is_held(options: dict[str, Any]) -> None:
    """Forward, backward and the optimizer in one compiled function: parameters move as a twin's, statistics do not."""

    def trainer(net: nn.Module) -> Callable[[Tensor], None]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        @torch.compile(backend="aot_eager")
        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

        return step

    net = Net()
    twin, before = copy.deepcopy(net), state_of(net)
    step, twin_step = trainer(net), trainer(twin)
    set_mode(twin, options)
    saved = {name: tensor.clone() for name, tensor in twin.named_buffers()}
    for seed in range(3):
        with bnguard.frozen(net, **options):
            step(make_input(seed))
        twin_step(make_input(seed))
        for name, tensor in twin.named_buffers():
            tensor.data.copy_(saved[name])
    assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(net.stock.running_mean, before["stock.running_mean"])
    assert not torch.equal(net.conv.weight, before["conv.weight"])


@FORMS
@BACKENDS
def test_update_of_a_graph_is_found_at_the_end(backend: str, form: Callable[..., Any]) -> None:
    """Under raise the end of the block names the layers and puts back; under warn it warns and lets stand."""
    net, x = Net(), make_input()
    function = form(net, backend=backend, fullgraph=True)
    function(x)
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError, match=r"  stock \(BatchNorm2d\): running_mean"), bnguard.frozen(net):
        function(x)
    assert_same_bits(net.state_dict(), before)
    with warns(), bnguard.frozen(net, "warn") as guard:
        function(x)
    assert {change.updates for change in guard.changes} == {0}
    assert net.stock.num_batches_tracked == before["stock.num_batches_tracked"] + 1


@FORMS
def test_guard_says_that_a_graph_was_met(form: Callable[..., Any]) -> None:
    """``guard.layers`` tells a layer in a compiled graph from one that runs as it is, in later blocks too."""
    net = nn.ModuleDict({"compiled": Net(), "eager": nn.BatchNorm2d(3)})
    function = form(net["compiled"], backend="eager", fullgraph=True)
    for _ in range(2):
        with bnguard.frozen(net, "restore") as guard:
            function(make_input())
        assert {layer.names[0].partition(".")[0]: layer.protection for layer in guard.layers} == {
            "compiled": "held in its forward, in a compiled graph too; compared at exit",
            "eager": "held in its forward; compared at exit",
        }
    with pytest.raises(bnguard.StatsChangedError) as caught, bnguard.frozen(net) as guard:
        function(make_input())
    assert {layer.protection for layer in guard.layers[:4]} == {
        "compared at exit only (a compiled graph runs no hooks)"
    }
    assert guard.layers[4].protection == "checked before each forward; compared at exit"
    text = str(caught.value)
    assert "\nIn a compiled graph no forward can be seen or stopped; this comparison finds what it changed.\n" in text
    assert 'frozen(model, on_change="restore")' in text


def test_guard_on_a_compiled_model_says_so_before_any_forward() -> None:
    """``frozen(torch.compile(model))`` knows what it guards, and names its layers as ever."""
    net = Net()
    guard = bnguard.frozen(torch.compile(net, backend="eager"))
    assert [layer.names for layer in guard.layers] == [("stock",), ("own",), ("instance",), ("sync",)]
    assert all("compiled graph" in layer.protection for layer in guard.layers)


def test_budget_is_counted_by_the_layers_counter() -> None:
    """``updates=1`` lets one compiled update stand and finds two; a layer that counts nothing is found at once."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Doubled(4))
    twin = copy.deepcopy(net)
    compiled, twin_compiled = (torch.compile(model, backend="eager", fullgraph=True) for model in (net, twin))
    for options in ({"on_change": "raise"}, {"on_change": "restore"}, {"on_change": "warn"}):
        with bnguard.frozen(net, updates=1, **options) as guard:
            compiled(make_input())
        assert guard.changes == ()
        twin_compiled(make_input())
        assert_same_bits(net.state_dict(), twin.state_dict())
    assert guard.layers[0].protection == (
        "compared at exit only (a compiled graph runs no hooks; updates are counted by num_batches_tracked)"
    )
    with bnguard.frozen(net, updates=3) as guard:
        compiled(make_input())
        guard.check()
        net(make_input())
        compiled(make_input())
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError, match="2 layers changed"), bnguard.frozen(net, updates=1):
        compiled(make_input())
        compiled(make_input())
    assert_same_bits(net.state_dict(), before)
    instance = nn.InstanceNorm2d(3, track_running_stats=True)
    compiled = torch.compile(instance, backend="eager", fullgraph=True)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(instance, updates=1) as guard:
        compiled(make_input())
    assert "updates are not counted" in guard.layers[0].protection


def test_write_that_is_no_update_is_found_despite_a_budget() -> None:
    """What a counter does not explain is a change, in a layer that is compiled as in any other."""
    net = nn.BatchNorm2d(3)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with bnguard.frozen(net, updates=1):
        compiled(make_input())
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net, updates=1):
        net.running_mean += 1
    assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize("options", [{}, {"on_change": "restore"}, {"use_running_stats": True}, {"updates": 1}])
def test_statistics_lent_in_a_graph_are_theirs(options: dict[str, Any]) -> None:
    """A compiled ``functional_call`` with buffers of its own updates those, as unguarded, and nobody is told."""
    net = Net()
    before = state_of(net)

    @torch.compile(backend="eager", fullgraph=True)
    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, (parameters, buffers), (x,))

    def lend() -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
        return call(dict(net.named_parameters()), buffers, make_input()), buffers

    expected = lend()
    with bnguard.frozen(net, **options):
        for _ in range(2):
            output, buffers = lend()
            assert_same_bits(output, expected[0])
            assert_same_bits(buffers, expected[1])
    assert_same_bits(net.state_dict(), before)


@HOLDS
def test_statistics_replaced_inside_are_held_in_a_graph(options: dict[str, Any]) -> None:
    """Buffers that the user puts into a layer for good, in the block, are the layer's: a graph does not move them."""
    net = Net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    compiled(make_input())
    with bnguard.frozen(net, **options):
        net.double()
        compiled(make_input().double())
        held = state_of(net)
        compiled(make_input().double())
        assert_same_bits(state_of(net), held)
    before = state_of(net)
    with warns(), bnguard.frozen(net, "restore"):
        net.load_state_dict({name: tensor + 1 for name, tensor in before.items()}, assign=True)
        held = state_of(net)
        compiled(make_input().double())
        assert_same_bits(state_of(net), held)


def test_affine_parameters_are_held_in_a_graph() -> None:
    """``affine=True``: no gradient reaches weight and bias through a graph, in any number of blocks with one graph."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(make_input()).sum().backward()
    for _ in range(3):
        net.zero_grad()
        with bnguard.frozen(net, "restore", affine=True):
            compiled(make_input()).square().sum().backward()
            assert net[1].weight.grad is None
            assert net[0].weight.grad is not None
    assert graphs() == 2


# A block that begins inside a compiled function.


@pytest.mark.parametrize("options", [{}, {"on_change": "warn"}, {"on_change": "restore"}, {"use_running_stats": True}])
@pytest.mark.parametrize("how", ["frozen", "strict", "recompute_frozen"])
def test_block_inside_a_compiled_function(how: str, options: dict[str, Any]) -> None:
    """A function that opens a block itself can be compiled: the block begins and ends between graphs."""
    net = Net()
    before = state_of(net)

    def with_block(x: Tensor) -> Tensor:
        with bnguard.frozen(net, **options):
            return net(x) * 2

    def with_recompute(x: Tensor) -> Tensor:
        with bnguard.frozen(net, **options), bnguard.recompute_frozen(net):
            return net(x) * 2

    ways = {
        "frozen": with_block,
        "strict": bnguard.strict(model=net, **options)(lambda x: net(x) * 2),
        "recompute_frozen": with_recompute,
    }
    step = torch.compile(ways[how], backend="eager")
    for _ in range(2):
        if options.get("on_change") == "warn":
            with warns():
                step(make_input())
        elif options:
            step(make_input())
        else:
            with pytest.raises(bnguard.StatsChangedError, match=r"stock \(BatchNorm2d\)"):
                step(make_input())
    held = {name: tensor for name, tensor in state_of(net).items() if options != {"on_change": "warn"}}
    assert_same_bits(held, {name: before[name] for name in held})
    assert graphs() >= 1
    assert_clean(net)


def test_first_use_of_the_package_may_be_in_a_compiled_function() -> None:
    """The package loads its parts when first asked for: a compiled function may be the one that asks."""
    script = """
import warnings
import torch, bnguard
net = torch.nn.BatchNorm1d(3)
@torch.compile(backend="eager")
def step(x):
    with bnguard.frozen(net, "restore"), bnguard.recompute_frozen(net):
        return net(x) * 2
warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
step(torch.ones(2, 3))
assert net.num_batches_tracked == 0
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_block_inside_a_whole_graph_is_refused_in_one_sentence() -> None:
    """``fullgraph=True`` around a block cannot be: torch's error carries our sentence, and nothing is left behind."""
    net = Net()

    def with_block(x: Tensor) -> Tensor:
        with bnguard.frozen(net, "restore"):
            return net(x)

    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(with_block, backend="eager", fullgraph=True)(make_input())
    assert "a block of bnguard cannot begin or end inside a graph: open it around the compiled function" in str(
        caught.value
    )
    assert_clean(net)


@pytest.mark.parametrize("decorate", [bnguard.strict, bnguard.frozen], ids=["strict", "frozen"])
def test_decorated_function_that_is_compiled_whole(decorate: Callable[..., Any]) -> None:
    """The guard is around the one graph."""
    net, twin = Net(), Net()
    before = state_of(net)
    guard = decorate(model=net, on_change="restore")
    step = torch.compile(guard(lambda x: net(x)), backend="eager", fullgraph=True)
    for x in (make_input(), make_input()):
        assert_same_bits(step(x), twin(x))
    assert graphs() == 1
    assert_same_bits(state_of(net), before)
    assert_clean(net)


def test_compiled_function_under_strict_compiles() -> None:
    """``strict`` around a compiled function leaves it whole."""
    net = Net()
    before = state_of(net)
    step = bnguard.strict(model=net, on_change="restore")(torch.compile(net, backend="eager", fullgraph=True))
    for _ in range(3):
        step(make_input())
    assert graphs() == 1
    assert_same_bits(net.state_dict(), before)


# Checkpoints in a compiled function.


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), Doubled(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@HOLDS
def test_compiled_checkpoint_is_held(backend: str, options: dict[str, Any]) -> None:
    """A checkpointed region in a graph: no update in forward or recomputation, and the gradients of a twin.

    Backward after the block too: the graph recomputes what it ran.
    """
    net = Checkpointed()
    twin, before = set_mode(copy.deepcopy(net), options), state_of(net)
    compiled, twin_compiled = (torch.compile(model, backend=backend, fullgraph=True) for model in (net, twin))
    for is_inside in (True, False):
        net.zero_grad()
        twin.zero_grad()
        with bnguard.frozen(net, **options):
            loss = compiled(make_input()).square().sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        twin_compiled(make_input()).square().sum().backward()
        assert_same_gradients(net, twin)
        assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_recompute_frozen_leaves_a_compiled_checkpoint_alone(backend: str) -> None:
    """A compiled region updates once anyway, and does so under ``recompute_frozen``."""
    net = Checkpointed()
    twin = copy.deepcopy(net)
    compiled, twin_compiled = (torch.compile(model, backend=backend, fullgraph=True) for model in (net, twin))
    with bnguard.recompute_frozen(net):
        compiled(make_input()).square().sum().backward()
    twin_compiled(make_input()).square().sum().backward()
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert net.body[1].num_batches_tracked == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@HOLDS
def test_reduce_overhead_is_held(options: dict[str, Any]) -> None:
    """``mode="reduce-overhead"`` replays CUDA graphs: held inside, and as its twin before and after."""
    net = Net().cuda()
    twin = copy.deepcopy(net)
    compiled, twin_compiled = (torch.compile(model, mode="reduce-overhead", fullgraph=True) for model in (net, twin))
    x = make_input().detach().cuda()
    for _ in range(4):  # warm up, record, replay
        compiled(x)
        twin_compiled(x)
    before = state_of(net)
    assert_same_bits(before, state_of(twin))
    for _ in range(4):
        with bnguard.frozen(net, **options):
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                compiled(x)
        assert_same_bits(state_of(net), before)
    compiled(x)
    twin_compiled(x)
    assert_same_bits(state_of(net), state_of(twin))


# What is traced, seen from the layer.


@pytest.mark.parametrize("own", [False, True], ids=["stock", "own-forward"])
@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"on_change": "restore"}, False),
        ({"use_running_stats": True}, False),
        ({"on_change": "raise"}, True),
        ({"on_change": "warn"}, True),
        ({"on_change": "restore", "updates": 1}, True),
    ],
    ids=["restore", "running", "raise", "warn", "budget"],
)
def test_traced_forward_holds_or_lets_pass(
    options: dict[str, Any], moves: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a graph is traced nothing is judged, counted or recorded: a forward is held, or is the layer's own."""
    for layer in (Doubled(3) if own else nn.BatchNorm2d(3), nn.SyncBatchNorm(3), patched(nn.BatchNorm2d(3))):
        before, x = state_of(layer), torch.randn(4, 3, 2, 2)
        guard = bnguard.frozen(layer, **options).start()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            layer(x)
        assert (layer.num_batches_tracked == before["num_batches_tracked"] + 1) == moves
        assert guard.changes == ()
        layer.load_state_dict(before)
        guard.stop()


def patched(layer: nn.Module) -> nn.Module:
    """With a forward that somebody put on the instance."""
    own = layer.forward
    layer.forward = lambda input: own(input)
    return layer


def test_traced_forward_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose mean and variance the user took away keeps to the batch, traced or not."""
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    expected = nn.BatchNorm2d(3)(x)
    layer.running_mean = layer.running_var = None
    for compiling in (False, True):
        with monkeypatch.context() as patch, bnguard.frozen(layer, "restore"):
            patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            assert_same_bits(layer(x), expected)
    assert layer.num_batches_tracked == 0


class Storing(nn.BatchNorm2d):
    """A layer that stores things on itself as it runs."""

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("last", torch.zeros(()))
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.last = input.sum()
        return super().forward(input)


@pytest.mark.filterwarnings("ignore:also moved")  # another buffer, as it should
def test_traced_forward_keeps_what_the_layer_stores_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes and other buffers are the twin's; the statistics stay."""
    layer, twin, x = Storing(), Storing(), torch.randn(4, 3, 2, 2)
    before = state_of(layer)
    with monkeypatch.context() as patch, bnguard.frozen(layer, "restore"):
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert_same_bits(layer(x), twin(x))
    assert layer.calls == twin.calls == 1
    assert_same_bits(state_of(layer), {**before, "last": twin.last})
    assert_clean(layer)


def test_traced_forward_of_a_rollback_is_the_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph reads the statistics themselves; elsewhere a forward reads clones, for a later backward pass."""
    layer, seen, x = nn.SyncBatchNorm(3).eval(), [], torch.randn(4, 3, 2, 2)
    with monkeypatch.context() as patch, bnguard.frozen(layer, "rollback"):
        patch.setattr(F, "batch_norm", lambda input, mean, *_: seen.append(mean) or input)
        layer(x)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(x)
    assert [mean is layer.running_mean for mean in seen] == [False, True]


def test_traced_forward_with_replaced_statistics_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the layer's own from then on."""
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    with bnguard.frozen(layer, "restore"):
        mean = layer.running_mean
        layer.running_mean = mean.clone()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            layer(x)
        assert_same_bits(layer.running_mean, mean)
        assert layer.num_batches_tracked == 0


def test_budget_without_a_counter_covers_no_update_of_a_graph() -> None:
    """Nothing says how many updates there were: what a graph has changed is a finding, and is restored."""
    net, twin = (nn.InstanceNorm2d(3, track_running_stats=True) for _ in range(2))
    del net.num_batches_tracked, twin.num_batches_tracked
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net, updates=1):
        assert_same_bits(compiled(make_input()), twin(make_input()))
    assert_same_bits(state_of(net), before)
