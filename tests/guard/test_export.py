"""Programs made of a model, scripted, traced or exported: made inside a block they have no guard in them."""

from __future__ import annotations

import copy
import io
import itertools
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import bnguard
from tests.asserts import (
    WITHOUT_BNGUARD,
    Told,
    assert_clean,
    assert_same_bits,
    run_threads,
    state_of,
    statistics,
    told,
    values,
    warns,
)
from tests.nets import PlainSubclass, ScaledNorm, conv_net, images, warmed
from tests.old_torch import RELEASE, skip_refused_export
from tests.policies import EVERY_POLICY, POLICIES

# torch's own: torch.jit is deprecated, a train-mode trace is never sure of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*is (deprecated|not supported in Python 3.14):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning"),  # from torch 2.14 on
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
ROOT = Path(__file__).parents[2]


class Traceable(nn.Module):
    """A layer with a forward of its own that every tool can read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = input.mean([0, 2, 3])
            self.running_mean.lerp_(mean.detach(), 0.3)
        return input - mean[None, :, None, None]


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True, affine=True),
    "subclass": PlainSubclass,
    "subclass-own-forward": ScaledNorm,
    "own": Traceable,
}


def make_net(layer: str = "BatchNorm2d") -> nn.Sequential:
    """A convolution, one layer with statistics, an activation."""
    return warmed(nn.Sequential(nn.Conv2d(2, 3, 3), LAYERS[layer](3), nn.ReLU()))


def trace(net: nn.Module) -> Any:
    """A trace, made in one forward."""
    return torch.jit.trace(net, images(), check_trace=False)


def export(net: nn.Module) -> Any:
    """An exported program as a module."""
    return torch.export.export(net, (images(),), strict=False).module()


def export_strictly(net: nn.Module) -> Any:
    """The same, by way of the compiler."""
    return torch.export.export(net, (images(),), strict=True).module()


def unflatten(net: nn.Module) -> Any:
    """An exported program with the modules of the original."""
    return torch.export.unflatten(torch.export.export(net, (images(),), strict=False))


class Recorded(nn.Module):
    """What ``make_fx`` makes of a model whose tensors are inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()

        def run(parameters: Any, buffers: Any, input: Tensor) -> Tensor:
            return torch.func.functional_call(net, (parameters, buffers), (input,))

        self.net = net
        self.graph_module = make_fx(run)(dict(net.named_parameters()), values(dict(net.named_buffers())), images())

    def forward(self, input: Tensor) -> Tensor:
        return self.graph_module(dict(self.net.named_parameters()), dict(self.net.named_buffers()), input)


def record(net: nn.Module) -> Any:
    """What ``make_fx`` makes of a model as it is."""
    return make_fx(net, _allow_non_fake_inputs=True)(images())


# Those that run the model on real tensors as they take it down, and those that do not.
REAL = {"trace": trace, "make_fx": record}
SYMBOLIC = {
    "export": export,
    "export-strict": export_strictly,
    "unflatten": unflatten,
    "fx": torch.fx.symbolic_trace,
    "make_fx-functional": Recorded,
}
TOOLS: dict[str, Callable[[nn.Module], Any]] = {**REAL, **SYMBOLIC}
UNREADABLE = {("fx", "subclass"), ("fx", "subclass-own-forward")}  # torch cannot, guard or no guard
LEAVES = {"BatchNorm2d", "SyncBatchNorm", "InstanceNorm2d"}  # to fx.symbolic_trace
SLOW = {"export", "export-strict", "unflatten"}


def cases(*slow_policies: str) -> pytest.MarkDecorator:
    """Every tool, layer and policy; of the slow tools two layers and some policies."""
    everything = itertools.product(TOOLS, LAYERS, POLICIES)
    return pytest.mark.parametrize(
        ("tool", "layer", "policy"),
        [
            (tool, layer, policy)
            for tool, layer, policy in everything
            if (tool, layer) not in UNREADABLE
            and (policy != "affine" or layer == "BatchNorm2d")
            and (tool not in SLOW or (layer in ("BatchNorm2d", "own") and policy in slow_policies))
        ],
    )


