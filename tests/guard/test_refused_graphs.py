"""Guards and compiled graphs on every torch: below 2.12 refused, and on none is a statistic changed in silence."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, statistics, values
from tests.nets import ScaledNorm, images, warmed
from tests.old_torch import guards_graphs, needs_traced_layers
from tests.policies import EVERY_POLICY, POLICIES

REFUSED = (
    f"guards inside torch.compile need torch 2.12 or later; this is {torch.__version__.partition('+')[0]}: "
    "open the block around eager code, or upgrade"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # dynamo looks, after a graph break
)
refuses = pytest.mark.skipif(guards_graphs, reason="torch 2.12 and later guard graphs: test_compile.py")
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def by_model(net: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """``torch.compile(model)``."""
    return torch.compile(net, **options)


def by_step(net: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """A compiled function that calls the model."""
    return torch.compile(lambda x: net(x) * 1, **options)


FORMS = pytest.mark.parametrize("form", [by_model, by_step])
LAYERS = pytest.mark.parametrize("layer", [nn.BatchNorm2d, ScaledNorm])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_net(layer: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A convolution and a layer with statistics."""
    return warmed(nn.Sequential(nn.Conv2d(2, 3, 1), layer(3)))


@refuses
@EVERY_POLICY
@LAYERS
@FORMS
@BACKENDS
def test_layer_that_is_compiled_inside_is_refused(
    backend: str, form: Callable[..., Any], layer: type[nn.Module], policy: str
) -> None:
    """The error is ours, from the forward of the compiled model; nothing has moved, and later graphs are a twin's."""
    net = make_net(layer)
    twin, before = copy.deepcopy(net), values(statistics(net))
    run, run_twin = (form(model, backend=backend) for model in (net, twin))
    with bnguard.frozen(net, **POLICIES[policy]), pytest.raises(bnguard.BNGuardError) as caught:
        run(images())
    assert str(caught.value) == REFUSED
    assert_same_bits(statistics(net), before)
    assert_clean(net)
    for seed in range(2):
        assert_same_bits(run(images(seed=seed)), run_twin(images(seed=seed)))
    assert_same_bits(state_of(net), state_of(twin))


@refuses
@EVERY_POLICY
@LAYERS
def test_whole_graph_is_refused_in_torchs_error(layer: type[nn.Module], policy: str) -> None:
    """With ``fullgraph=True`` the error is torch's: the sentence is in its text, or, before torch 2.7, in a note."""
    net = make_net(layer)
    before = values(statistics(net))
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught, bnguard.frozen(net, **POLICIES[policy]):
        torch.compile(net, backend="eager", fullgraph=True)(images())
    assert REFUSED in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@refuses
@pytest.mark.parametrize("policy", ["raise", "warn"])
@LAYERS
@BACKENDS
def test_model_in_eval_mode_may_be_compiled_where_nothing_is_held(
    backend: str, layer: type[nn.Module], policy: str
) -> None:
    """Validation of a compiled model in eval mode updates nothing, and goes on."""
    net = make_net(layer).eval()
    expected = torch.compile(copy.deepcopy(net), backend=backend)(images())
    with bnguard.frozen(net, policy) as guard:
        assert_same_bits(torch.compile(net, backend=backend)(images()), expected)
    assert guard.changes == ()


@refuses
@pytest.mark.parametrize("policy", ["restore", "running"])
def test_block_inside_a_compiled_function_is_refused(policy: str) -> None:
    """The block itself runs as plain Python, but what it guards is called by the compiled function."""
    net = make_net()
    before = values(statistics(net))

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        with bnguard.frozen(net, **POLICIES[policy]):
            return net(x)

    with pytest.raises(bnguard.BNGuardError) as caught:
        step(images())
    assert str(caught.value) == REFUSED
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@refuses
@pytest.mark.parametrize(("policy", "text"), [("restore", "refused in a compiled graph"), ("raise", "runs no hooks")])
def test_guard_says_that_a_graph_is_refused(policy: str, text: str) -> None:
    """``guard.layers`` does so before the first forward."""
    guard = bnguard.frozen(torch.compile(make_net(), backend="eager"), policy)
    assert text in guard.layers[0].protection


@EVERY_POLICY
@LAYERS
@FORMS
@BACKENDS
def test_warm_graph_changes_nothing_in_silence(
    backend: str, form: Callable[..., Any], layer: type[nn.Module], policy: str
) -> None:
    """A graph compiled before the block is held, refused, or found at the end, and its results are the policy's."""
    net = make_net(layer)
    run = form(net, backend=backend)
    run(images())
    twin, before = copy.deepcopy(net).train(policy != "running"), values(statistics(net))
    takes_forward = policy not in ("raise", "warn")
    error = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", bnguard.BNGuardWarning)
        try:
            with bnguard.frozen(net, **POLICIES[policy]):
                output = run(images(seed=2))
        except bnguard.BNGuardError as raised:
            error = raised
    if policy == "raise":
        assert isinstance(error, bnguard.StatsChangedError)
    elif takes_forward and not guards_graphs:
        assert str(error) == REFUSED
    else:
        assert error is None
        assert_same_bits(output, twin(images(seed=2)))
    assert bool(said) == (policy == "warn")
    moves = error is None and policy in ("warn", "budget")
    assert_same_bits(statistics(net), statistics(twin) if moves else before)
    assert_clean(net)


@needs_traced_layers
def test_watch_counts_the_updates_of_a_graph() -> None:
    """A graph that is compiled under the watch: no line, but the layer's own counter."""
    net = make_net()
    with bnguard.watch(net) as record:
        run = by_step(net, backend="aot_eager")
        for _ in range(3):
            run(images())
    assert [(update.mode.compiled, update.count) for update in record.updates] == [(True, 3)]


@pytest.mark.parametrize("warm", [False, True])
def test_watch_misses_no_change_of_a_graph(warm: bool) -> None:
    """What a graph updates is an update, or a change without an explanation."""
    net = make_net()
    run = by_model(net, backend="aot_eager")
    if warm:
        run(images())
    with bnguard.watch(net) as record:
        run(images())
    assert bool(record.updates) != bool(record.unexplained)
    assert record.drift[0].has_moved


def test_sentence_is_one() -> None:
    """Whichever torch it is, the sentence names it, and two ways out."""
    from bnguard.torch_internals.compile import GRAPHS_REFUSED, GUARDS_GRAPHS

    assert GRAPHS_REFUSED == REFUSED
    assert re.search(r"this is \d+\.\d+\.\d+\w*: ", REFUSED)
    assert guards_graphs == GUARDS_GRAPHS
