"""``strict``: ``frozen`` around every call of a function, on the models that it finds."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, statistics, values, warns
from tests.nets import conv_net, images, mlp, warmed

global_net: Any = None


def norm() -> Any:
    """One layer in a container."""
    return warmed(nn.Sequential(nn.BatchNorm2d(2)))


def is_held(net: nn.Module) -> bool:
    """Whether a forward in train mode moves nothing at this moment."""
    before = values(statistics(net))
    try:
        net(images())
    except bnguard.StatsChangedError:
        return True
    try:
        assert_same_bits(statistics(net), before)
    except AssertionError:
        return False
    return True


# Forms.


def test_strict_without_parentheses_raises() -> None:
    """The bare decorator raises on the models among the arguments."""

    @bnguard.strict
    def step(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    net = conv_net()
    before = state_of(net)
    with pytest.raises(bnguard.StatsChangedError, match=r"stem.bn \(BatchNorm2d\)"):
        step(net, images())
    assert_same_bits(net.state_dict(), before)
    assert_same_bits(step(net.eval(), images()), net(images()))
    assert_clean(net)


@pytest.mark.parametrize("decorate", [bnguard.strict(), bnguard.strict(on_change="raise")])
def test_strict_with_parentheses_raises(decorate: Any) -> None:
    """So does the one with parentheses."""
    with pytest.raises(bnguard.StatsChangedError):
        decorate(lambda model: model(images()))(conv_net())


def test_strict_takes_every_option_of_frozen() -> None:
    """The options have the names, kinds and defaults of those of ``frozen``."""
    ours, theirs = inspect.signature(bnguard.strict).parameters, inspect.signature(bnguard.frozen).parameters
    missing = {name for name in theirs if name not in ours}
    assert missing == set()
    for name in theirs.keys() - {"model"}:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_strict_applies_its_options() -> None:
    """Policy, mode, parameters, budget and selection reach the guard."""
    net, twin = conv_net(), conv_net()

    @bnguard.strict(on_change="restore", affine=True, updates=1, include="stem", exclude="body")
    def step(model: nn.Module) -> list[bool]:
        outcome(model, images())
        outcome(model, images())
        return [model.stem.bn.weight.requires_grad, model.body.bn.weight.requires_grad]

    assert step(net) == [False, True]
    outcome(twin, images())
    assert_same_bits(net.stem.state_dict(), twin.stem.state_dict())
    outcome(twin, images())
    assert_same_bits(net.body.state_dict(), twin.body.state_dict())


def test_strict_applies_use_running_stats() -> None:
    """With ``use_running_stats`` the function sees eval mode."""
    net = norm()

    @bnguard.strict(use_running_stats=True)
    def step(model: nn.Module) -> Tensor:
        return model.train()(images())

    assert_same_bits(step(net), net.eval()(images()))


def test_strict_opens_a_block_for_each_call() -> None:
    """A budget counts anew in each call, a nested one included."""
    net = norm()

    @bnguard.strict(updates=1)
    def step(model: nn.Module) -> None:
        model(images())

    step(net)
    step(net)
    assert net[0].num_batches_tracked == 5


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_strict_guards_class_and_static_methods(kind: Any, above: bool) -> None:
    """Above or below ``classmethod`` and ``staticmethod``, called on the class or on an instance."""
    strict = bnguard.strict(on_change="restore")

    def step(*args: Any) -> bool:
        return is_held(args[-1])

    class Trainer:
        run = strict(kind(step)) if above else kind(strict(step))

    assert Trainer.run(norm())
    assert Trainer().run(norm())


def test_strict_guards_methods_and_nested_functions() -> None:
    """Methods, lambdas, functions in functions."""
    strict = bnguard.strict(on_change="restore")

    class Trainer:
        @strict
        def run(self, model: nn.Module) -> bool:
            @strict
            def inner(model: nn.Module) -> bool:
                return is_held(model)

            return inner(model) and is_held(model)

    assert Trainer().run(norm())
    assert Trainer.run(Trainer(), norm())
    assert strict(lambda model: is_held(model))(norm())


def test_strict_guards_coroutines() -> None:
    """A coroutine is guarded while it runs, not while it waits."""
    net = norm()

    @bnguard.strict(on_change="restore")
    async def guarded(model: nn.Module) -> list[bool]:
        first = is_held(model)
        await asyncio.sleep(0)
        return [first, is_held(model)]

    async def free() -> bool:
        return is_held(net)

    async def main() -> list[Any]:
        return await asyncio.gather(guarded(net), free())

    assert asyncio.run(main()) == [[True, True], False]
    assert_clean(net)


def test_strict_guards_generators() -> None:
    """A generator is guarded while it runs, not between its steps."""
    net = norm()

    @bnguard.strict(on_change="restore")
    def guarded(model: nn.Module) -> Iterator[bool]:
        yield is_held(model)
        yield is_held(model)

    found = []
    for held in guarded(net):
        found += [held, is_held(net)]
    assert found == [True, False, True, False]


def test_strict_guards_async_generators() -> None:
    """An asynchronous generator likewise."""
    net = norm()

    @bnguard.strict(on_change="restore")
    async def guarded(model: nn.Module) -> AsyncIterator[bool]:
        yield is_held(model)
        await asyncio.sleep(0)
        yield is_held(model)

    async def main() -> list[bool]:
        return [item async for held in guarded(net) for item in (held, is_held(net))]

    assert asyncio.run(main()) == [True, False, True, False]


# Where models are found.


@pytest.mark.parametrize(
    "wrap",
    [lambda net: net, lambda net: [net], lambda net: (1, (net,)), lambda net: {"model": [net]}, lambda net: {net}],
    ids=["plain", "list", "tuple", "dict", "set"],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_strict_finds_models_in_arguments(wrap: Callable[[Any], Any], by_name: bool) -> None:
    """Modules are found by position and by name, inside lists, tuples, sets and dicts too."""
    net = norm()

    @bnguard.strict(on_change="restore")
    def step(things: Any) -> bool:
        return is_held(net)

    assert step(things=wrap(net)) if by_name else step(wrap(net))
    assert_clean(net)


def test_strict_guards_every_model_among_the_arguments() -> None:
    """All models of the deciding place are guarded, each once."""
    one, two = norm(), norm()

    @bnguard.strict(on_change="restore")
    def step(first: nn.Module, rest: Any) -> list[bool]:
        return [is_held(one), is_held(two)]

    assert step(one, [two, one]) == [True, True]


def test_strict_guards_a_model_and_its_part_once() -> None:
    """A part given beside its model does not make a second guard: one warning, with the name in the model."""

    @bnguard.strict(on_change="warn")
    def step(part: nn.Module, model: nn.Module) -> None:
        model(images())

    net = conv_net()
    with warns(at="model(images())") as caught:
        step(net.stem, net)
    assert caught.message.startswith("stem.bn ")


def test_strict_finds_self() -> None:
    """Without a module among the arguments, ``self`` is the model where it is one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm()

        @bnguard.strict(on_change="restore")
        def step(self) -> bool:
            return is_held(self.norm)

    assert Net().step()