def give_statistics(net: nn.Module, other: nn.Module) -> None:
    """Gives ``other`` the statistics of ``net``, in the tensors that it has."""
    with torch.no_grad():
        for name, tensor in statistics(other).items():
            tensor.copy_(statistics(net)[name])


def text_of(program: Any) -> str:
    """The code of a program, without the paths of the files that it was made from."""
    if isinstance(program, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return re.sub(r"#.*", "", program.inlined_graph.str())
    return program.print_readable(False)


def assert_same_program(program: Any, twin: Any, net: nn.Module, net_twin: nn.Module) -> None:
    """Two programs of two equal models do the same: to outputs, to their own state, and to their models'."""
    for part in program.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            assert_clean(part)
    if isinstance(program, torch.fx.GraphModule):
        assert program.code == twin.code
    if isinstance(program, torch.jit.ScriptModule):
        kinds = [[node.kind() for node in one.inlined_graph.nodes()] for one in (program, twin)]
        assert kinds[0] == kinds[1]
        assert "bnguard" not in text_of(program)
    give_statistics(net, net_twin)
    for seed in range(2):
        assert_same_bits(program.state_dict(), twin.state_dict())
        assert_same_bits(program(images(seed=seed)), twin(images(seed=seed)))
    assert_same_bits(program.state_dict(), twin.state_dict())
    assert_same_bits(statistics(net), statistics(net_twin))


# Made inside a block.


@cases("restore", "running")
def test_program_made_inside_in_eval_mode_is_the_twins(tool: str, layer: str, policy: str) -> None:
    """A program taken off a model in eval mode is the one of an unguarded twin; nobody is told anything."""
    skip_refused_export(tool)
    net, twin = make_net(layer).eval(), make_net(layer).eval()
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        program = TOOLS[tool](net)
    assert said == Told()
    assert guard.changes == ()
    assert_clean(net)
    assert_same_program(program, TOOLS[tool](twin), net, twin)


@cases("raise", "restore", "running", "budget")
def test_program_made_inside_in_train_mode_is_the_twins(tool: str, layer: str, policy: str) -> None:
    """So is one taken off a model in train mode: it updates. The model is held, told of, or stopped as ever."""
    skip_refused_export(tool)
    net, twin = make_net(layer), make_net(layer)
    before, objects, program = values(statistics(net)), statistics(net), None
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        program = TOOLS[tool](net)
    program_twin = TOOLS[tool](twin)
    assert_clean(net)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if policy in ("warn", "budget") else before)
    who = f"1 ({type(net[1]).__name__}) is "
    if policy == "raise" and tool in REAL:
        assert said.error is not None
        assert said.error.startswith(f"{who}in train mode inside frozen():")
        program = TOOLS[tool](net)  # nothing is left that would keep it from being taken now
    else:
        assert said.error is None
        assert len(guard.changes) == (policy == "warn" and tool in REAL)
    has_layer = tool != "make_fx-functional" and not (tool == "fx" and layer in LEAVES)
    is_told = (policy == "warn" and tool in REAL) or (policy == "running" and has_layer)
    assert len(said.warnings) == is_told, said.warnings
    if policy == "running" and is_told:
        assert said.warnings[0].startswith(f"{who}traced or exported in train mode inside frozen(")
    assert_same_program(program, program_twin, net, twin)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("training", [True, False])
def test_program_made_inside_nested_guards_is_the_twins(tool: str, training: bool) -> None:
    """Two guards leave as little in a program as one."""
    skip_refused_export(tool)
    net, twin = make_net("own").train(training), make_net("own").train(training)
    before = values(statistics(net))
    with bnguard.frozen(net, "restore"), bnguard.frozen(net, "restore", updates=1):
        program = TOOLS[tool](net)
    assert_same_bits(statistics(net), before)
    assert_same_program(program, TOOLS[tool](twin), net, twin)


