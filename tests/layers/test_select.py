"""Which layers ``include`` and ``exclude`` select, and under which names."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.nets import FrozenNorm, MovingNorm, SharedNet, conv_net, deep_net, images


def stage() -> nn.Sequential:
    """A convolution and a layer with statistics."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 2, 1), bn=nn.BatchNorm2d(2)))


def net() -> nn.Sequential:
    """Layers ``stem``, ``layer1.0.bn``, ``layer1.1.bn`` and ``layer2.bn``."""
    return nn.Sequential(OrderedDict(stem=nn.BatchNorm2d(2), layer1=nn.Sequential(stage(), stage()), layer2=stage()))


def names(model: nn.Module, **options: Any) -> list[str]:
    """The first name of each guarded layer."""
    return [layer.names[0] for layer in bnguard.frozen(model, **options).layers]


ALL = ["stem", "layer1.0.bn", "layer1.1.bn", "layer2.bn"]


def test_everything_is_guarded_without_a_selection() -> None:
    """All layers with statistics, in the order of ``state_dict()``."""
    assert names(net()) == ALL


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("stem", ["stem"]),
        ("layer1.0.bn", ["layer1.0.bn"]),
        ("layer1.*", ["layer1.0.bn", "layer1.1.bn"]),
        ("layer1", ["layer1.0.bn", "layer1.1.bn"]),
        ("layer1.1", ["layer1.1.bn"]),
        ("layer?", ["layer1.0.bn", "layer1.1.bn", "layer2.bn"]),
        ("layer[2-9]*", ["layer2.bn"]),
        ("*.bn", ["layer1.0.bn", "layer1.1.bn", "layer2.bn"]),
        ("*", ALL),
        (["stem", "layer2.*"], ["stem", "layer2.bn"]),
        (("layer2", "stem"), ["stem", "layer2.bn"]),
        (lambda name, module: name.endswith("1.bn"), ["layer1.1.bn"]),
        (lambda name, module: module.num_features == 2, ALL),
    ],
    ids=lambda value: "predicate" if callable(value) else str(value),
)
def test_selector_selects(selector: Any, expected: list[str]) -> None:
    """Patterns on names of layers and of containers, predicates, and lists of them; what is left is the complement."""
    assert names(net(), include=selector) == expected
    rest = [name for name in ALL if name not in expected]
    if rest:
        assert names(net(), exclude=selector) == rest


def test_selector_takes_modules() -> None:
    """A layer selects itself, a container all in it."""
    model = net()
    assert names(model, include=model.layer1) == ["layer1.0.bn", "layer1.1.bn"]
    assert names(model, include={model.stem, model.layer2.bn}) == ["stem", "layer2.bn"]
    assert names(model, exclude=model.layer1[0]) == ["stem", "layer1.1.bn", "layer2.bn"]
    assert names(model, include=model) == ALL


def test_selector_takes_classes() -> None:
    """A class selects the layers that are one, subclasses included; alone, or among other entries."""

    class Own(nn.BatchNorm1d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2), Own(2), nn.InstanceNorm2d(2, track_running_stats=True))
    assert names(model, include=nn.BatchNorm1d) == ["1", "2"]
    assert names(model, exclude=nn.BatchNorm1d) == ["0", "3"]
    assert names(model, include=(nn.BatchNorm2d, nn.InstanceNorm2d)) == ["0", "3"]
    assert names(model, include=[Own, "0", model[3]]) == ["0", "2", "3"]
    assert names(model, include=nn.Module, exclude={Own}) == ["0", "1", "3"]
    step = bnguard.strict(include=nn.BatchNorm2d, on_change="restore")(lambda net: net[1](torch.ones(4, 2)))
    step(model)
    assert int(model[1].num_batches_tracked) == 1
    text = "include=BatchNorm3d selects none of the 4 layers with running statistics; their classes are BatchNorm1d, "
    with pytest.raises(ValueError, match=f"^{text}BatchNorm2d, InstanceNorm2d and 1 more$"):
        names(model, include=["0", nn.BatchNorm3d])


def test_selector_is_case_sensitive() -> None:
    """``Stem`` is not ``stem``."""
    with pytest.raises(ValueError, match="include='Stem' matches none"):
        names(net(), include="Stem")


