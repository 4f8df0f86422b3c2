"""Models inside wrappers, and layers whose parameters others compute: as an unguarded twin, under every policy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.parallel import replicate as replicate_module
from torch.nn.utils import parametrizations, parametrize, prune, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnguard
from tests.asserts import (
    assert_clean,
    assert_same_bits,
    outcome,
    run_threads,
    state_of,
    statistics,
    told,
    values,
)
from tests.nets import OwnForward, ReassigningNorm, ScaledNorm, batch_norms, conv_net, images, warmed
from tests.policies import EVERY_POLICY, POLICIES

STANDS = ("warn", "budget")
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True, affine=True),
    "subclass-own-forward": ScaledNorm,
    "own": OwnForward,
}


def make_net(norm: str = "BatchNorm2d") -> nn.Sequential:
    """A convolution and one layer with statistics."""
    return warmed(nn.Sequential(nn.Conv2d(2, 3, 3), NORMS[norm](3), nn.ReLU()))


def settle(twin: nn.Module, before: dict[str, Tensor]) -> None:
    """Gives an unguarded twin the statistics that a guard would have kept."""
    with torch.no_grad():
        for name, tensor in statistics(twin).items():
            tensor.copy_(before[name])


# DataParallel. torch makes its replicas, from tensors that it copies from device to device; here they are cloned.


def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """The first device has the buffers themselves and views of the parameters, the others have copies."""
    first = tensors if detach else [tensor.view_as(tensor) for tensor in tensors]
    return [first, *[[tensor.clone() for tensor in tensors] for _ in devices[1:]]]


class DataParallel(nn.DataParallel):
    """Two devices, both of them the CPU."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids, self.output_device = [0, 1], 0
        self.src_device_obj = torch.device("cpu")

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        parts = inputs[0].chunk(len(device_ids))
        return [(part,) for part in parts], [{} for _ in parts]

    def parallel_apply(self, replicas: Any, inputs: Any, kwargs: Any) -> Any:
        results: dict[int, Any] = {}

        def run(index: int) -> None:
            try:
                with torch.set_grad_enabled(True):
                    results[index] = replicas[index](*inputs[index], **kwargs[index])
            except Exception:
                results[index] = ExceptionWrapper(where=f"in replica {index} on device {index}")

        run_threads(*[lambda index=index: run(index) for index in range(len(replicas))])
        for index in sorted(results):
            if isinstance(results[index], ExceptionWrapper):
                results[index].reraise()
        return [results[index] for index in sorted(results)]

    def gather(self, outputs: Any, output_device: Any) -> Tensor:
        return torch.cat(outputs)


@pytest.fixture
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.nn.parallel.replicate`` without a GPU."""
    monkeypatch.setitem(replicate_module.__globals__, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setitem(replicate_module.__globals__, "_get_device_index", lambda device, *options: device)


def parallel(norm: str) -> DataParallel:
    """A net on two devices."""
    return DataParallel(make_net(norm))


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("around", ["wrapper", "module"])
@EVERY_POLICY
def test_data_parallel_step_is_the_twins(norm: str, around: str, policy: str) -> None:
    """A step on two devices gives the twin's output, gradients and statistics, but for what the policy says."""
    net, twin = parallel(norm), parallel(norm)
    before, objects = values(statistics(net)), statistics(net)
    if policy == "running":
        twin.module[1].eval()
    with told() as said, bnguard.frozen(net if around == "wrapper" else net.module, **POLICIES[policy]) as guard:
        result = outcome(net, images())
    assert_clean(net)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy == "warn"), said.warnings
    if policy == "raise":
        assert "1 (" in said.error
        assert "is in train mode inside frozen():" in said.error
        assert_same_bits(statistics(net), before)
        return
    assert [change.names for change in guard.changes] == ([("1",)] if policy == "warn" else [])
    expected = outcome(twin, images())
    if policy == "affine":
        expected.update({name: None for name in expected if name.startswith("module.1.")})
    assert_same_bits(result, expected)
    assert_same_bits(statistics(net), statistics(twin) if policy in STANDS else before)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_data_parallel_step_is_one_update(norm: str, on_change: Any) -> None:
    """The statistics of a layer move once in a step, however many devices: ``updates=1`` lets it, and no second one."""
    net, twin = parallel(norm), parallel(norm)
    with bnguard.frozen(net, on_change, updates=1) as guard:
        assert_same_bits(net(images()), twin(images()))
        assert_same_bits(statistics(net), statistics(twin))
    assert guard.changes == ()
    with told() as said, bnguard.frozen(net, on_change, updates=1):
        net(images(seed=2))
        net(images(seed=3))
    twin(images(seed=2))
    assert (said.error is None) == (on_change == "restore")
    assert said.warnings == []
    assert_same_bits(statistics(net), statistics(twin))
    assert_clean(net)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("norm", NORMS)
