"""One model under a guard, bit for bit against an unguarded twin."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean
from tests.zoo.case import Case, Inputs

__all__ = ["Result", "check"]

SEED = 11
SCAN_PARAMETERS = 30_000_000  # a larger model without running statistics is not searched for other moving state
MAX_FAILURES = 8


@dataclass(slots=True)
class Result:
    """What came of one model.

    Attributes:
        library: The library's name.
        name: The model's name in its library.
        status: ``"passed"``, ``"failed"``, ``"none"`` (no running statistics) or ``"skipped"``.
        reason: Why it was skipped.
        layers: Guarded layers by class.
        moved: Guarded layers whose statistics the unguarded twin moved.
        held: Those of them whose statistics the guard held, bit for bit.
        failures: What was not as in the twin, mode by mode.
        unknown: Buffers that the unguarded twin moved and no guard covers: class, buffer, how many.
        notes: ``"nondeterministic"`` where two unguarded twins differ, and what else restricts the check.
        parameters: Number of parameters.
        seconds: Time taken.
    """

    library: str
    name: str
    status: str = "passed"
    reason: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0


class Skip(Exception):
    """The model cannot be run here; says why."""


def check(library: str, case: Case, memory: float) -> Result:
    """Checks one model.

    Args:
        library: Its library.
        case: The model.
        memory: GiB that the check may need; a larger model is skipped.
    """
    result, start = Result(library, case.name), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _Check(case, result, memory).run()
        except Skip as skip:
            result.status, result.reason = "skipped", str(skip)
        except Exception as error:  # a defect of the harness, or of bnguard: never passed over
            if _is_out_of_memory(error):
                result.status, result.reason = "skipped", f"memory: {result.parameters / 1e6:.0f} million parameters"
            else:
                result.failures.append(f"check: {_text(error)}")
    if result.failures:
        result.status = "failed"
    result.seconds = round(time.monotonic() - start, 2)
    gc.collect()
    return result


@dataclass(slots=True)
class _Outcome:
    """What one forward and backward pass came to."""

    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    rng: list[Tensor] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)
    attributes: list[tuple[str, ...]] = field(default_factory=list)
    error: str = ""


class _Check:
    def __init__(self, case: Case, result: Result, memory: float) -> None:
        self.case = case
        self.result = result
        self.memory = memory
        self.pristine: nn.Module | None = None
        self.make: Callable[[], Inputs] | None = None
        self.with_input_gradients = True

    def run(self) -> None:
        """All modes, one after the other."""
        if self.case.skip:
            raise Skip(self.case.skip)
        sketch = self.sketch()
        self.result.parameters = sum(p.numel() for p in sketch.parameters())
        is_guarded, has_buffers = bool(_guarded(sketch)), any(True for _ in sketch.buffers())
        if not is_guarded:
            self.result.status = "none"
            if not has_buffers:
                return
        if not is_guarded and self.result.parameters > SCAN_PARAMETERS:
            self.result.notes.append("not run")
            return
        # The model and a copy, the gradients of the copy and of the twin, and what the pass itself needs.
        if self.result.parameters * 24 > self.memory * 2**30:
            raise Skip(f"memory: {self.result.parameters / 1e6:.0f} million parameters")
        del sketch
        try:
            self.prepare()
            moved = self.plain()
        except Skip:
            if is_guarded:
                raise
            self.result.notes.append("not run")
            return
        if is_guarded:
            self.restore()
            self.running()
            self.raising(moved)

    def sketch(self) -> nn.Module:
        """The model without storage where it can be built so."""
        try:
            with torch.device("meta"):
                return self.build()
        except Exception:
            return self.build()

    def build(self) -> nn.Module:
        _seed()
        try:
            return self.case.build()
        except Exception as error:
            raise Skip(f"build: {_text(error)}") from error

    def prepare(self) -> None:
        self.pristine = self.fresh()
        self.result.layers = {}
        for layer in _guarded(self.pristine):
            self.result.layers[layer.type] = self.result.layers.get(layer.type, 0) + 1

    def fresh(self) -> nn.Module:
        """The model in train mode, the same each time."""
        model = self.build()
        model.train()  # which does not return the model everywhere
        generator = torch.Generator().manual_seed(5)
        for name, tensor in model.named_buffers():  # statistics that say something in eval mode
            leaf = name.rpartition(".")[2]
            if leaf in ("running_mean", "running_var") and tensor.is_floating_point() and not tensor.is_meta:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise * 0.2 - 0.1 if leaf == "running_mean" else noise + 0.5)
        return model

    def twin(self) -> nn.Module:
        """A model with the same weights, statistics and modes."""
        try:
            return copy.deepcopy(self.pristine)
        except Exception:  # torch's old weight_norm leaves a tensor that cannot be copied, others a view of a dict
            return self.fresh()

    def plain(self) -> set[str]:
        """The unguarded twin: finds inputs, and the guarded layers that move. Returns their names."""
        twin, self.expected = self.first_twin()
        before, now = dict(_buffers(self.pristine)), dict(_buffers(twin))
        changed = {name for name, tensor in now.items() if name not in before or not _same(before[name], tensor)}
        names = {f"{name}.{buffer}".lstrip("."): layer.names[0] for layer in _guarded(twin) for name in layer.names
                 for buffer in layer.buffers}  # fmt: skip
        for name in changed - names.keys():
            owner, _, buffer = name.rpartition(".")
            text = f"{type(twin.get_submodule(owner)).__name__}.{buffer}"
            self.result.unknown[text] = self.result.unknown.get(text, 0) + 1
        moved = {names[name] for name in changed & names.keys()}
        self.result.moved = len(moved)
        self.moved_buffers = {name: names[name] for name in changed & names.keys()}
        for name, parameter in twin.named_parameters():
            if not _same(parameter, self.pristine.get_parameter(name)):
                text = f"{type(twin.get_submodule(name.rpartition('.')[0])).__name__}.{name.rpartition('.')[2]}"
                self.result.unknown[f"{text} (parameter)"] = self.result.unknown.get(f"{text} (parameter)", 0) + 1
        return moved

    def first_twin(self) -> tuple[nn.Module, _Outcome]:
        reason = "no inputs are known"
        for make in self.case.inputs(self.pristine):
            self.make = make
            for self.with_input_gradients in (True, False):
                twin = self.twin()
                try:
                    return twin, self.step(twin)
                except (Exception, SystemExit) as error:
                    reason = _text(error)
                    if "requires grad" not in reason and "requires_grad" not in reason:
                        break
        raise Skip(f"forward: {reason}")

    def step(self, model: nn.Module, guard: Any = None, *, backward_after: bool = False) -> _Outcome:
        """One forward and backward pass. An error of the forward is raised, one of the backward is part of it."""
        _seed()
        inputs = self.make()
        leaves = [tensor for tensor in _tensors((inputs.args, inputs.kwargs)) if tensor.is_floating_point()]
        if self.with_input_gradients:
            for leaf in leaves:
                leaf.requires_grad_()
        outcome = _Outcome()
        with contextlib.ExitStack() as stack:
            if guard is not None:
                stack.enter_context(guard)
            output = _tensors(model(*inputs.args, **inputs.kwargs))
            outcome.outputs = [tensor.detach().clone() for tensor in output]
            if not backward_after:
                self.backward(output, outcome)
        if backward_after:
            self.backward(output, outcome)
        outcome.gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
        outcome.gradients |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        outcome.rng = _rng()
        outcome.modes = [module.training for module in model.modules()]
        outcome.attributes = [_attributes(module) for module in model.modules()]
        return outcome

    def backward(self, output: list[Tensor], outcome: _Outcome) -> None:
        # The sine: bounded, and its gradient does not vanish on normalised outputs, as that of a sum or a square does.
        losses = [
            (tensor.abs() if tensor.is_complex() else tensor.float()).sin().sum()
            for tensor in output
            if tensor.requires_grad and not tensor.is_sparse and tensor.layout == torch.strided
        ]
        if losses:
            try:
                torch.stack(losses).sum().backward()
            except Exception as error:
                outcome.error = _text(error)

    def restore(self) -> None:
        model = self.twin()
        kept = _Kept(model)
        found = self.guarded(model, partial(bnguard.frozen, model, "restore"), self.expected)
        changed = kept.changed()
        self.fail("restore", changed)
        still = dict(_buffers(model))
        lost = {
            layer
            for name, layer in self.moved_buffers.items()
            if name not in still or not _same(still[name], self.pristine.get_buffer(name))
        }
        self.result.held = self.result.moved - len(lost)
        self.fail("restore", found)

    def running(self) -> None:
        twin = self.twin()
        for layer in _guarded(twin):
            twin.get_submodule(layer.names[0]).training = False
        try:
            expected = self.step(twin)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            self.result.notes.append(f"use_running_stats: unguarded twin: {_text(error)}")
            return
        del twin
        found = self.run_running(expected, backward_after=True)
        if found and self.runs_in_backward() and not self.run_running(expected, backward_after=False):
            # A custom autograd function that runs the layers once more in its backward pass, out of the block by then.
            self.result.notes.append("runs its layers again in backward: that belongs inside the block")
            found = []
        self.fail("use_running_stats", found)

    def runs_in_backward(self) -> bool:
        """Whether the unguarded twin's backward pass calls layers that a guard would be on."""
        twin, calls = self.twin(), []
        for layer in _guarded(twin):
            twin.get_submodule(layer.names[0]).register_forward_pre_hook(
                lambda *_: calls.append(torch._C._current_graph_task_id() != -1)
            )
        self.step(twin)
        return any(calls)

    def run_running(self, expected: _Outcome, *, backward_after: bool) -> list[str]:
        model = self.twin()
        kept = _Kept(model)
        guard = partial(bnguard.frozen, model, use_running_stats=True)
        found = self.guarded(model, guard, expected, backward_after=backward_after, evaluated=True)
        return kept.changed() + found

    def guarded(
        self,
        model: nn.Module,
        make_guard: Callable[[], Any],
        expected: _Outcome,
        *,
        backward_after: bool = False,
        evaluated: bool = False,
    ) -> list[str]:
        """Runs under a guard and says what differs from the twin's outcome."""
        found = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", bnguard.BNGuardWarning)
            try:
                outcome = self.step(model, make_guard(), backward_after=backward_after)
            except Exception as error:
                assert_clean(model)
                if _is_out_of_memory(error):
                    raise
                return [f"raised {_text(error)}"]
        found += [f"warned {w.message}" for w in caught if issubclass(w.category, bnguard.BNGuardWarning)]
        if outcome.modes != self.expected.modes:  # a forward may call eval() itself
            found.append("modes differ")
        try:
            assert_clean(model)
        except AssertionError as error:
            found.append(f"left on the model: {error}")
        differences = _differences(outcome, expected)
        if differences and self.is_nondeterministic(expected, evaluated=evaluated):
            if "nondeterministic" not in self.result.notes:
                self.result.notes.append("nondeterministic")
            differences = []
        return found + differences

    def is_nondeterministic(self, expected: _Outcome, *, evaluated: bool) -> bool:
        """Whether unguarded twins differ from each other, in three more tries."""
        for _ in range(3):
            twin = self.twin()
            for layer in _guarded(twin) if evaluated else ():
                twin.get_submodule(layer.names[0]).training = False
            if _differences(self.step(twin), expected):
                return True
        return False

    def raising(self, moved: set[str]) -> None:
        model = self.twin()
        kept = _Kept(model)
        if not moved:
            found = self.guarded(model, partial(bnguard.frozen, model), self.expected)
            self.fail("raise", kept.changed() + found)
            return
        found = []
        _seed()
        inputs = self.make()
        in_forward = False
        try:
            with bnguard.frozen(model):
                try:
                    model(*inputs.args, **inputs.kwargs)
                except bnguard.StatsChangedError:
                    in_forward = True
                    raise
        except bnguard.StatsChangedError as error:
            if not in_forward:
                found.append(f"raised at exit only: {_text(error)}")
            elif not set(error.changes[0].names) & moved:
                found.append(f"names {error.changes[0].names}, which the twin does not move")
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            found.append(f"raised {_text(error)}")
        else:
            found.append("no error, and the twin moves " + ", ".join(sorted(moved)[:3]))
        try:
            assert_clean(model)
        except AssertionError as error:
            found.append(f"left on the model: {error}")
        self.fail("raise", kept.changed() + found)

    def fail(self, mode: str, found: list[str]) -> None:
        room = MAX_FAILURES - len(self.result.failures)
        self.result.failures += [f"{mode}: {text}" for text in found[:room]]


