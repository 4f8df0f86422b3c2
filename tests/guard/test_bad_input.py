"""Misuse is refused at once, with the value, the nearest valid one, and nothing touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, warns
from tests.nets import conv_net, deep_net, images


def expect(kind: type[Exception], text: str) -> Any:
    """Expects an error whose text is ``text``, from the first to the last letter."""
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


VALID = "(valid are 'raise', 'warn', 'restore' and 'rollback')"
SELECTORS = (
    "takes glob patterns on layer names, modules, classes of layers (nn.BatchNorm2d), predicates "
    "(name, module) -> bool, or a list of them, got"
)
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"on_change": "restor"}, ValueError, f"on_change='restor': did you mean 'restore'? {VALID}"),
    ({"on_change": "error"}, ValueError, "on_change='error': valid are 'raise', 'warn', 'restore' and 'rollback'"),
    ({"on_change": None}, ValueError, "on_change=None: valid are 'raise', 'warn', 'restore' and 'rollback'"),
    ({"on_change": "Raise"}, ValueError, f"on_change='Raise': did you mean 'raise'? {VALID}"),
    ({"updates": -1}, ValueError, "updates=-1: the number of updates that each layer may make cannot be negative"),
    ({"updates": True}, TypeError, "updates must be a whole number of updates that each layer may make, got True"),
    ({"updates": 1.5}, TypeError, "updates must be a whole number of updates that each layer may make, got 1.5"),
    ({"updates": None}, TypeError, "updates must be a whole number of updates that each layer may make, got None"),
    ({"use_running_stats": 1}, TypeError, "use_running_stats must be True or False, got 1"),
    ({"use_running_stats": "yes"}, TypeError, "use_running_stats must be True or False, got 'yes'"),
    ({"affine": None}, TypeError, "affine must be True or False, got None"),
    (
        {"use_running_stats": True, "updates": 2},
        ValueError,
        (
            "use_running_stats=True contradicts updates=2: "
            "a layer that normalises with its running statistics makes no update; leave one of them out"
        ),
    ),
    ({"include": 3}, TypeError, f"include {SELECTORS} 3"),
    ({"exclude": [3]}, TypeError, f"exclude {SELECTORS} 3"),
    ({"include": int}, TypeError, f"include {SELECTORS} <class 'int'>"),
    ({"exclude": (nn.BatchNorm2d, int)}, TypeError, f"exclude {SELECTORS} <class 'int'>"),
    ({"include": []}, ValueError, "include is an empty list; leave it out to mean every layer"),
    ({"exclude": ()}, ValueError, "exclude is an empty list; leave it out to mean every layer"),
]


@pytest.mark.parametrize(("options", "kind", "text"), BAD_OPTIONS, ids=[str(options) for options, _, _ in BAD_OPTIONS])
def test_frozen_refuses_a_bad_option(options: Any, kind: type[Exception], text: str) -> None:
    """The error says which option, what was given and what is valid; the model is not touched."""
    net = conv_net()
    before = state_of(net)
    with expect(kind, text):
        bnguard.frozen(net, **options)
    assert_clean(net)
    assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize(("options", "kind", "text"), BAD_OPTIONS, ids=[str(options) for options, _, _ in BAD_OPTIONS])
def test_strict_refuses_a_bad_option_at_decoration(options: Any, kind: type[Exception], text: str) -> None:
    """``strict`` checks its options when it decorates, with the same words."""
    with expect(kind, text):
        bnguard.strict(**options)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (None, "frozen() takes a torch.nn.Module, got NoneType: None"),
        ("resnet18", "frozen() takes a torch.nn.Module, got str: 'resnet18'"),
        (nn.BatchNorm2d, "frozen() takes a model, got the class BatchNorm2d: make an instance of it first"),
        (int, "frozen() takes a torch.nn.Module, got type: <class 'int'>"),
        ([nn.ReLU(), nn.ReLU()], "frozen() takes one model, got a list of 2: wrap them in nn.ModuleList"),
        ((nn.ReLU(),), "frozen() takes one model, got a tuple of 1: wrap them in nn.ModuleList"),
        ([], "frozen() takes a torch.nn.Module, got list: []"),
        ("x" * 100, f"frozen() takes a torch.nn.Module, got str: '{'x' * 56}..."),
    ],
    ids=["none", "name", "class", "other-class", "list", "tuple", "empty", "long"],
)
def test_frozen_refuses_what_is_no_model(model: Any, text: str) -> None:
    """The error says what was given, shortly, and what to do."""
    with expect(TypeError, text):
        bnguard.frozen(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is (deprecated|not supported in Python 3.14):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")  # from torch 2.14 on
def test_frozen_refuses_a_traced_function() -> None:
    """It has no modules; the error says where they are."""
    function = torch.jit.trace(torch.relu, torch.ones(1))
    with pytest.raises(TypeError, match=r"got ScriptFunction: .*; guard the model that it calls$"):
        bnguard.frozen(function)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (
            "stem.bm",
            "='stem.bm' matches none of the 2 layers with running statistics; close names are stem.bn, stem",
        ),
        ("boddy", "='boddy' matches none of the 2 layers with running statistics; close names are body, body.bn"),
        ("zzz*", "='zzz*' matches none of the 2 layers with running statistics; the first ones are stem.bn, body.bn"),
        ("head", "='head' matches modules, but none of the 2 layers with running statistics"),
        ("*.conv", "='*.conv' matches modules, but none of the 2 layers with running statistics"),
        (nn.BatchNorm2d(2), ": the given BatchNorm2d is not a part of the model"),
        (lambda name, module: False, ": the predicate selects none of the 2 layers with running statistics"),
    ],
    ids=["typo", "container", "far", "no-layer", "no-layers", "foreign", "predicate"],
)
def test_frozen_refuses_a_selector_without_a_match(option: str, selector: Any, text: str) -> None:
    """A selector that selects nothing is an error, with names that are near."""
    net = conv_net()
    with expect(ValueError, f"{option}{text}"):
        bnguard.frozen(net, **{option: selector})
    assert_clean(net)


def test_frozen_refuses_a_module_without_layers() -> None:
    """A part of the model that has nothing to guard is told from a stranger."""
    net = conv_net()
    with expect(ValueError, "include: the given Sequential has no layer with running statistics in it"):
        bnguard.frozen(net, include=net.head)


def test_frozen_refuses_one_bad_selector_among_good_ones() -> None:
    """Each selector of a list has to select something."""
    with pytest.raises(ValueError, match=r"^include='nothing' matches none"):
        bnguard.frozen(conv_net(), include=["stem", "nothing"])


def test_frozen_refuses_to_guard_nothing() -> None:
    """Include and exclude that cancel each other out are an error."""
    with expect(ValueError, "include and exclude leave none of the 2 layers with running statistics"):
        bnguard.frozen(conv_net(), include="stem", exclude="stem.*")


def test_error_of_one_layer_is_in_the_singular() -> None:
    """One layer is not called layers."""
    with pytest.raises(ValueError, match="matches none of the 1 layer with"):
        bnguard.frozen(deep_net(1), include="zzz")


def test_error_of_a_predicate_comes_out() -> None:
    """A predicate that fails fails with its own error, and nothing is touched."""
    net = conv_net()
    with pytest.raises(ZeroDivisionError):
        bnguard.frozen(net, include=lambda name, module: 1 / 0)
    assert_clean(net)


def test_frozen_refuses_options_by_position() -> None:
    """All options but the policy have names."""
    with pytest.raises(TypeError, match="positional"):
        bnguard.frozen(conv_net(), "raise", True)


@pytest.mark.parametrize("options", [{}, {"include": "anything"}, {"updates": 1}], ids=str)
def test_model_without_layers_gets_one_warning(options: Any) -> None:
    """Generic code keeps running on a model without statistics: one warning at the line that made the guard."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1))
    with warns(at="bnguard.frozen(net, **options)"):
        guard = bnguard.frozen(net, **options)
    for _ in range(2):
        with guard:
            net(images())
    guard.check()
    assert guard.layers == guard.changes == ()