def test_data_parallel_step_is_counted_once_under_warn(norm: str) -> None:
    """What is listed is what happened to the model's statistics."""
    net = parallel(norm)
    with told(), bnguard.frozen(net, "warn") as guard:
        net(images())
        net(images())
    assert [change.updates for change in guard.changes] == [2]


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner", ["raise", "warn", "restore", "running"])
def test_data_parallel_under_nested_guards(norm: str, inner: str) -> None:
    """Replicas have all the guards that their layer has."""
    net = parallel(norm)
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore"), bnguard.frozen(net, **POLICIES[inner]):
        net(images())
    assert (said.error is None) == (inner != "raise")
    assert said.warnings == []  # an update that the outer guard prevents is none
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("norm", NORMS)
def test_replicas_that_outlive_the_block_are_unguarded(norm: str) -> None:
    """Replicas that somebody keeps update after the block as a twin's."""
    net, twin = make_net(norm), make_net(norm)
    with bnguard.frozen(net, "restore"):
        replicas = replicate_module(net, [0, 1])
    replicas_twin = replicate_module(twin, [0, 1])
    for one, other in zip(replicas, replicas_twin, strict=True):
        assert_same_bits(one(images()), other(images()))
        assert_same_bits(statistics(one), statistics(other))
    assert_same_bits(statistics(net), statistics(twin))


@pytest.mark.usefixtures("_two_devices")
def test_replica_does_not_show_what_is_ours() -> None:
    """What a replica inherits is not taken for the user's: a copy and a state dict of it are unguarded."""
    net, twin = make_net(), make_net()
    with bnguard.frozen(net, "restore"):
        replica = replicate_module(net, [0, 1])[1]
        assert_same_bits(replica.state_dict(), replicate_module(twin, [0, 1])[1].state_dict())
        other = copy.copy(replica[1])
    for name in ("__getstate__", "__prepare_scriptable__", "_replicate_for_data_parallel"):
        assert name not in replica[1].__dict__
        assert name not in other.__dict__


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, ScaledNorm, OwnForward])
@pytest.mark.parametrize("nested", [False, True])
def test_replica_inside_a_block_updates_nothing_shared(cls: Any, nested: bool) -> None:
    """A replica as DataParallel makes it, around the same tensors, is held too and computes what a twin computes."""
    net = warmed(cls(2))
    twin, before = copy.deepcopy(net), values(statistics(net))
    with bnguard.frozen(net, "restore"), bnguard.frozen(net, "restore") if nested else nullcontext():
        replica = net._replicate_for_data_parallel()
        # The first replica shares the module's tensors; parameters become plain attributes.
        replica._buffers = dict(net._buffers)
        for name, parameter in net._parameters.items():
            setattr(replica, name, parameter)
        assert_same_bits(replica(images()), twin(images()))
        assert_same_bits(statistics(net), before)
    assert_same_bits(statistics(net), before)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=["stock", "own-forward"])
def test_replica_runs_with_its_own_weight(make: Callable[[int], nn.Module]) -> None:
    """A replica is held like its layer, and is not mixed up with it."""
    layer, x = make(2), images()
    before, twin = state_of(layer), copy.deepcopy(layer)
    twin.weight.data.fill_(3.0)
    with bnguard.frozen(layer, "restore"):
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.full((2,), 3.0), torch.zeros(2)
        assert_same_bits(replica(x), twin(x))
    assert_same_bits(layer.state_dict(), before)