@pytest.mark.parametrize("tool", TOOLS)
def test_program_runs_inside_as_the_twins(tool: str) -> None:
    """Called in the block that it was made in, it computes what the twin's does; the end puts its updates back."""
    skip_refused_export(tool)
    net, twin = make_net(), make_net()
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore"):
        program = TOOLS[tool](net)
        program_twin = TOOLS[tool](twin)
        give_statistics(net, twin)
        assert_same_bits(program(images()), program_twin(images()))
    assert_same_bits(statistics(net), before)
    shares = tool not in ("fx", "unflatten")  # that one runs the guarded layers; this one has its own statistics
    assert said.error is None
    assert len(said.warnings) == shares
    assert all(text.startswith("running statistics of 1 layer changed inside frozen():") for text in said.warnings)


@pytest.mark.parametrize("tool", ["trace", "make_fx", "export", "fx"])
def test_program_of_a_copy_made_inside_is_the_twins(tool: str) -> None:
    """A copy is unguarded, also to the tools."""
    net, twin = make_net("own"), make_net("own")
    with bnguard.frozen(net, use_running_stats=True):
        other = copy.deepcopy(net)
        program = TOOLS[tool](other)
    assert_same_program(program, TOOLS[tool](twin), other, twin)


@EVERY_POLICY
def test_layer_whose_updates_are_predicted_may_be_symbolically_traced(policy: str) -> None:
    """``fx.symbolic_trace`` runs nothing: a layer in train mode that it reads is no finding."""
    registration = bnguard.register_layer(
        Traceable, ["running_mean", "running_var"], updates=lambda layer: layer.training
    )
    try:
        net, twin = make_net("own"), make_net("own")
        with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
            program = torch.fx.symbolic_trace(net)
        assert guard.changes == ()
        assert said.error is None
        assert len(said.warnings) == (policy == "running")
        assert_same_program(program, torch.fx.symbolic_trace(twin), net, twin)
    finally:
        registration.remove()


@EVERY_POLICY
def test_trace_of_a_function_inside_is_the_twins(policy: str) -> None:
    """A function that calls the model is traced as without a guard."""
    net, twin = (make_net().eval().requires_grad_(False) for _ in range(2))
    with bnguard.frozen(net, **POLICIES[policy]):
        program = torch.jit.trace(lambda input: net(input) + 1, images())
    expected = torch.jit.trace(lambda input: twin(input) + 1, images())
    assert_same_bits(program(images(seed=2)), expected(images(seed=2)))
    assert "bnguard" not in text_of(program)


def test_trace_that_checks_itself_is_restored_and_told() -> None:
    """By default a trace is run once to check it, past every guard: the end of the block finds that."""
    net, twin = make_net(), make_net()
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore"):
        program = torch.jit.trace(net, images())
    assert len(said.warnings) == 1
    assert "scripted model" in said.warnings[0]
    assert_same_bits(statistics(net), before)
    assert_same_program(program, torch.jit.trace(twin, images()), net, twin)


def test_self_checking_trace_under_warn_leaves_what_the_twins_does() -> None:
    """Under warn the statistics are those of a twin that is traced and checked."""
    net, twin = make_net(), make_net()
    with told() as said, bnguard.frozen(net, "warn"):
        torch.jit.trace(net, images())
    torch.jit.trace(twin, images())
    assert_same_bits(statistics(net), statistics(twin))
    assert len(said.warnings) == 1


class Failing(nn.Module):
    """Fails after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, input: Tensor) -> Tensor:
        if self.bn(input).sum() > -1e9:
            raise ZeroDivisionError("no further")
        return input


@pytest.mark.parametrize("policy", ["raise", "restore"])
@pytest.mark.parametrize("tool", ["trace", "make_fx", "export", "export-strict", "fx"])
def test_tool_that_fails_inside_fails_as_unguarded(tool: str, policy: str) -> None:
    """A model that cannot be taken down gives torch's error, and the next one works."""
    net, twin = warmed(Failing()).eval(), warmed(Failing()).eval()
    before = values(statistics(net))
    with bnguard.frozen(net, **POLICIES[policy]), pytest.raises(Exception) as caught:
        TOOLS[tool](net)
    with pytest.raises(type(caught.value)) as expected:
        TOOLS[tool](twin)
    assert str(caught.value).splitlines()[:1] == str(expected.value).splitlines()[:1]
    assert not torch.jit.is_tracing()
    assert_same_bits(statistics(net), before)
    assert_clean(net)
    good, good_twin = make_net().eval(), make_net().eval()
    assert_same_program(TOOLS[tool](good), TOOLS[tool](good_twin), good, good_twin)