def test_strict_finds_attributes_of_self() -> None:
    """Where ``self`` is no module, its attributes are looked at."""

    class Trainer:
        def __init__(self) -> None:
            self.models = {"teacher": norm()}

        @bnguard.strict(on_change="restore")
        def step(self) -> bool:
            return is_held(self.models["teacher"])

    assert Trainer().step()


def test_strict_finds_attributes_of_the_class() -> None:
    """For a class method the attributes of the class."""

    class Trainer:
        net = norm()

        @bnguard.strict(on_change="restore")
        @classmethod
        def step(cls) -> bool:
            return is_held(cls.net)

    assert Trainer.step()


def test_strict_finds_the_closure() -> None:
    """Models of the closure, those that only an inner function reads included."""
    net = norm()

    @bnguard.strict(on_change="restore")
    def step() -> list[bool]:
        return [is_held(net) for _ in range(1)]

    assert step() == [True]


def test_strict_finds_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models among the globals that the function reads, as they are at the call."""

    @bnguard.strict(on_change="restore")
    def step() -> bool:
        return is_held(global_net)

    monkeypatch.setitem(globals(), "global_net", norm())
    assert step()


class Everywhere(nn.Module):
    """A model that is ``self``, and has one as an attribute of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()
        self.other = [norm()]


def test_strict_looks_at_arguments_before_self() -> None:
    """A model among the arguments decides; ``self`` is not guarded then."""

    class Net(Everywhere):
        @bnguard.strict(on_change="restore")
        def step(self, model: nn.Module) -> list[bool]:
            return [is_held(model), is_held(self.norm)]

    assert Net().step(norm()) == [True, False]