def test_exclude_takes_away_from_include() -> None:
    """Selected is what ``include`` has and ``exclude`` has not."""
    assert names(net(), include="layer*", exclude="*.1.*") == ["layer1.0.bn", "layer2.bn"]


def test_root_layer_has_a_name() -> None:
    """A model that is itself a layer is selected as ``(root)``, or by any pattern that takes the empty name."""
    layer = nn.BatchNorm2d(2)
    assert names(layer) == names(layer, include="(root)") == names(layer, include="*") == [""]


def test_shared_layer_is_selected_by_any_of_its_names() -> None:
    """Each name of a shared layer selects it, once."""
    for pattern in ("norm", "again", "*"):
        assert bnguard.frozen(SharedNet(), include=pattern).layers[0].names == ("norm", "again")


def test_shared_container_gives_its_layers_all_names() -> None:
    """Layers in a container that hangs at two places have a name for each."""
    part = stage()
    model = nn.Sequential(OrderedDict(one=part, two=part))
    assert bnguard.frozen(model).layers[0].names == ("one.bn", "two.bn")


def test_module_that_contains_itself_is_walked_once() -> None:
    """A cycle among modules ends."""
    model = net()
    model.layer2.__dict__["_modules"]["up"] = model
    assert names(model) == ALL


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["dp", "compile"]
)
def test_wrapper_is_no_part_of_a_name(wrap: Any) -> None:
    """Patterns are written for the bare model."""
    assert names(wrap(net()), include="layer1") == ["layer1.0.bn", "layer1.1.bn"]


def test_attribute_called_like_a_wrapper_is_part_of_a_name() -> None:
    """Only a wrapper's own attribute is left out, not any that is called ``module``."""
    model = nn.Sequential(OrderedDict(module=nn.BatchNorm2d(2)))
    assert names(model) == ["module"]


def test_predicate_is_asked_about_every_name() -> None:
    """A shared layer is selected if one of its names is."""
    asked = []

    def choose(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "again"

    assert names(SharedNet(), include=choose) == ["norm"]
    assert set(asked) == {("norm", nn.BatchNorm2d), ("again", nn.BatchNorm2d)}


def test_selection_is_made_anew_in_each_block() -> None:
    """A pattern applies to the layers of the moment."""
    model = deep_net(2)
    guard = bnguard.frozen(model, "restore", include="?")
    model.append(nn.BatchNorm2d(2))
    with guard:
        model(images())
    assert [int(layer.num_batches_tracked) for layer in model] == [0, 0, 0]


def test_unselected_layers_train() -> None:
    """What is not selected updates, and its layers are no newcomers to the model."""
    model = conv_net()
    with bnguard.frozen(model, "restore", include="stem"):
        model(images())
    assert [int(model.stem.bn.num_batches_tracked), int(model.body.bn.num_batches_tracked)] == [3, 4]


def test_statistics_are_found_by_name() -> None:
    """Buffers called as running statistics are guarded, others of the same layer are not."""

    class Odd(nn.Module):
        def __init__(self, *buffers: str) -> None:
            super().__init__()
            for name in buffers:
                self.register_buffer(name, torch.zeros(2))

    statistics = ("running_mean", "running_variance", "moving_var", "running_std", "num_batches_tracked")
    (layer,) = bnguard.frozen(Odd(*statistics, "cache", "mean", "running_total", "my_running_mean")).layers
    assert layer.buffers == statistics


def test_layers_are_found_by_what_they_own() -> None:
    """Ownership decides, not the class: relatives without buffers are passed over, strangers with buffers are not."""
    model = nn.Sequential(
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.InstanceNorm2d(2),
        MovingNorm(2),
        FrozenNorm(2),
        nn.GroupNorm(1, 2),
    )
    assert names(model) == ["2", "3"]


def test_names_in_an_error_pass_over_absent_modules() -> None:
    """A submodule that is None is no obstacle."""
    net = nn.Module()
    net.register_module("absent", None)
    net.bn, net.relu = nn.BatchNorm2d(1), nn.ReLU()
    with pytest.raises(ValueError, match="include='relu' matches modules, but none of the 1 layer"):
        bnguard.frozen(net, include="relu")