class _Kept:
    """The guarded buffers of a model, as objects and as bits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {
            f"{layer.names[0]}.{buffer}".lstrip("."): model.get_submodule(layer.names[0])._buffers[buffer]
            for layer in _guarded(model)
            for buffer in layer.buffers
        }
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def changed(self) -> list[str]:
        """What is not as it was."""
        texts = []
        now = dict(_buffers(self.model))
        for name, tensor in self.tensors.items():
            if now.get(name) is not tensor:
                texts.append(f"{name} is another object")
            elif not _same(tensor, self.values[name]):
                texts.append(f"{name} moved")
        return texts


def _guarded(model: nn.Module) -> tuple[bnguard.GuardedLayer, ...]:
    return bnguard.frozen(model).layers


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return model.named_buffers(remove_duplicate=False)


def _seed() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy.random.seed(SEED)  # what the libraries use


def _rng() -> list[Tensor]:
    state = numpy.random.get_state()
    python = torch.tensor([hash(random.getstate())])
    return [torch.get_rng_state(), python, torch.tensor([hash((state[1].tobytes(), *state[2:]))])]


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """What is set on a module itself, in its tables too, and how many hooks it has."""
    names = list(vars(module))
    for name, table in vars(module).items():
        if isinstance(table, dict) and name.endswith("_hooks"):
            names.append(f"{len(table)} {name}")
        elif name in ("_buffers", "_parameters", "_modules"):
            names += [f"{name}[{key}]" for key in table]
    return tuple(sorted(names))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one is None or other is None:
        return one is other
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if isinstance(one, torch.nn.parameter.UninitializedTensorMixin):
        return type(one) is type(other)
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta
    one, other = (tensor.detach().resolve_conj().contiguous().reshape(-1) for tensor in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _differences(outcome: _Outcome, expected: _Outcome) -> list[str]:
    found = []
    if len(outcome.outputs) != len(expected.outputs):
        found.append("other outputs")
    elif not all(map(_same, outcome.outputs, expected.outputs)):
        found.append("outputs differ")
    if outcome.gradients.keys() != expected.gradients.keys():
        found.append("other gradients")
    else:
        differing = [name for name, value in expected.gradients.items() if not _same(value, outcome.gradients[name])]
        if differing:
            found.append(f"{len(differing)} gradients differ, as {differing[0]}")
    if not all(map(_same, outcome.rng, expected.rng)):
        found.append("random number generators differ")
    if outcome.attributes != expected.attributes:
        pairs = zip(outcome.attributes, expected.attributes, strict=False)
        differing = sorted({name for one, other in pairs for name in set(one) ^ set(other)})
        found.append(f"attributes or hooks differ: {', '.join(differing[:5])}")
    if outcome.error != expected.error:
        found.append(f"backward: {outcome.error or 'no error'}; twin: {expected.error or 'no error'}")
    return found


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers, dataclasses and plain objects."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found.append(value)
            return
        if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or depth > 8:
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            children = list(value.values())
        elif isinstance(value, (list, tuple)):
            children = list(value)
        elif dataclasses.is_dataclass(value):
            children = [getattr(value, f.name) for f in dataclasses.fields(value)]
        else:
            children = list(getattr(value, "__dict__", {}).values())
        for child in children:
            visit(child, depth + 1)

    visit(value, 0)
    return found


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
