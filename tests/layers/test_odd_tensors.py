"""Statistics that are no ordinary tensors: every entry point does what plain PyTorch does, or refuses in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.testing._internal.two_tensor import TwoTensor

import bnguard
from bnguard.guard.auto_guard import AutoGuard
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.phrases import FROZEN
from bnguard.guard.requests import GuardRequests
from bnguard.testing import assert_stats_unchanged
from tests.asserts import assert_clean, told
from tests.nets import NORMS, ScaledNorm, images, warmed

# Of torch, about prototypes and deprecated kinds of tensors; and of what a guard says about an update.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "error::bnguard.BNGuardWarning")


class Marked(Tensor):
    """A subclass that changes nothing."""


def of_dtype(name: str) -> Callable[[Tensor], Tensor]:
    """Converts; a dtype that torch cannot convert to gets some bits."""

    def convert(values: Tensor) -> Tensor:
        dtype = getattr(torch, name)
        try:
            return values.to(dtype)
        except RuntimeError:
            return torch.arange(2 * dtype.itemsize, dtype=torch.uint8).view(dtype)

    return convert


def freed(values: Tensor) -> Tensor:
    """A tensor whose memory has been given back."""
    values = values.clone()
    values.untyped_storage().resize_(0)
    return values


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has been given back."""
    is_ordinary = type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)
    return is_ordinary and bool(tensor.numel()) and not tensor.untyped_storage().nbytes()


def fake(device: str) -> Callable[[Tensor], Tensor]:
    """A fake tensor, for which there need be no such device."""

    def make(values: Tensor) -> Tensor:
        with FakeTensorMode():
            return torch.ones(2, device=device)

    return make


def in_inference_mode(values: Tensor) -> Tensor:
    """An inference tensor."""
    with torch.inference_mode():
        return values.clone()


DTYPES = (
    "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2", "complex32", "complex64", "bool", "uint8", "int8", "int16", "int64", "uint16",
    "uint32", "uint64", "bits8", "bits16", "bits1x8", "uint4", "int4", "uint1",
)  # fmt: skip
NO_NUMBERS = (
    "float4_e2m1fn_x2",
    "bits8",
    "bits16",
    "bits1x8",
    "uint4",
    "int4",
    "uint1",
)  # torch computes nothing with them
READ: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: of_dtype(name) for name in DTYPES if hasattr(torch, name)},
    "subclass": lambda values: values.as_subclass(Marked),
    "parameter": lambda values: nn.Parameter(values, requires_grad=False),
    "inference": in_inference_mode,
    "empty": lambda values: values[:0],
    "0-dim": lambda values: values[0].clone(),
    "2-dim": lambda values: values.reshape(1, 2),
    "strided": lambda values: torch.stack([values, values], 1)[:, 0],
    "expanded": lambda values: values[:1].expand(2),
    "conjugate": lambda values: torch.complex(values, values).conj(),
    "negative": lambda values: torch.complex(values, -values).conj().imag,
}
VALUELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda values: values.to("meta"),
    "fake": fake("cpu"),
    "fake-cuda": fake("cuda"),
}
UNREADABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "per-tensor": lambda values: torch.quantize_per_tensor(values, 0.1, 0, torch.quint8),
    "per-tensor-32": lambda values: torch.quantize_per_tensor(values, 0.1, 0, torch.qint32),
    "per-channel": lambda values: torch.quantize_per_channel(
        values, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
    ),
    "coo": Tensor.to_sparse,
    "csr": lambda values: values.reshape(1, 2).to_sparse_csr(),
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda values: torch.nested.nested_tensor([values, values[:1]]),
    "jagged": lambda values: torch.nested.nested_tensor([values, values[:1]], layout=torch.jagged),
    "wrapper": lambda values: TwoTensor(values, values.clone()),
    "freed": freed,
    **{name: READ.pop(name) for name in NO_NUMBERS if name in READ},
}
KINDS = {**READ, **VALUELESS, **UNREADABLE}
GUARDS: dict[str, dict[str, Any]] = {
    "raise": {},
    "warn": {"on_change": "warn"},
    "restore": {"on_change": "restore"},
    "rollback": {"on_change": "rollback"},
    "running": {"use_running_stats": True},
    "budget": {"on_change": "restore", "updates": 1},
    "affine": {"on_change": "restore", "affine": True},
}
# The slow tests have the other layers; see tests/families.py.
EVERY_LAYER = pytest.mark.parametrize("layer", sorted(NORMS, key=lambda name: name not in ("BatchNorm", "own-forward")))
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS)


def make_net(layer: str, kind: str, buffer: str = "running_mean") -> nn.Sequential:
    """The layer, one of whose statistics is of a kind."""
    torch.manual_seed(0)
    net = nn.Sequential(warmed(NORMS[layer]()))
    if kind in KINDS:
        net[0]._buffers[buffer] = KINDS[kind](torch.tensor([0.5, 2.0]))
    return net