def test_strict_looks_at_self_before_its_attributes() -> None:
    """``self`` decides where it is a module; what it keeps in a list is not guarded then, which is said."""

    class Net(Everywhere):
        @bnguard.strict(on_change="restore")
        def step(self) -> list[bool]:
            return [is_held(self.norm), is_held(self.other[0])]

    with warns() as caught:
        assert Net().step() == [True, False]
    assert caught.message.startswith("also moved inside @bnguard.strict, not guarded: other.0.0 (BatchNorm2d).")


def test_strict_looks_at_attributes_before_the_closure() -> None:
    """Attributes of ``self`` decide before what the function reads elsewhere."""
    elsewhere = norm()

    class Trainer:
        def __init__(self) -> None:
            self.net = norm()

        @bnguard.strict(on_change="restore")
        def step(self) -> list[bool]:
            return [is_held(self.net), is_held(elsewhere)]

    assert Trainer().step() == [True, False]


def test_strict_passes_over_modules_without_statistics() -> None:
    """A loss among the arguments is no model to guard: the search goes on."""

    class Trainer:
        def __init__(self) -> None:
            self.net = norm()

        @bnguard.strict(on_change="restore")
        def step(self, loss: nn.Module) -> bool:
            return is_held(self.net)

    assert Trainer().step(nn.MSELoss())


# model=.


def test_strict_takes_a_module() -> None:
    """``model=module`` is that module, and nothing else is looked at."""
    net, other = norm(), norm()

    @bnguard.strict(on_change="restore", model=net)
    def step(model: nn.Module) -> list[bool]:
        return [is_held(net), is_held(model)]

    assert step(other) == [True, False]


@pytest.mark.parametrize("call", [lambda step, s, t: step(s, t), lambda step, s, t: step(teacher=t, student=s)])
def test_strict_takes_a_parameter_name(call: Any) -> None:
    """``model="teacher"`` is that argument, by position or by name."""

    @bnguard.strict(on_change="restore", model="teacher")
    def step(student: nn.Module, teacher: nn.Module) -> list[bool]:
        return [is_held(student), is_held(teacher)]

    assert call(step, norm(), norm()) == [False, True]


def test_strict_takes_a_parameter_with_a_default() -> None:
    """A parameter that is not given has its default."""
    net = norm()

    @bnguard.strict(on_change="restore", model="model")
    def step(model: nn.Module = net) -> bool:
        return is_held(net)

    assert step()


def test_strict_takes_a_dotted_name() -> None:
    """``model="self.encoder"`` and ``model="model.stem"`` follow attributes."""

    class Trainer:
        def __init__(self) -> None:
            self.encoder, self.decoder = norm(), norm()

        @bnguard.strict(on_change="restore", model="self.encoder")
        def step(self) -> list[bool]:
            return [is_held(self.encoder), is_held(self.decoder)]

    @bnguard.strict(on_change="restore", model="model.stem")
    def step(model: nn.Module) -> list[bool]:
        images_in, rest = model.stem, nn.Sequential(nn.Conv2d(2, 3, 1), model.body)
        return [is_held(images_in), is_held(rest)]

    assert Trainer().step() == [True, False]
    assert step(conv_net()) == [True, False]


def test_strict_takes_a_parameter_with_several_models() -> None:
    """A parameter may be a list of models."""

    @bnguard.strict(on_change="restore", model="models")
    def step(models: list[nn.Module], other: nn.Module) -> list[bool]:
        return [is_held(model) for model in [*models, other]]

    assert step([norm(), norm()], norm()) == [True, True, False]


