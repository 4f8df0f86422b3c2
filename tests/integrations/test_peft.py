"""PEFT: the recipe, against an unguarded twin. It installs with ``pip install --no-deps peft``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.loops import data, little_waiting, make_model, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    peft = pytest.importorskip("peft")

__all__ = ["little_waiting"]

pytestmark = pytest.mark.filterwarnings("ignore")  # its own: a base without a configuration, and deprecations

BLOCK = "with bnguard.frozen(tuned, use_running_stats=True):"


def train(model: nn.Module) -> None:
    """Four steps, in train mode."""
    images, labels = data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def answers(model: nn.Module) -> Tensor:
    """What it says about the images, in eval mode."""
    with torch.no_grad():
        return model.eval()(data()[0])


@pytest.mark.parametrize("is_guarded", [True, False])
def test_adapter_on_a_fresh_base_answers_as_the_trained_model_did(is_guarded: bool, tmp_path: Path) -> None:
    """The file of the adapter has no statistics. Without the guard the base that was trained has others."""
    (recipe,) = LOOPS["PEFT"]
    assert BLOCK in recipe
    model = make_model()
    before = values(statistics(model))
    names = {"model": model, "train": train, "folder": str(tmp_path)}
    run_code(recipe if is_guarded else recipe.replace(BLOCK, "if True:"), names)
    tuned = names["tuned"]
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert not any(["running" in name for name in peft.get_peft_model_state_dict(tuned)])
    if is_guarded:
        assert_same_bits(answers(loaded), answers(tuned))
        assert_same_bits(statistics(model), before)
        assert not torch.equal(answers(tuned), answers(make_model()))
    else:
        assert not torch.allclose(answers(loaded), answers(tuned), atol=1e-2)
    assert_clean(tuned)
