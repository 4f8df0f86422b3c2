"""``buffers=``: codebooks, queues, observers and the vectors of spectral normalisation are held like statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests import forks
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, state_of, warns


class Codebook(nn.Module):
    """Vector quantisation with a moving average, as in VQ-VAE; the codes move through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("sizes", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        found = torch.cdist(input, self.codes).argmin(1)
        output = input + (self.codes[found] - input).detach() + (input @ self.codes.T).mean()
        if self.training:
            self.sizes.index_add_(0, found, torch.ones(len(found)))
            self.codes.data.lerp_(input.detach().mean(0).expand_as(self.codes), 0.1)
            self.scratch += 1
        return output


class Queue(nn.Module):
    """The queue of MoCo, which belongs to the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("queue", torch.zeros(8, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, input: Tensor) -> Tensor:
        keys = self.encoder(input)
        scores = keys @ self.queue.clone().T
        if self.training:
            start = int(self.pointer)
            self.queue[start : start + len(keys)] = keys.detach()
            self.pointer[0] = (start + len(keys)) % 8
        return scores.sum(1, keepdim=True) + keys


MODELS: dict[str, Callable[[], nn.Module]] = {
    "codebook": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Codebook()),
    "queue": Queue,
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)),
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)
    ),
    "observer": lambda: nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), torch.ao.quantization.MovingAverageMinMaxObserver()
    ),
}  # fmt: skip
OWNERS = {"codebook": "2", "queue": "", "spectral_norm": "0", "parametrized": "0.parametrizations.weight.0",
          "observer": "2"}  # fmt: skip
everyone = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, nn.Module]:
    """A model and its twin."""
    both = []
    for _ in range(2):  # torch cannot copy old spectral normalisation
        torch.manual_seed(0)
        net = MODELS[name]()
        net(rows())  # some statistics, and the shapes of observers
        for key, buffer in net.named_buffers():
            if key.endswith(("_u", "_v")):
                buffer.copy_(torch.eye(3)[0])  # far from where it would stay
        both.append(net)
    return both[0], both[1]


def rows(seed: int = 1) -> Tensor:
    """A batch."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) + 1


def step(net: nn.Module, seed: int = 1) -> Tensor:
    """One forward and backward."""
    net.zero_grad()
    output = net(rows(seed).requires_grad_())
    output.square().sum().backward()
    return output


@everyone
def test_held_forward_is_that_of_the_twin(name: str) -> None:
    """Under "restore" outputs and gradients are those of an unguarded forward from the state of entry, each time."""
    net, twin = made(name)
    before = state_of(net)
    with bnguard.frozen(net, "restore", buffers="all"):
        for seed in (1, 2):
            twin.load_state_dict(before)
            assert_same_bits(step(net, seed), step(twin, seed))
            assert_same_gradients(net, twin)
    assert_same_bits(state_of(net), before)
    assert_clean(net)


@pytest.mark.parametrize(
    "options", [{"use_cosine_sim": True, "threshold_ema_dead_code": 2}, {"kmeans_init": True}], ids=str
)
def test_codebook_of_a_library_is_that_of_the_twin(options: dict[str, Any]) -> None:
    """vector-quantize-pytorch, with codes that it replaces at random: from the state of entry, each time."""
    library = pytest.importorskip("vector_quantize_pytorch")
    net = library.VectorQuantize(dim=3, codebook_size=4, **options)
    net(rows()[None])
    twin, before = copy.deepcopy(net), state_of(net)
    with bnguard.frozen(net, "restore", buffers="all"):
        for seed in (1, 2):
            results = []
            for module in (net, twin):
                torch.manual_seed(seed)
                output, _, loss = module(rows(seed)[None])
                results.append((output, loss, torch.get_rng_state()))
            assert_same_bits(*results)
            twin.load_state_dict(before)
    assert_same_bits(state_of(net), before)
    with pytest.raises(bnguard.StatsChangedError, match="_codebook"), bnguard.frozen(net, buffers="all"):
        net(rows(3)[None])
    assert_same_bits(state_of(net), before)


@everyone
def test_forward_that_moves_one_is_stopped(name: str) -> None:
    """Under "raise" the error names the module and its buffers, whose values are those of entry again."""
    net, _ = made(name)
    before = state_of(net)
    owner = OWNERS[name] or r"\(root\)"
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    guard = bnguard.frozen(net, buffers="all")
    with pytest.raises(bnguard.StatsChangedError, match=rf"^{owner} \(\w+\) is in train mode") as error, guard:
        net(rows(2))
    assert error.value.changes[0].names == (OWNERS[name],)
    assert_same_bits(state_of(net), before)
    assert_clean(net)


@everyone
@pytest.mark.parametrize("policy", ["warn", "rollback"])
def test_forwards_run_as_without_a_guard(name: str, policy: Any) -> None:
    """What moves under "warn" is kept and listed, under "rollback" put back at the end. Inside all is as unguarded."""
    net, twin = made(name)
    before = state_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        with bnguard.frozen(net, policy, buffers="all") as guard:
            for seed in (1, 2):
                assert_same_bits(step(net, seed), step(twin, seed))
                assert_same_gradients(net, twin)
            assert_same_bits(state_of(net), state_of(twin))
    assert_same_bits(state_of(net), state_of(twin) if policy == "warn" else before)
    if policy == "warn":
        assert (OWNERS[name],) in [change.names for change in guard.changes]
    assert_clean(net)


@pytest.mark.parametrize("name", ["codebook", "queue", "parametrized"])
def test_running_stats_mean_eval_mode(name: str) -> None:
    """A module with such a buffer runs in eval mode, as its BatchNorm does."""
    net, twin = made(name)
    before = state_of(net)
    twin.eval()
    with bnguard.frozen(net, use_running_stats=True, buffers="all"):
        assert_same_bits(step(net), step(twin))
        assert_same_gradients(net, twin)
        assert net.training
    assert_same_bits(state_of(net), before)
    assert_clean(net)


@pytest.mark.parametrize(
    ("name", "reason"), [("observer", "observes in eval mode, too"), ("spectral_norm", "has a forward pre-hook")]
)
def test_what_ignores_eval_mode_is_refused(name: str, reason: str) -> None:
    """Before anything is touched, with what to do instead."""
    net, _ = made(name)
    guard = bnguard.frozen(net, use_running_stats=True, buffers="all")
    with pytest.raises(bnguard.BNGuardError, match=reason), guard:
        pytest.fail("it began")
    assert_clean(net)


@everyone
def test_budget_counts_forwards_that_move_one(name: str) -> None:
    """The first forward moves it, the second one is one too many, and the first one's values stay."""
    net, twin = made(name)
    for some in (net, twin):
        for module in some.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
    twin(rows(3))
    guard = bnguard.frozen(net, updates=1, buffers="all")
    with pytest.raises(bnguard.StatsChangedError, match="has updated once inside") as error, guard:
        net(rows(3))
        net(rows(4))
    assert error.value.changes[0].names == (OWNERS[name],)
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)