class Waiting(nn.Module):
    """Waits, as somebody traces it, until another thread has done its work."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.reached, self.done = threading.Event(), threading.Event()

    def forward(self, input: Tensor) -> Tensor:
        output = self.net(input)
        self.reached.set()
        assert self.done.wait(20)
        return output


@pytest.mark.parametrize("layer", ["BatchNorm2d", "SyncBatchNorm", "own"])
@pytest.mark.parametrize("tool", ["trace", "make_fx"])  # fx.symbolic_trace takes every thread's calls for its own
@pytest.mark.parametrize("policy", ["raise", "warn", "restore", "running"])
def test_thread_next_to_a_tracing_one_is_guarded_as_ever(tool: str, layer: str, policy: str) -> None:
    """While one thread traces a model, another one's forward of a guarded model is held, told of, or stopped."""
    traced, net, twin = Waiting(make_net().eval()), make_net(layer), make_net(layer).train(policy != "running")
    before = values(statistics(net))
    expected = twin(images())

    def run() -> None:
        try:
            assert traced.reached.wait(20)
            if policy == "raise":
                with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
                    net(images())
            else:
                with bnguard.frozen(net, **POLICIES[policy]):
                    assert_same_bits(net(images()), expected)
        finally:
            traced.done.set()

    with told() as said:
        run_threads(run, lambda: TOOLS[tool](traced))
    assert len(said.warnings) == (policy == "warn")
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)


class Distilling(nn.Module):
    """Opens a block in its own forward."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.student, self.teacher = warmed(nn.BatchNorm2d(2)), warmed(nn.BatchNorm2d(2))

    def forward(self, input: Tensor) -> Tensor:
        with bnguard.frozen(self.teacher, **self.options):
            target = self.teacher(input)
        return self.student(input) - target


@pytest.mark.parametrize("policy", ["raise", "restore", "running"])
@pytest.mark.parametrize("tool", ["trace", "make_fx", "export", "export-strict", "fx"])
def test_block_in_traced_code_is_not_dropped_in_silence(tool: str, policy: str) -> None:
    """A program has no guard: where the code it is made of opens a block, that is said, or the tool fails."""
    reason = (
        "a block of bnguard cannot begin or end inside a graph" if RELEASE >= (2, 7) else "<function frozen.__init__"
    )
    net = Distilling(POLICIES[policy])
    before, refused = values(statistics(net.teacher)), False
    with told() as said:
        try:
            TOOLS[tool](net)
        except torch._dynamo.exc.Unsupported as error:
            refused = reason in str(error)
        except torch._export.verifier.SpecViolationError:  # torch 2.4 exports no such code; the warning came before
            assert RELEASE < (2, 5)
    assert refused or said != Told()
    assert_same_bits(statistics(net.teacher), before)
    assert_clean(net)


LOAD = (
    WITHOUT_BNGUARD
    + """