def test_model_without_layers_under_strict_gets_the_warning_at_the_call() -> None:
    """``strict`` on a model without statistics warns where the function is called."""

    @bnguard.strict
    def step(model: nn.Module) -> None:
        model(images())

    with warns(at="step(nn."):
        step(nn.Identity())


def test_layers_that_left_the_model_leave_nothing_to_guard() -> None:
    """A guard whose model has lost its layers enters and leaves without a word."""
    net = deep_net(1)
    guard = bnguard.frozen(net)
    net[0] = nn.Identity()
    with guard:
        net(images())
    assert guard.layers == ()


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((int, ["mean"]), TypeError, "register_layer() takes a subclass of torch.nn.Module, got <class 'int'>"),
        (("Norm", ["mean"]), TypeError, "register_layer() takes a subclass of torch.nn.Module, got 'Norm'"),
        (
            (nn.ReLU, "mean"),
            TypeError,
            "buffers must be a sequence of buffer names, such as ['ema_mean'], got 'mean'",
        ),
        ((nn.ReLU, [1]), TypeError, "buffers must be a sequence of buffer names, such as ['ema_mean'], got [1]"),
        ((nn.ReLU, None), TypeError, "buffers must be a sequence of buffer names, such as ['ema_mean'], got None"),
        (
            (nn.ReLU, []),
            ValueError,
            "buffers is empty: name at least one buffer of ReLU that holds running statistics",
        ),
    ],
    ids=["class", "name", "string", "number", "none", "empty"],
)
def test_register_layer_refuses_misuse(arguments: Any, kind: type[Exception], text: str) -> None:
    """The error says what was given and what is expected; nothing is registered."""
    with expect(kind, text):
        bnguard.register_layer(*arguments)


class Handmade(nn.Module):
    """Keeps its statistics where no guard holds them."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        mean = torch.zeros(3)
        self.mean = nn.Parameter(mean, requires_grad=False) if keep == "parameter" else mean

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(input, self.mean.data, torch.ones(3), training=True)


@pytest.mark.parametrize(
    ("keep", "what"), [("parameter", "an nn.Parameter"), ("attribute", "a plain attribute")], ids=["parameter", "plain"]
)
@pytest.mark.parametrize(
    "look",
    [lambda net: bnguard.frozen(net).__enter__(), lambda net: bnguard.watch(net).__enter__(), bnguard.audit],
    ids=["frozen", "watch", "audit"],
)
def test_registered_statistic_that_is_no_buffer_is_refused(
    look: Callable[[nn.Module], Any], keep: str, what: str
) -> None:
    """It would move in silence."""
    net = nn.Sequential(Handmade(keep))
    registration = bnguard.register_layer(Handmade, ["mean", "var"])
    try:
        text = (
            f"'mean' of Handmade is registered as a running statistic, but is {what}, which bnguard cannot hold: make "
            "it a buffer, with register_buffer('mean', ...)"
        )
        with expect(bnguard.BNGuardError, text):
            look(net)
        assert_clean(net)
    finally:
        registration.remove()


def test_register_layer_refuses_a_flag_for_updates() -> None:
    """``updates`` is a function of the layer."""
    with expect(TypeError, "updates must be callable, as in updates=lambda layer: layer.training, got True"):
        bnguard.register_layer(nn.ReLU, ["mean"], updates=True)