def test_patterns_select_buffers() -> None:
    """By their names in ``state_dict()``, or that of the module; others move as they will."""
    net, _ = made("codebook")
    before = state_of(net)
    guard = bnguard.frozen(net, "restore", buffers="*.codes")
    assert [layer.buffers for layer in guard.layers if layer.names == ("2",)] == [("codes",)]
    with pytest.warns(bnguard.BNGuardWarning, match="not guarded: 2.sizes"), guard:
        net(rows(2))
    after = state_of(net)
    assert_same_bits(after["2.codes"], before["2.codes"])
    assert not torch.equal(after["2.sizes"], before["2.sizes"])
    for patterns in ("2", ["2.codes", "2.sizes"], ("*.codes", "2*")):
        assert {layer.names: layer.buffers for layer in bnguard.frozen(net, buffers=patterns).layers}[("2",)] == (
            "codes",
            "sizes",
        )


def test_include_and_exclude() -> None:
    """With "all" those of what ``include`` selects, else what a pattern names; never what ``exclude`` does."""
    net, _ = made("codebook")

    def guarded(**options: Any) -> list[str]:
        return [layer.names[0] for layer in bnguard.frozen(net, **options).layers]

    assert guarded(include="1", buffers="all") == ["1"]
    assert guarded(include="1", buffers="2.*") == ["1", "2"]
    assert guarded(buffers="all") == ["1", "2"]
    assert guarded(buffers="all", exclude="2") == ["1"]
    assert guarded(buffers="2.*", exclude=lambda name, module: name == "2") == ["1"]
    with pytest.raises(ValueError, match="exclude='3' matches none"):
        guarded(buffers="all", exclude="3")


def test_model_without_statistics() -> None:
    """Its other buffers alone are guarded, without a warning that there is nothing to guard."""
    net = nn.Sequential(Codebook())
    before = state_of(net)
    with bnguard.frozen(net, "restore", buffers="all"):
        net(rows())
    assert_same_bits(state_of(net), before)
    with warns(count=1):
        bnguard.frozen(net)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3, TypeError, 'buffers takes "all", a glob pattern .* got 3'),
        ([nn.Linear], TypeError, 'buffers takes "all", a glob pattern'),
        ([], ValueError, "buffers is an empty list"),
        ("cods", ValueError, "buffers='cods' matches none of the 2 buffers .* close names are 2.codes"),
    ],
)
def test_bad_values_are_refused(value: Any, error: type[Exception], text: str) -> None:
    """Where the guard is made, with the nearest valid name."""
    net, _ = made("codebook")
    with pytest.raises(error, match=text):
        bnguard.frozen(net, buffers=value)
    assert_clean(net)