# AveragedModel and update_bn.

AVERAGES: dict[str, dict[str, Any]] = {
    "parameters": {},
    "buffers": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("made", ["before", "inside"])
@EVERY_POLICY
def test_average_of_a_guarded_model_is_the_twins(average: str, made: str, policy: str) -> None:
    """Averaging inside reads the true statistics; the average itself is unguarded, and trains on as the twin's."""
    net, twin = conv_net(), conv_net()
    before = values(statistics(net))
    averaged = AveragedModel(net, **AVERAGES[average])
    averaged_twin = AveragedModel(twin, **AVERAGES[average])
    if policy in ("raise", "running"):
        for layer in batch_norms(twin) + (batch_norms(net) if policy == "raise" else []):
            layer.eval()
    with told(), bnguard.frozen(net, **POLICIES[policy]):
        if made == "inside":
            averaged = AveragedModel(net, **AVERAGES[average])
        for seed in range(2):
            for model, average_of in ((net, averaged), (twin, averaged_twin)):
                torch.manual_seed(3)
                model(images(seed=seed))
                if model is twin and policy not in STANDS:
                    settle(twin, before)
                with torch.no_grad():
                    model.stem.conv.weight.add_(1)
                average_of.update_parameters(model)
        assert_clean(averaged)
    assert_clean(net)
    assert_same_bits(averaged.state_dict(), averaged_twin.state_dict())
    assert_same_bits(outcome(averaged.train(), images()), outcome(averaged_twin.train(), images()))
    assert_same_bits(averaged.state_dict(), averaged_twin.state_dict())


@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
def test_guard_around_an_average_finds_the_averaging_of_buffers(policy: str) -> None:
    """``use_buffers=True`` writes statistics: found at the end of a block around the average."""
    net, twin = (AveragedModel(conv_net(), use_buffers=True) for _ in range(2))
    other = conv_net()
    other.train()(images())
    for one in (net, twin):
        one.update_parameters(conv_net())
    before, objects = values(statistics(net)), statistics(net)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        net.update_parameters(other)
    twin.update_parameters(other)
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy != "raise")
    assert len(guard.changes) == 2
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)


@pytest.mark.parametrize("policy", ["warn", "restore", "running"])
def test_update_bn_inside(policy: str) -> None:
    """It resets the statistics and learns them anew. Under warn that stands; else they are back, and it is told."""
    net, twin = conv_net().eval(), conv_net().eval()
    before, objects = values(statistics(net)), statistics(net)
    modes, momenta = [[part.training for part in net.modules()], [layer.momentum for layer in batch_norms(net)]]
    batches = [images(seed=seed) for seed in range(3)]
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        update_bn(batches, net)
    update_bn(batches, twin)
    assert len(guard.changes) == 2
    assert (said.error is None) == (policy != "running")
    for text in filter(None, (said.error, *said.warnings)):
        assert "reset_running_stats()" in text or policy == "warn"
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), statistics(twin) if policy == "warn" else before)
    assert [layer.momentum for layer in batch_norms(net)] == momenta
    assert [part.training for part in net.modules()] == modes
    assert_clean(net)


def test_update_bn_under_raise_stops_at_its_first_forward() -> None:
    """The error names the layer and the line of the call, and what had been reset is back."""
    net = conv_net()
    before, objects = values(statistics(net)), statistics(net)
    text = r"(?s)stem\.bn \(BatchNorm2d\) is in train mode.*in test_update_bn_under_raise_stops"
    with pytest.raises(bnguard.StatsChangedError, match=text), bnguard.frozen(net) as guard:
        update_bn([images()], net)
    assert len(guard.changes) == 2
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