import torch
trace, exported = torch.jit.load(sys.argv[1]), torch.export.load(sys.argv[2]).module()
inputs = torch.load(sys.argv[3], weights_only=True)
torch.save([[program(inputs).detach(), dict(program.named_buffers())] for program in (trace, exported)], sys.argv[4])
"""
)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_program_saved_inside_loads_where_bnguard_is_not_installed(tmp_path: Path) -> None:
    """A trace and an exported program, made and saved inside, load and update without bnguard."""
    net, twin = make_net("own"), make_net("own")
    paths = [str(tmp_path / name) for name in ("trace.pt", "exported.pt2", "images.pt", "result.pt")]
    with bnguard.frozen(net, "restore", affine=True):
        torch.jit.save(trace(net), paths[0])
        torch.export.save(torch.export.export(net, (images(),), strict=False), paths[1])
    torch.save(images(), paths[2])
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [twin(images()).detach(), dict(twin.named_buffers())]
    for result in torch.load(paths[3], weights_only=True):
        assert_same_bits(result, expected)


# Scripting inside a block: refused, as torch compiles the source of whatever is on a layer.


@EVERY_POLICY
@pytest.mark.parametrize("layer", ["BatchNorm2d", "InstanceNorm2d", "own"])
@pytest.mark.parametrize("training", [True, False])
def test_script_inside_is_refused_and_breaks_nothing(layer: str, policy: str, training: bool) -> None:
    """One sentence says what to do instead; the model is as it was, and can be scripted afterwards."""
    net, twin = make_net(layer).train(training), make_net(layer).train(training)
    parts, before = list(net.modules()), state_of(net)
    text = rf"torch.jit.script\(\) would compile the guard of a {type(net[1]).__name__} .*\n.*copy.deepcopy\(model\)"
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        for _ in range(2):
            with pytest.raises(bnguard.BNGuardError, match=text):
                torch.jit.script(net)
        assert not isinstance(net[1], torch.jit.ScriptModule)
    assert guard.changes == ()
    assert all(part is other for part, other in zip(net.modules(), parts, strict=True))
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)
    assert_same_program(torch.jit.script(net), torch.jit.script(twin), net, twin)


def test_script_of_what_is_not_guarded_works_inside() -> None:
    """A copy, a part without a guarded layer, and another model can be scripted."""
    net, twin = conv_net().eval(), conv_net().eval()
    with bnguard.frozen(net, use_running_stats=True, include="stem"):
        other = copy.deepcopy(net)
        programs = [torch.jit.script(part) for part in (other, net.body, net.stem.conv, make_net())]
        with pytest.raises(bnguard.BNGuardError):
            torch.jit.script(net.stem)
    expected = torch.jit.script(twin)
    assert_same_bits(programs[0](images()), expected(images()))
    assert_same_bits(programs[1](twin.stem(images())), torch.jit.script(twin.body)(twin.stem(images())))
    assert_clean(net)


class Prepared(nn.BatchNorm2d):
    """Prepares itself for scripting in its own way."""

    def __prepare_scriptable__(self) -> nn.Module:
        other = nn.BatchNorm2d(self.num_features)
        other.load_state_dict(self.state_dict())
        return other.train(self.training)


def test_layer_that_prepares_itself_for_scripting_does_so_after_the_block() -> None:
    """The layer's own way is back when the block is over."""
    net, twin = nn.Sequential(warmed(Prepared(2))), nn.Sequential(warmed(Prepared(2)))
    with bnguard.frozen(net, "restore"), pytest.raises(bnguard.BNGuardError):
        torch.jit.script(net)
    assert "__prepare_scriptable__" not in net[0].__dict__
    assert_same_bits(torch.jit.script(net)(images()), torch.jit.script(twin)(images()))


# Made before the block.


def script(net: nn.Module) -> Any:
    """A ScriptModule."""
    return torch.jit.script(net)


PROGRAMS: dict[str, Callable[[nn.Module], Any]] = {"script": script, **TOOLS}
SHARING = [name for name in PROGRAMS if name not in ("fx", "unflatten", "make_fx")]


COMPARING = [name for name in POLICIES if name != "running"]  # which refuses programs that normalise with the batch


def some_programs(names: list[str], policies: Iterable[str] = POLICIES) -> pytest.MarkDecorator:
    """Programs and policies; of the slow ones two policies."""
    pairs = [
        (name, policy) for name in names for policy in policies if name not in SLOW or policy in ("raise", "restore")
    ]
    return pytest.mark.parametrize(("program", "policy"), pairs)


@some_programs([*SHARING, "make_fx"])
def test_program_made_before_is_found_by_the_models_guard(program: str, policy: str) -> None:
    """A program that shares its model's statistics runs past the guard: the end of the block finds what it did."""
    net, twin = make_net(), make_net()
    run, run_twin = PROGRAMS[program](net), PROGRAMS[program](twin)
    before, objects = values(statistics(net)), statistics(net)
    is_stopped = policy in ("raise", "running")
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        assert_same_bits(run(images()), run_twin(images()))
    assert (said.error is None) == (not is_stopped)
    assert len(said.warnings) == (not is_stopped)
    assert "compiled or scripted model" in (said.error or said.warnings[0])
    assert [change.names for change in guard.changes] == [("1",)]
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)