def test_no_other_buffers() -> None:
    """A pattern for a model that has none is an error; "all" is not."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="the model has no other buffers in state_dict"):
        bnguard.frozen(net, buffers="queue")
    with bnguard.frozen(net.eval(), buffers="all"):
        net(rows())


def test_what_another_module_moves_is_seen_at_the_end() -> None:
    """It was asked for: the text does not call it unexplained, and the values are those of entry."""
    net, _ = made("codebook")
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError) as error, bnguard.frozen(net, buffers="all"):
        net[2].codes.data.add_(1)
    assert str(error.value) == (
        "buffers of 1 layer changed inside frozen():\n"
        "  2 (Codebook): codes\n"
        "The forward of another module, a hook, or a method other than forward() moved them, which is seen at the end\n"
        "only.\n"
        "The original buffers have been restored."
    )
    assert_same_bits(state_of(net), before)


def test_buffers_beside_statistics_are_told_of_once() -> None:
    """A block that does not guard them says at its end which ones moved, the first time."""
    net, _ = made("codebook")
    with pytest.warns(bnguard.BNGuardWarning) as caught, bnguard.frozen(net, "restore"):
        net(rows(2))
    assert [str(warning.message).splitlines()[0] for warning in caught] == [
        "also moved inside frozen(), not guarded: 2.codes, 2.sizes."
    ]
    with bnguard.frozen(net, "restore"):
        net(rows(3))


@pytest.mark.parametrize(
    "options",
    [
        {"include": "1"},  # what is outside was not meant
        {"updates": 1},  # a train step
        {"use_running_stats": True},  # training with frozen statistics
        {"buffers": "all"},
    ],
)
def test_who_is_not_told(options: dict[str, Any]) -> None:
    """Where the rest of the model is meant to train, or they are guarded, or did not move, there is no warning."""
    net, _ = made("codebook")
    options.setdefault("on_change", "raise" if "use_running_stats" in options else "restore")
    with bnguard.frozen(net, **options):
        net(rows(2))
    with bnguard.frozen(net.eval()):
        net(rows(2))


def test_watch_records_them() -> None:
    """Updates by line, as of statistics; no finding is about them. Without the option there is none of them."""
    net, _ = made("queue")
    with bnguard.watch(net, buffers="all") as record, bnguard.watch(net) as plain:
        for seed in (1, 2):
            net(rows(seed))
    assert [(update.names, update.type, update.count) for update in record.updates] == [
        (("encoder.1",), "BatchNorm1d", 2),
        (("",), "Queue", 2),
    ]
    assert [update.names for update in plain.updates] == [("encoder.1",)]
    assert record.findings == plain.findings
    with pytest.raises(ValueError, match="buffers='queu' matches none"):
        bnguard.watch(net, buffers="queu")
    with pytest.raises(TypeError, match="buffers takes"):
        bnguard.watch(net, buffers=1)  # type: ignore[arg-type]  # as tested


def test_run_takes_it(tmp_path: Path) -> None:
    """``bnguard run`` records them, and guards those of the models whose layers match."""
    (tmp_path / "train.py").write_text(
        """
import torch

class Queue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(2)
        self.register_buffer("queue", torch.zeros(8, 2))

    def forward(self, batch):
        self.queue[:] = batch
        return self.bn(batch)

net = Queue()
for _ in range(3):
    net(torch.randn(8, 2))
print(int(net.bn.num_batches_tracked), bool(net.queue.any()))
"""
    )
    recorded = forks.run("-m", "bnguard", "run", "--buffers", "all", "train.py", cwd=tmp_path)
    assert recorded.stdout.splitlines()[0] == "3 True"
    assert "6 updates of 2 layers" in recorded.stdout
    held = forks.run(
        "-m",
        "bnguard",
        "run",
        "--frozen",
        "*",
        "--on-change",
        "restore",
        "--buffers",
        "queue",
        "train.py",
        cwd=tmp_path,
    )
    assert held.stdout.splitlines()[0] == "0 False"
    assert (held.returncode, held.stderr) == (0, "")


def test_strict_takes_it() -> None:
    """So do the other frontends that pass options of ``frozen`` on."""
    net, _ = made("codebook")
    before = state_of(net)

    @bnguard.strict(on_change="restore", buffers="all")
    def validate(model: nn.Module) -> None:
        model(rows(2))

    validate(net)
    assert_same_bits(state_of(net), before)
    codes = net[2]
    validate(codes)
    assert_same_bits(state_of(net), before)


def test_other_buffers_of_a_layer_in_two_places_are_found_by_either_name() -> None:
    """As its statistics are."""
    layer = Scaled()
    net = nn.ModuleDict({"first": layer, "second": layer})
    guard = bnguard.frozen(net, "restore", buffers="second.scale")
    with guard:
        assert [found.names for found in guard.layers] == [("first", "second")]


class Scaled(nn.Module):
    """Has a bias of the shape of a buffer that is no statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.scale + self.bias


def test_affine_holds_no_parameters_beside_other_buffers() -> None:
    """``affine`` is about normalisation layers; what else is guarded goes on learning."""
    net = nn.Sequential(Scaled(), nn.BatchNorm1d(3))
    with bnguard.frozen(net, "restore", affine=True, buffers="0.scale"):
        net(torch.randn(4, 3)).square().sum().backward()
        assert net[0].bias.grad is not None
        assert net[1].bias.grad is None