def test_update_bn_of_an_average_leaves_the_guarded_model_alone() -> None:
    """The usual end of stochastic weight averaging, with the trained model guarded."""
    net, twin = conv_net(), conv_net()
    before = values(statistics(net))
    with bnguard.frozen(net):
        averaged = AveragedModel(net)
        update_bn([images(), images(seed=2)], averaged)
    averaged_twin = AveragedModel(twin)
    update_bn([images(), images(seed=2)], averaged_twin)
    assert_same_bits(averaged.state_dict(), averaged_twin.state_dict())
    assert_same_bits(statistics(net), before)


# SyncBatchNorm in place of BatchNorm.


@EVERY_POLICY
def test_model_converted_to_sync_before_is_guarded(policy: str) -> None:
    """``convert_sync_batchnorm`` before the block: as any other layer."""
    net, twin = (nn.SyncBatchNorm.convert_sync_batchnorm(conv_net()) for _ in range(2))
    before, objects = values(statistics(net)), statistics(net)
    if policy == "running":
        for layer in batch_norms(twin):
            layer.eval()
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        result = outcome(net, images())
    assert {layer.type for layer in guard.layers} == {"SyncBatchNorm"}
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy == "warn")
    assert_clean(net)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    if policy == "raise":
        assert_same_bits(statistics(net), before)
        return
    expected = outcome(twin, images())
    if policy == "affine":
        expected.update({name: None for name in expected if ".bn." in name})
    assert_same_bits(result, expected)
    assert_same_bits(statistics(net), statistics(twin) if policy in STANDS else before)


@EVERY_POLICY
def test_model_converted_to_sync_inside_is_found_at_the_end(policy: str) -> None:
    """Inside, new layers come around the same statistics: their updates are found, and undone or told."""
    net, twin = conv_net(), conv_net()
    before, objects, layers = values(statistics(net)), statistics(net), batch_norms(net)
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert_clean(converted)
        output = outcome(converted, images(), backward=False)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert_same_bits(output, outcome(twin, images(), backward=False))
    is_stopped = policy in ("raise", "running")
    assert (said.error is None) == (not is_stopped)
    assert len(said.warnings) == (not is_stopped)
    assert [change.names for change in guard.changes] == [("stem.bn",), ("body.bn",)]
    assert all(tensor is objects[name] for name, tensor in statistics(converted).items())
    assert_same_bits(statistics(converted), statistics(twin) if policy == "warn" else before)
    for part in (*layers, converted):
        assert_clean(part)
    settle(twin, values(statistics(converted)))
    assert [p.requires_grad for p in converted.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert_same_bits(outcome(converted, images(seed=2)), outcome(twin, images(seed=2)))
    assert_same_bits(converted.state_dict(), twin.state_dict())


@EVERY_POLICY
def test_model_converted_to_sync_inside_and_not_run_is_as_the_twins(policy: str) -> None:
    """Conversion alone is no finding, and what it makes is unguarded after the block."""
    net, twin = nn.Sequential(conv_net().stem), nn.Sequential(conv_net().stem)
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        alone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net[0].bn))
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert guard.changes == ()
    flags = [[layer.track_running_stats for layer in batch_norms(one)] for one in (converted, twin)]
    assert flags[0] == flags[1]
    assert_clean(converted)
    assert_clean(alone)
    assert_same_bits(outcome(converted, images()), outcome(twin, images()))
    assert_same_bits(converted.state_dict(), twin.state_dict())


# Names inside wrappers.


class Wrapper(nn.Module):
    """Keeps a module under some name."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        super().__init__()
        self.attribute = attribute
        self.add_module(attribute, module)

    def forward(self, input: Tensor) -> Tensor:
        return getattr(self, self.attribute)(input)


def wrapper(name: str, attribute: str) -> Callable[[nn.Module], nn.Module]:
    """A class called as one of torch's wrappers, which need a process group."""
    return lambda module: type(name, (Wrapper,), {})(module, attribute)


def checkpointed(module: nn.Module) -> nn.Module:
    """Torch's own wrapper for activation checkpointing."""
    return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": wrapper("DistributedDataParallel", "module"),
    "FullyShardedDataParallel": wrapper("FullyShardedDataParallel", "_fsdp_wrapped_module"),
    "CheckpointWrapper": checkpointed,
    "compile": lambda module: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", [None, "FullyShardedDataParallel", "CheckpointWrapper"])
