"""timm: the recipe for a list of frozen parts, against unguarded twins."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.loops import little_waiting, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm needs torchvision", allow_module_level=True)
    from tests.zoo.torchvision_ops import import_torchvision

    import_torchvision()
    timm = pytest.importorskip("timm")

__all__ = ["little_waiting"]

PARTS = ("conv1", "bn1", "act1", "maxpool", "layer1")
BLOCK = 'with bnguard.frozen(model, use_running_stats=True, include=lambda name, module: name.split(".")[0] in parts):'


def make_net() -> nn.Module:
    """A small ResNet."""
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3)


def train(model: nn.Module) -> None:
    """Two steps, in train mode."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        for layer in model.modules():
            if getattr(layer, "stays_in_eval_mode", False):
                layer.eval()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(4) % 3).backward()
        optimizer.step()


def run(model: nn.Module, *changes: tuple[str, str]) -> nn.Module:
    """The recipe of the documentation, after changes in its code."""
    (recipe,) = LOOPS["timm"]
    for old, new in changes:
        assert old in recipe
        recipe = recipe.replace(old, new)
    run_code(recipe, {"model": model, "train": train})
    return model


def is_of_parts(name: str) -> bool:
    """Whether a name is in the list."""
    return name.split(".")[0] in PARTS


def test_recipe_freezes_the_parts_of_the_list() -> None:
    """Bit for bit a run that puts their layers into eval mode at each step; without the block they drift."""
    drifting = run(make_net(), (BLOCK, "if True:"))
    twin = make_net()
    for name, layer in twin.named_modules():
        layer.stays_in_eval_mode = isinstance(layer, nn.BatchNorm2d) and is_of_parts(name)
    run(twin, (BLOCK, "if True:"))
    model = make_net()
    before = values(statistics(model))
    run(model)
    assert_same_bits(model.state_dict(), twin.state_dict())
    for name, tensor in statistics(model).items():
        assert torch.equal(tensor, before[name]) == is_of_parts(name)
    assert not any([torch.equal(tensor, before[name]) for name, tensor in statistics(drifting).items()])
    assert_clean(model)


def test_list_itself_is_refused_for_its_parts_without_statistics() -> None:
    """As a typing error is."""
    with pytest.raises(ValueError, match="include='act1' matches modules, but none of"):
        bnguard.frozen(make_net(), include=list(PARTS))