def bits(tensor: Tensor) -> Any:
    """What a tensor consists of, by means that bnguard does not use."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return tensor.shape, tensor.dtype
    if isinstance(tensor, TwoTensor):
        return bits(tensor.a), bits(tensor.b)
    if tensor.is_nested:
        return [bits(part) for part in tensor.unbind()]
    if tensor.is_quantized:
        return str(tensor)
    if tensor.layout is not torch.strided:
        return bits(tensor.to_dense())
    if is_freed(tensor):
        return tensor.shape
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.shape, tensor.dtype, flat.view(torch.uint8).tolist()


def state(net: nn.Module) -> dict[str, Any]:
    """The bits of all buffers."""
    return {name: bits(tensor) for name, tensor in net.named_buffers()}


def run(net: nn.Module) -> Any:
    """The bits of the output and of the gradients, or what torch says against it."""
    buffers = [tensor for tensor in net.buffers() if not is_lazy(tensor)]
    if any(map(is_freed, buffers)):
        return "torch would crash"
    is_fake = any(isinstance(tensor, FakeTensor) for tensor in buffers)
    try:
        # Autograd saves no inference tensors, and only inference mode writes to them.
        mode = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext()
        with mode, torch.inference_mode(any(map(Tensor.is_inference, buffers))):
            output = net(images())
            if output.requires_grad:
                output.float().square().sum().backward()
    except bnguard.StatsChangedError:
        return "stopped"
    except Exception as error:
        return type(error), str(error).partition("\n")[0]
    return bits(output), [bits(p.grad) for p in net.parameters() if p.grad is not None]


def refusal(net: nn.Module, begin: Callable[[], Any]) -> str:
    """The sentence with which a guard refuses a net; nothing of it was touched."""
    before, objects = state(net), dict(net.named_buffers())
    with pytest.raises(bnguard.BNGuardError) as caught:
        begin()
    assert type(caught.value) is bnguard.BNGuardError
    assert state(net) == before
    assert all(tensor is objects[name] for name, tensor in net.named_buffers())
    assert_clean(net)
    return str(caught.value)


@pytest.mark.parametrize("kind", [*READ, *VALUELESS])
@EVERY_LAYER
def test_guarded_forward_is_the_twins(kind: str, layer: str) -> None:
    """Outputs, gradients, errors and statistics are those that the policy promises, compared with an unguarded twin."""
    for guard, training in product(GUARDS, (True, False)):
        net, twin, before = (make_net(layer, kind).train(training) for _ in range(3))
        if guard == "running":
            twin.eval()
        twins = run(twin)
        with told(), bnguard.frozen(net, **GUARDS[guard]):
            found = run(net)
        assert found in ("stopped", twins) or guard == "affine", (guard, training)
        if kind not in VALUELESS:
            assert state(net) == state(twin if guard in ("warn", "budget") else before), (guard, training)
        assert_clean(net)


@pytest.mark.parametrize("kind", UNREADABLE)
@EVERY_LAYER
def test_unreadable_statistics_are_refused(kind: str, layer: str) -> None:
    """A guard that cannot compare them does not begin: it names the layer, the buffer, what it is, and the way out."""
    net = make_net(layer, kind)
    for guard in GUARDS.values():
        text = refusal(net, bnguard.frozen(net, **guard).start)
        assert text.startswith(f"0 ({type(net[0]).__name__}): running_mean is a ")
        assert "exclude=['0']" in text


class LazyNorm(nn.LazyBatchNorm2d):
    """A lazy layer with a forward of its own."""

    cls_to_become = ScaledNorm
    forward = ScaledNorm.forward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_GUARD
def test_lazy_layer_with_a_forward_of_its_own_is_guarded(guard: str, training: bool) -> None:
    """Its first forward gives it statistics: those of the twin, or under a guard that keeps them the initial ones."""
    net, twin, initial = (nn.Sequential(LazyNorm()).train(training) for _ in range(3))
    if guard == "running":
        twin.eval()
    twins = run(twin)
    with told(), bnguard.frozen(net, **GUARDS[guard]):
        found = run(net)
    assert found in ("stopped", twins if guard != "affine" else found)
    run(initial.eval())
    assert state(net) == state(twin if guard in ("warn", "budget") else initial)
    assert_clean(net)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lazy_layer_with_a_forward_of_its_own_is_watched(training: bool) -> None:
    """A watch leaves its forward alone, and sees whether it updates, although the forward also initialises it."""
    net, twin = (nn.Sequential(LazyNorm()).train(training) for _ in range(2))
    with bnguard.watch(net) as record:
        assert run(net) == run(twin)
    assert [update.count for update in record.updates] == [1] * training
    assert state(net) == state(twin)


@pytest.mark.parametrize("kind", KINDS)
@EVERY_LAYER
def test_watch_and_audit_ask_what_can_be_answered(kind: str, layer: str) -> None:
    """They leave forwards alone, and their reports leave out what the statistics cannot tell."""
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        if buffer not in make_net(layer, "")[0]._buffers:
            continue
        net, twin = make_net(layer, kind, buffer), make_net(layer, kind, buffer)
        with bnguard.watch(net, every=1) as record:
            found = run(net)
            assert found == run(twin) or kind == "jagged"  # torch numbers its sizes in an error
            bnguard.audit(net)
            torch.optim.SGD(net.parameters()).step()
            record.report()
        assert record.report()
        # An error may come after an update, and inference tensors do not count what is written to them.
        assert record.unexplained == () or isinstance(found[1], str) or kind == "inference"
        bnguard.audit(net.eval())
        assert state(net) == state(twin)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2fnuz"])
def test_broken_float8_statistics_are_found(kind: str) -> None:
    """NaN is NaN in eight bits, which are too few for statistics."""
    net = make_net("BatchNorm", kind)
    assert [finding.code for finding in bnguard.audit(net)] == ["BN009"]
    net[0].running_var = torch.tensor([1.0, torch.nan]).to(net[0].running_mean.dtype)
    assert {finding.code for finding in bnguard.audit(net)} == {"BN009", "BN012"}


@pytest.mark.parametrize("kind", KINDS)
def test_diff_compares_or_refuses(kind: str) -> None:
    """What can be made an ordinary tensor is compared; anything else is an error that names it."""
    net, other, plain = make_net("BatchNorm", kind), make_net("BatchNorm", kind), make_net("BatchNorm", "")
    other[0].running_var.add_(1)
    if kind in ("nested", "jagged", "wrapper", "freed", *NO_NUMBERS):
        for state_of in (net, net.state_dict()):
            with pytest.raises(ValueError, match=r"^before.*: running_mean of 0 is .*: its bits cannot be compared"):
                bnguard.diff(state_of, plain)
    else:
        assert bnguard.diff(net, net).unchanged == ("0",)
        assert bnguard.diff(net.state_dict(), other).changed == ("0",)
        bnguard.diff(net, plain).report()


@pytest.mark.parametrize("kind", KINDS)
@EVERY_LAYER
def test_assertion_compares_or_refuses(kind: str, layer: str) -> None:
    """``assert_stats_unchanged`` fails where the twin's statistics move, and refuses what it cannot compare."""
    net, twin, before = (make_net(layer, kind) for _ in range(3))
    if kind in UNREADABLE:
        assert "running_mean is " in refusal(net, lambda: assert_stats_unchanged(net, lambda: None))
    elif kind in VALUELESS:
        with pytest.raises(ValueError, match=r"0 \(.*\) has statistics without values"):
            assert_stats_unchanged(net, lambda: None)
    else:
        run(twin)
        has_moved = state(twin) != state(before)
        with pytest.raises(AssertionError, match="changed in") if has_moved else nullcontext():
            assert_stats_unchanged(net, lambda: run(net))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["own-forward", "BatchNorm"])