def test_names_are_those_without_wrappers(outer: str, inner: str | None) -> None:
    """However a model and its parts are wrapped, layers have the names of the plain model, and patterns match them."""
    net = conv_net()
    if inner is not None:
        net.stem = WRAPPERS[inner](net.stem)
    wrapped = WRAPPERS[outer](net)
    guard = bnguard.frozen(wrapped, include="stem", exclude="body.*")
    assert [layer.names for layer in guard.layers] == [("stem.bn",)]
    assert [layer.names for layer in bnguard.frozen(wrapped).layers] == [("stem.bn",), ("body.bn",)]


@pytest.mark.parametrize("name", ["DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"])
@pytest.mark.parametrize("around", ["wrapper", "module"])
@EVERY_POLICY
def test_wrapped_model_is_guarded_as_the_plain_one(name: str, around: str, policy: str) -> None:
    """The guard may be around the wrapper or around what is in it."""
    net, twin = conv_net(), conv_net()
    wrapped, before = WRAPPERS[name](net), values(statistics(net))
    if policy == "running":
        for layer in batch_norms(twin):
            layer.eval()
    with told() as said, bnguard.frozen(wrapped if around == "wrapper" else net, **POLICIES[policy]):
        output = outcome(wrapped, images(), backward=False)
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy == "warn")
    assert all("stem.bn (BatchNorm2d)" in text for text in filter(None, (said.error, *said.warnings)))
    assert_clean(wrapped)
    if policy != "raise":
        assert_same_bits(output, outcome(twin, images(), backward=False))
    assert_same_bits(statistics(net), statistics(twin) if policy in STANDS else before)


@pytest.mark.parametrize("policy", ["restore", "running"])
def test_checkpoint_wrapper_inside_a_block_is_the_twins(policy: str) -> None:
    """A checkpointed part that runs forward and backward inside gives the twin's gradients, and moves nothing."""
    net, twin = conv_net(), conv_net()
    net.stem, twin.stem = checkpointed(net.stem), checkpointed(twin.stem)
    before = values(statistics(net))
    if policy == "running":
        for layer in batch_norms(twin):
            layer.eval()
    with bnguard.frozen(net, **POLICIES[policy]):
        result = outcome(net, images())
    assert_same_bits(result, outcome(twin, images()))
    assert_same_bits(statistics(net), before)
    assert_clean(net)


# Parameters that are computed: parametrizations, spectral and weight norm, pruning.


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "parametrize": lambda net: parametrize.register_parametrization(net[1], "weight", Double()),
    "parametrize-both": lambda net: [
        parametrize.register_parametrization(net[1], name, Double()) for name in ("weight", "bias")
    ],
    "parametrize-conv": lambda net: parametrize.register_parametrization(net[0], "weight", Double()),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net[0]),
    "spectral_norm-hook": lambda net: nn.utils.spectral_norm(net[0]),
    "spectral_norm-of-norm": lambda net: parametrizations.spectral_norm(net[1]),
    "weight_norm": lambda net: parametrizations.weight_norm(net[0]),
    "weight_norm-of-norm": lambda net: parametrizations.weight_norm(net[1]),
    "weight_norm-hook": lambda net: nn.utils.weight_norm(net[0]),
    "prune": lambda net: prune.l1_unstructured(net[1], "weight", 1),
    "prune-conv": lambda net: prune.l1_unstructured(net[0], "weight", 5),
}
EVERY_COMPUTED = pytest.mark.parametrize("computed", COMPUTED)