def test_strict_takes_a_callable() -> None:
    """A callable gets the arguments of the call, and gives one model or several."""
    one, two = norm(), norm()
    seen: list[Any] = []

    def choose(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return [one, two]

    @bnguard.strict(on_change="restore", model=choose)
    def step(batch: int, *, scale: int) -> list[bool]:
        return [is_held(one), is_held(two)]

    assert step(1, scale=2) == [True, True]
    assert seen == [((1,), {"scale": 2})]


def test_strict_gives_a_callable_self_first() -> None:
    """For a method the callable gets ``self`` first."""

    class Trainer:
        def __init__(self) -> None:
            self.net = norm()

        @bnguard.strict(on_change="restore", model=lambda self, batch: self.net)
        def step(self, batch: int) -> bool:
            return is_held(self.net)

    assert Trainer().step(1)


# What cannot be.


def test_strict_without_a_model_says_where_it_looked() -> None:
    """No model anywhere is an error at the call, with the places and the way out."""

    @bnguard.strict
    def step(batch: int) -> None:
        pytest.fail("the function ran")

    text = (
        "strict: test_strict_without_a_model_says_where_it_looked.<locals>.step() has no model: "
        "looked in its arguments, self, the attributes of self, and what it reads from its closure and globals; "
        "say which with strict(model=...), a module, the name of a parameter, or a callable. "
        "Containers of more than 256 entries are data, and are not searched."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        step(1)


class Callable3:
    """Something to call that is no function."""

    def __call__(self, number: int) -> None:
        pytest.fail("it ran")


@pytest.mark.parametrize("step", [functools.partial(print, 1), Callable3()], ids=["partial", "object"])
@pytest.mark.parametrize("model", [None, lambda number: number], ids=["search", "callable"])
def test_strict_without_a_model_names_what_is_no_function(step: Any, model: Any) -> None:
    """The error is the same for what can be called and has no name."""
    with pytest.raises(TypeError, match=r"strict: .*(has no model|gave no torch\.nn\.Module)"):
        bnguard.strict(model=model)(step)(3)


@pytest.mark.parametrize("path", ["modle", "modle.stem"])
def test_strict_refuses_an_unknown_parameter(path: str) -> None:
    """A name that is no parameter is an error at decoration, with the names that are."""

    def step(model: nn.Module, batch: Tensor) -> None: ...

    text = (
        f"strict(model={path!r}): test_strict_refuses_an_unknown_parameter.<locals>.step() has no parameter 'modle'; "
        "it has model, batch"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bnguard.strict(model=path)(step)
    with pytest.raises(ValueError, match=r"has no parameter 'net'; it has none$"):
        bnguard.strict(model="net")(lambda: None)


@pytest.mark.parametrize(
    ("model", "what"), [("model", "'model'"), (lambda model: model, "the callable")], ids=["name", "callable"]
)
def test_strict_refuses_what_turns_out_to_be_no_model(model: Any, what: str) -> None:
    """A name or a callable that gives no module is an error at the call."""

    @bnguard.strict(model=model)
    def step(model: Any) -> None:
        pytest.fail("the function ran")

    with pytest.raises(TypeError, match=rf"^strict: model={what} gave no torch.nn.Module at the call of .*step\(\)$"):
        step(3)


def test_strict_takes_no_mock_for_a_model() -> None:
    """It says that it is a module, and has no layers."""
    step = bnguard.strict(model=mock.MagicMock(spec=nn.Module))(lambda: pytest.fail("the function ran"))
    with pytest.raises(TypeError, match=r"^strict: model=the callable gave no torch.nn.Module at the call of "):
        step()


def test_strict_does_not_call_what_passes_for_a_model() -> None:
    """A proxy of a model is refused, and the model is not run."""
    net = mlp()
    before = state_of(net)
    step = bnguard.strict(model=weakref.proxy(net), on_change="restore")(lambda rows: pytest.fail("the function ran"))
    with pytest.raises(TypeError, match=r"^strict: model=the callable gave no torch.nn.Module at the call of "):
        step(torch.randn(4, 6))
    assert_same_bits(state_of(net), before)


def test_strict_refuses_a_wrong_model() -> None:
    """``model`` is a module, a name or a callable."""
    with pytest.raises(TypeError, match=r"^model must be a module, the name of a parameter or a callable, got 3$"):
        bnguard.strict(model=3)  # type: ignore[call-overload]


def test_strict_refuses_to_decorate_a_model() -> None:
    """A model is guarded by ``frozen``; so says the error."""
    for word, instead in (("restore", "on_change='restore'"), ("teacher", "model='teacher'")):
        with pytest.raises(TypeError, match=re.escape(f"got {word!r}: write @strict({instead})")):
            bnguard.strict(word)
    text = "strict decorates functions; to guard a model use frozen(model), or strict(model=model)"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        bnguard.strict(mlp())


@pytest.mark.parametrize("value", [nn.Linear, 3])
def test_strict_refuses_what_is_no_function(value: Any) -> None:
    """Classes and values are refused."""
    with pytest.raises(TypeError, match=r"^strict decorates functions, got "):
        bnguard.strict()(value)


def test_strict_refuses_wrong_arguments_as_the_function_does() -> None:
    """A call that does not fit the function fails with Python's own error."""

    @bnguard.strict(on_change="restore")
    def step(model: nn.Module, batch: Tensor) -> None: ...

    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'batch'"):
        step(norm())


# The face of the function.


@bnguard.strict(on_change="restore")
def documented(model: nn.Module, batch: Tensor | None = None) -> bool:
    """Says whether it is held."""
    return is_held(model)


class Documented:
    """Has a method that is guarded."""

    def __init__(self) -> None:
        self.net = norm()

    @bnguard.strict(on_change="restore")
    def step(self, times: int = 1) -> bool:
        """Says whether it is held."""
        return is_held(self.net)


def test_strict_keeps_the_signature() -> None:
    """Signature, name, docstring, module and annotations are the function's."""
    assert str(inspect.signature(documented)) == "(model: 'nn.Module', batch: 'Tensor | None' = None) -> 'bool'"
    assert documented.__name__ == documented.__qualname__ == "documented"
    assert documented.__doc__ == "Says whether it is held."
    assert documented.__module__ == __name__
    assert documented.__annotations__ == {"model": "nn.Module", "batch": "Tensor | None", "return": "bool"}
    assert str(inspect.signature(Documented.step)) == "(self, times: 'int' = 1) -> 'bool'"
    assert str(inspect.signature(Documented().step)) == "(times: 'int' = 1) -> 'bool'"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_decorated_function_pickles(protocol: int) -> None:
    """A decorated function pickles by name, a bound method with its instance, and both still guard."""
    assert pickle.loads(pickle.dumps(documented, protocol)) is documented
    bound = pickle.loads(pickle.dumps(Documented().step, protocol))
    assert bound()
    assert bound(times=2)


def test_strict_passes_over_a_closure_variable_without_a_value() -> None:
    """A variable of the enclosing function that has no value yet is no place to look in."""

    @bnguard.strict(on_change="restore")
    def step() -> bool:
        return is_held(net) and (later or True)

    net = norm()
    with pytest.raises(NameError, match="later"):
        step()
    later = True
    assert step()


# What a call keeps.


def test_change_after_the_last_item_of_an_async_generator_is_raised() -> None:
    """As in a generator."""
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()

    @bnguard.strict
    async def stream(net: nn.Module) -> AsyncIterator[int]:
        yield 1
        net.get_buffer("0.running_mean").data.add_(1)

    async def main() -> list[int]:
        return [item async for item in stream(net)]

    with pytest.raises(bnguard.StatsChangedError, match=r"changed inside @bnguard\.strict"):
        asyncio.run(main())
    assert not net.get_buffer("0.running_mean").any()


def test_suspended_generator_keeps_nothing() -> None:
    """Neither the item that it has given, nor what it was sent, nor an exception that it has handled."""
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()

    @bnguard.strict(model=net)
    def batches() -> Iterator[Tensor]:
        for _ in range(3):
            with suppress(ValueError):
                yield torch.ones(1)

    generator: Any = batches()
    item = next(generator)
    kept = [weakref.ref(item)]
    del item
    sent = torch.zeros(1)
    kept.append(weakref.ref(sent))
    generator.send(sent)
    del sent

    class Problem(ValueError):
        pass

    problem = Problem()
    kept.append(weakref.ref(problem))
    generator.throw(problem)
    del problem
    gc.disable()
    try:
        assert [reference() for reference in kept] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("is_generator", [False, True])
def test_error_of_a_call_keeps_no_frames(is_generator: bool) -> None:
    """Once it is handled, what it knows goes away without a collection of garbage."""
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()

    def change(tensor: Tensor) -> None:
        kept.append(weakref.ref(tensor))
        net.get_buffer("0.running_mean").data.add_(1)

    @bnguard.strict(model=net)
    def function() -> None:
        change(torch.ones(1))

    @bnguard.strict(model=net)
    def generator() -> Iterator[None]:
        change(torch.ones(1))
        yield

    kept: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        try:
            next(generator()) if is_generator else function()
        except bnguard.StatsChangedError as error:
            kept.append(weakref.ref(error))
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