@some_programs(list(PROGRAMS))
def test_program_of_an_eval_mode_model_is_no_finding(program: str, policy: str) -> None:
    """One that does not update may run inside, whether its model is guarded or itself."""
    net, twin = make_net().eval(), make_net().eval()
    run, run_twin = PROGRAMS[program](net), PROGRAMS[program](twin)
    for guarded in (net,) if program == "make_fx" else (net, run):  # there statistics are nameless constants
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with bnguard.frozen(guarded, **{**POLICIES[policy], "affine": False}) as guard:
                assert_same_bits(run(images()), run_twin(images()))
        assert guard.changes == ()


@some_programs(["script", "trace", "export", "export-strict"], COMPARING)
@pytest.mark.parametrize("layer", ["BatchNorm2d", "own"])
def test_guarded_program_is_compared_at_exit(program: str, layer: str, policy: str) -> None:
    """A guard around a program compares: it restores, raises or warns at the end, and ``layers`` says no more."""
    run, run_twin = PROGRAMS[program](make_net(layer)), PROGRAMS[program](make_net(layer))
    before = values(statistics(run))
    is_stopped = policy == "raise"
    guard = bnguard.frozen(run, **POLICIES[policy])
    with told() as said, guard:
        assert_same_bits(run(images()), run_twin(images()))
    assert (said.error is None) == (not is_stopped)
    assert len(said.warnings) == (not is_stopped)
    assert [change.names for change in guard.changes] == [("1",)]
    assert_same_bits(statistics(run), statistics(run_twin) if policy == "warn" else before)
    for listed in (guard.layers, bnguard.frozen(run, **POLICIES[policy]).layers):
        assert [layer.names for layer in listed] == [("1",)]
        assert listed[0].protection.startswith("compared at exit only")
    assert "compared at exit only" in guard.report()


@pytest.mark.parametrize(
    ("policy", "layer"),
    [("raise", "BatchNorm2d"), ("warn", "own"), ("restore", "BatchNorm2d"), ("restore", "own"), ("budget", "own")],
)
def test_guarded_unflattened_program_is_judged_at_its_forwards(layer: str, policy: str) -> None:
    """``unflatten`` gives modules that are called: a guard around them acts at once, as around other layers."""
    run, run_twin = unflatten(make_net(layer)), unflatten(make_net(layer))
    before = values(statistics(run))
    with told() as said, bnguard.frozen(run, **POLICIES[policy]) as guard:
        assert_same_bits(run(images()), run_twin(images()))
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy == "warn")
    for text in filter(None, (said.error, *said.warnings)):
        assert text.startswith("1 (InterpreterModule) is in train mode inside frozen()")
        assert "in test_guarded_unflattened_program" in text
    assert_same_bits(statistics(run), statistics(run_twin) if policy in ("warn", "budget") else before)
    assert not guard.layers[0].protection.startswith("compared at exit only")
    assert_clean(run)
    give_statistics(run, run_twin)
    assert_same_bits(run(images()), run_twin(images()))
    assert_same_bits(run.state_dict(), run_twin.state_dict())


@pytest.mark.parametrize("policy", ["raise", "restore"])
def test_symbolic_trace_of_guarded_leaves_is_guarded(policy: str) -> None:
    """What ``fx.symbolic_trace`` makes calls the model's own layers: a guard around either acts at their forwards."""
    for part in (0, 1):
        net = make_net()
        pair = (net, torch.fx.symbolic_trace(net))
        before, twin = values(statistics(net)), make_net()
        with told() as said, bnguard.frozen(pair[part], **POLICIES[policy]):
            assert_same_bits(pair[1](images()), twin(images()))
        assert said.warnings == []
        assert (said.error is None) == (policy == "restore")
        assert policy == "restore" or "in test_symbolic_trace_of_guarded_leaves" in said.error
        assert_same_bits(statistics(net), before)
        assert_clean(pair[1])