def computed_net(computed: str, norm: str = "BatchNorm2d") -> nn.Sequential:
    """A net with such a parameter; the same vectors u and v each time."""
    net = make_net(norm)
    torch.manual_seed(5)
    COMPUTED[computed](net)
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
@EVERY_COMPUTED
@pytest.mark.parametrize("norm", ["BatchNorm2d", "SyncBatchNorm", "own"])
@pytest.mark.parametrize("policy", ["raise", "warn", "restore", "running", "budget"])
def test_computed_parameters_are_the_twins(computed: str, norm: str, policy: str) -> None:
    """Results are the twin's; what is no running statistic, such as the vectors of spectral norm, moves as there."""
    net, twin = computed_net(computed, norm), computed_net(computed, norm)
    before, objects = values(statistics(net)), statistics(net)
    for one in (net, twin):
        if policy == "raise" or (policy == "running" and one is twin):
            one[1].training = False
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        results = [outcome(net, images(seed=seed)) for seed in range(2)]
    # The vectors of spectral norm are named once, unless this is for training.
    has_vectors = computed == "spectral_norm-hook" and policy in ("raise", "restore")
    assert (said.error, len(said.warnings)) == (None, policy == "warn" or has_vectors)
    assert [layer.names for layer in guard.layers] == [("1",)]
    assert_same_bits(results, [outcome(twin, images(seed=seed)) for seed in range(2)])
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_clean(net)
    if policy in STANDS:
        assert_same_bits(net.state_dict(), twin.state_dict())
    settle(twin, values(statistics(net)))
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert policy in STANDS or values(statistics(net)).keys() == before.keys()
    if policy not in STANDS:
        assert_same_bits(statistics(net), before)