def test_statistics_replaced_inside_are_put_back(kind: str, layer: str) -> None:
    """Whatever takes their place inside a block: the values of its beginning are in the layer again, or none are."""
    for guard in ("raise", "restore", "rollback", "running"):
        net, before = make_net(layer, ""), make_net(layer, "")
        original = net[0].running_mean
        with told() as said, bnguard.frozen(net, **GUARDS[guard]):
            net[0]._buffers["running_mean"] = KINDS[kind](torch.tensor([0.0, 2.0]))
            run(net)
        assert_clean(net)
        now = net[0].running_mean
        if now is original:
            assert state(net) == state(before), guard
        elif kind in VALUELESS:
            assert now.is_meta or isinstance(now, FakeTensor)
        else:
            assert bits(now) == bits(before[0].running_mean.to(now.dtype)), guard
        assert (said.error is not None) == (guard in ("raise", "running")) or kind in VALUELESS, guard


@pytest.mark.parametrize("kind", ["per-tensor", "coo", "nested"])
def test_model_that_the_user_did_not_name_runs_with_a_warning(kind: str) -> None:
    """A guard of every model leaves one that it cannot guard alone, and says so once."""
    net, twin = make_net("BatchNorm", kind), make_net("BatchNorm", kind)
    requests = GuardRequests()
    auto = AutoGuard(requests, Settings(frontend=Frontend(FROZEN, is_outermost=True)))
    auto.begin()
    try:
        with told() as said:
            assert run(net) == run(net) == run(twin)
    finally:
        auto.end(for_good=True)
        requests.end(None)
    assert len(said.warnings) == 2  # one for each model
    assert said.warnings[0].startswith("Sequential is not guarded. 0 (BatchNorm2d): running_mean is ")