def test_symbolic_trace_through_a_layer_is_compared_at_exit() -> None:
    """A layer that ``fx.symbolic_trace`` has dissolved is called no more: compared only, and said so."""
    run = torch.fx.symbolic_trace(make_net("own"))
    before = values(statistics(run))
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(run) as guard:
        run(images())
    assert_same_bits(statistics(run), before)
    assert guard.layers[0].protection.startswith("compared at exit only")


def test_trace_in_train_mode_is_found_after_eval() -> None:
    """A trace made in train mode updates in eval mode as well; the guard is not misled by the mode."""
    net = make_net()
    run = trace(net)
    before = values(statistics(net))
    for guarded in (net, run):
        with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(guarded):
            run.eval()
            net.eval()
            run(images())
        assert_same_bits(statistics(net), before)


def test_script_module_keeps_its_mode() -> None:
    """A ScriptModule under a guard goes from mode to mode as without one."""
    run = script(make_net())
    before = values(statistics(run))
    with bnguard.frozen(run, "restore"):
        run.eval()
        run(images())
    assert_same_bits(statistics(run), before)
    assert not run.training
    with warns(), bnguard.frozen(run, "restore"):
        run.train()
        run(images())
    assert run.training
    assert_same_bits(statistics(run), before)


@pytest.mark.parametrize("freeze", [torch.jit.freeze, torch.jit.optimize_for_inference])
@EVERY_POLICY
def test_frozen_script_has_nothing_to_guard(freeze: Callable[[Any], Any], policy: str) -> None:
    """What torch has frozen has no statistics left: that is said, and its outputs are as ever."""
    run = freeze(script(make_net().eval()))
    expected = run(images())
    with told() as said, bnguard.frozen(run, **POLICIES[policy]) as guard:
        assert_same_bits(run(images()), expected)
    assert guard.layers == ()
    assert len(said.warnings) == 1
    assert "has no layer with running statistics" in said.warnings[0]