@EVERY_COMPUTED
@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
def test_computed_parameter_does_not_hide_an_update(computed: str) -> None:
    """Under raise a forward in train mode is stopped."""
    net = computed_net(computed)
    before = values(statistics(net))
    with pytest.raises(bnguard.StatsChangedError, match=r"1 \(\w+\) is in train mode"), bnguard.frozen(net):
        net(images())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.parametrize(
    ("computed", "policy"),
    # Weight norm makes new parameters, of held ones under affine=True.
    [pair for pair in itertools.product(COMPUTED, POLICIES) if pair != ("weight_norm-of-norm", "affine")],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
def test_parameter_that_becomes_computed_inside_stays_so(computed: str, policy: str) -> None:
    """Registered inside a block, it works there and after it as in the twin; the layer's class is the twin's."""
    net, twin = make_net(), make_net()
    before = values(statistics(net))
    with told(), bnguard.frozen(net, **POLICIES[policy]):
        torch.manual_seed(5)
        COMPUTED[computed](net)
        if policy != "raise":
            net(images())
    torch.manual_seed(5)
    COMPUTED[computed](twin)
    if policy == "running":
        twin[1].training = False
    if policy != "raise":
        twin(images())
    twin[1].training = True
    assert_clean(net)
    if policy not in STANDS:
        assert_same_bits(statistics(net), before)
    settle(twin, values(statistics(net)))
    assert [type(part).__qualname__ for part in net.modules()] == [type(part).__qualname__ for part in twin.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert_same_bits(outcome(net, images(seed=2)), outcome(twin, images(seed=2)))
    assert_same_bits(net.state_dict(), twin.state_dict())


@EVERY_POLICY
def test_parametrization_removed_inside_is_gone(policy: str) -> None:
    """``remove_parametrizations`` and ``prune.remove`` inside leave what they leave in the twin."""
    net, twin = computed_net("parametrize"), computed_net("parametrize")
    for one in (net, twin):
        prune.l1_unstructured(one[0], "weight", 5)
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        parametrize.remove_parametrizations(net[1], "weight")
        prune.remove(net[0], "weight")
        other = copy.deepcopy(net)
    parametrize.remove_parametrizations(twin[1], "weight")
    prune.remove(twin[0], "weight")
    assert guard.changes == ()
    for one in (other, net):
        assert_clean(one)
        assert type(one[1]) is nn.BatchNorm2d
        assert_same_bits(outcome(one, images()), outcome(copy.deepcopy(twin), images()))


@EVERY_POLICY
@pytest.mark.parametrize("computed", ["parametrize", "parametrize-conv", "weight_norm"])
def test_copy_of_a_parametrized_net_made_inside_is_unguarded(computed: str, policy: str) -> None:
    """A copy made inside has the parametrization, and nothing of ours."""
    net, twin = computed_net(computed), computed_net(computed)
    with bnguard.frozen(net, **POLICIES[policy]):
        other = copy.deepcopy(net)
        assert_clean(other)
    assert_same_bits(outcome(other, images()), outcome(twin, images()))
    assert_same_bits(other.state_dict(), twin.state_dict())


def test_cached_parametrization_is_computed_once() -> None:
    """``parametrize.cached()`` around a guarded forward caches as ever."""
    net, twin = computed_net("parametrize"), computed_net("parametrize")
    before = values(statistics(net))
    with bnguard.frozen(net, "restore"), parametrize.cached():
        result = [net(images()), net(images())]
        assert net[1].weight is net[1].weight
    with parametrize.cached():
        assert_same_bits(result, [twin(images()), twin(images())])
    assert_same_bits(statistics(net), before)


# The rest of torch.nn.utils, and Module's own.


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.stateless.functional_call` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@EVERY_POLICY
def test_stateless_functional_call_is_the_twins(norm: str, policy: str) -> None:
    """What ``stateless.functional_call`` is lent moves as without a guard; the model's own statistics do not."""
    net, twin = make_net(norm), make_net(norm)
    before = values(statistics(net))
    lent, lent_twin = ({name: tensor.clone() for name, tensor in state_of(one).items()} for one in (net, twin))
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        output = stateless.functional_call(net, lent, (images(),))
    assert_same_bits(output, stateless.functional_call(twin, lent_twin, (images(),)))
    assert guard.changes == ()
    assert_same_bits(lent, lent_twin)
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_POLICY
def test_layer_with_uninitialised_memory_is_guarded(policy: str) -> None:
    """``skip_init`` leaves whatever was in the memory: those bits stay."""
    net = nn.utils.skip_init(nn.BatchNorm2d, 2)
    with torch.no_grad():
        net.running_mean.fill_(float("nan"))
        net.running_var.fill_(-1.0)
    before = values(statistics(net))
    with told() as said, bnguard.frozen(net, **POLICIES[policy]):
        net(images())
    assert (said.error is None) == (policy != "raise")
    if policy not in STANDS:
        assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("policy", ["warn", "restore", "running", "affine"])
def test_apply_inside_reaches_every_layer_once(norm: str, policy: str) -> None:
    """``apply`` and ``_apply`` inside go through the model as without a guard."""
    net, twin = make_net(norm), make_net(norm)
    before, objects = values(statistics(net)), statistics(net)
    seen: list[list[str]] = []
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        for one in (net, twin):
            names: list[str] = []
            one.apply(lambda module, names=names: names.append(type(module).__name__))
            one.float().to("cpu").requires_grad_(True)
            one._apply(lambda tensor: tensor)
            seen.append(names)
    assert seen[0] == seen[1]
    assert guard.changes == ()
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert_same_bits(net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("norm", [*NORMS, "reassigning"])
def test_statistics_that_apply_replaced_come_back(norm: str) -> None:
    """``_apply`` that makes new tensors inside leaves the original ones in place after the block."""
    net = nn.Sequential(warmed(ReassigningNorm(2) if norm == "reassigning" else NORMS[norm](2)))
    before, objects = values(statistics(net)), statistics(net)
    with told() as said, bnguard.frozen(net, "restore"):
        net._apply(torch.clone)
        net(images())
    assert said.error is None
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, OwnForward])
def test_replica_takes_its_input_by_keyword(make: Callable[[int], nn.Module]) -> None:
    """As DataParallel passes it on: it is held, with the twin's output."""
    layer = warmed(make(2))
    before, twin = state_of(layer), copy.deepcopy(layer)
    with bnguard.frozen(layer, "restore"):
        replica = layer._replicate_for_data_parallel()
        replica._buffers = dict(layer._buffers)
        replica.weight, replica.bias = layer.weight, layer.bias
        assert_same_bits(replica(input=images()), twin(images()))
        assert_same_bits(state_of(layer), before)