@pytest.mark.parametrize("freeze", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_script_module_can_be_frozen_inside(freeze: Callable[[Any], Any]) -> None:
    """``torch.jit.freeze`` of a guarded ScriptModule gives what it gives without a guard."""
    run, run_twin = script(make_net().eval()), script(make_net().eval())
    with bnguard.frozen(run) as guard:
        frozen = freeze(run)
    assert guard.changes == ()
    assert_same_bits(frozen(images()), freeze(run_twin)(images()))


@pytest.mark.parametrize("policy", COMPARING)
def test_script_module_saved_inside_holds_the_true_statistics(policy: str) -> None:
    """``torch.jit.save`` inside a block saves what it saves without one."""
    run, twin, file = script(make_net()), make_net(), io.BytesIO()
    with bnguard.frozen(run, **POLICIES[policy]):
        torch.jit.save(run, file)
        other = copy.deepcopy(run)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    assert_same_bits(loaded.state_dict(), twin.state_dict())
    assert_same_bits(other.state_dict(), twin.state_dict())
    assert_same_bits(loaded(images()), twin(images()))
    assert_same_bits(loaded.state_dict(), twin.state_dict())


def test_script_module_inside_a_model_is_compared_the_rest_judged() -> None:
    """Its layers are compared, are restored and listed so; those around it raise at their forwards."""
    net = nn.Sequential(torch.jit.script(nn.BatchNorm2d(2)), nn.BatchNorm2d(2))
    before = state_of(net)
    guard = bnguard.frozen(net)
    assert [layer.protection for layer in guard.layers] == [
        "compared at exit only (a ScriptModule runs no hooks)",
        "checked before each forward; compared at exit",
    ]
    with pytest.raises(bnguard.StatsChangedError, match=r"1 \(BatchNorm2d\) is in train mode") as caught, guard:
        net(images())
    assert "0 (RecursiveScriptModule): running_mean" in "".join(caught.value.__notes__)
    assert_same_bits(net.state_dict(), before)
    with (
        pytest.raises(bnguard.StatsChangedError, match="No forward that bnguard can see"),
        bnguard.frozen(net, include="0"),
    ):
        net(images())


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_that_are_assigned_to_a_script_module_go_again(affine: bool) -> None:
    """An assignment to a ScriptModule inside a block is undone at its end."""
    run = script(nn.Sequential(nn.BatchNorm2d(3)))
    before = state_of(run)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(run, affine=affine):
        getattr(run, "0").running_mean = torch.ones(3)
    assert_same_bits(run.state_dict(), before)


@pytest.mark.parametrize("program", ["script", "trace", "export", "unflatten"])
def test_root_that_is_a_program_of_one_layer_is_guarded(program: str) -> None:
    """The layer may be the whole program."""
    run, twin = (PROGRAMS[program](warmed(nn.BatchNorm2d(2))) for _ in range(2))
    before = values(statistics(run))
    with told(), bnguard.frozen(run, "restore"):
        assert_same_bits(run(images()), twin(images()))
    assert_same_bits(statistics(run), before)
    with pytest.raises(bnguard.StatsChangedError, match=r"\(root\)"), bnguard.frozen(run):
        run(images())
    assert_same_bits(statistics(run), before)


@pytest.mark.parametrize(
    "tool",
    [
        "trace",
        pytest.param(
            "export",
            marks=pytest.mark.skipif(RELEASE < (2, 5), reason="torch 2.4 cannot differentiate a program that updates"),
        ),
    ],
)
def test_gradients_through_a_program_are_the_twins_after_the_block(tool: str) -> None:
    """Restoring what a program wrote does not break the backward pass of its forward."""
    net, twin = make_net(), make_net()
    run, run_twin = TOOLS[tool](net), TOOLS[tool](twin)
    with told(), bnguard.frozen(net, "restore"):
        loss = run(images()).square().sum()
    loss.backward()
    run_twin(images()).square().sum().backward()
    ours, expected = ([p.grad for p in one.parameters()] for one in (net, twin))
    assert_same_bits(ours, expected)


def test_exported_program_itself_is_refused_with_the_way_out() -> None:
    """It is no module; the error says how to get one."""
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got ExportedProgram.*\.module\(\)"):
        bnguard.frozen(torch.export.export(make_net(), (images(),), strict=False))


def test_modules_of_one_exported_program_share_their_guard() -> None:
    """A guard around one of them finds what another one does to the statistics that they share."""
    exported = torch.export.export(make_net(), (images(),), strict=False)
    guarded, other = exported.module(), exported.module()
    before = values(statistics(guarded))
    with told() as said, bnguard.frozen(guarded, "restore"):
        other(images())
    assert len(said.warnings) == 1
    assert_same_bits(statistics(guarded), before)
    assert_same_bits(statistics(other), before)


@pytest.mark.parametrize("tool", TOOLS)
def test_program_made_in_a_strict_function_is_the_twins(tool: str) -> None:
    """So is one that a decorated function makes and returns."""
    skip_refused_export(tool)
    net, twin = make_net(), make_net()
    program = bnguard.strict(on_change="restore")(lambda model: TOOLS[tool](model))(net)
    assert_same_program(program, TOOLS[tool](twin), net, twin)


@pytest.mark.parametrize("selector", ["1", lambda name, layer: name == "1"], ids=["pattern", "predicate"])
@pytest.mark.parametrize("program", ["script", "trace", "export", "unflatten"])
def test_part_of_a_program_can_be_guarded(program: str, selector: Any) -> None:
    """``include`` on a program: only those layers are compared, the others move as in the twin."""
    run, twin = (PROGRAMS[program](nn.Sequential(warmed(nn.BatchNorm2d(2)), warmed(nn.BatchNorm2d(2)))) for _ in "ab")
    before = values(statistics(run))
    with told(), bnguard.frozen(run, "restore", include=selector):
        assert_same_bits(run(images()), twin(images()))
    for name, tensor in statistics(run).items():
        assert_same_bits(tensor, before[name] if name.startswith("1.") else statistics(twin)[name])


def test_two_layers_recorded_in_train_mode_are_one_warning() -> None:
    """A block with ``use_running_stats`` warns once of what is recorded, a guard around it that only holds does not."""
    net = nn.Sequential(make_net(), nn.BatchNorm2d(3))
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore"), bnguard.frozen(net, use_running_stats=True):
        record(net)
    assert [text.split(" is ")[0] for text in said.warnings] == ["0.1 (BatchNorm2d)"]
    assert_same_bits(statistics(net), before)
