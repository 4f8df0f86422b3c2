"""mmengine: the recipe, against unguarded twins.

It installs with ``pip install --no-deps mmengine addict yapf termcolor``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.loops import backbone_norms, data, drifted, little_waiting, make_model, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    pytest.importorskip("mmengine.runner")
    from mmengine.model import BaseModel

__all__ = ["little_waiting"]

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch and numpy

BLOCK = 'with bnguard.frozen(self.runner.model, use_running_stats=True, include="backbone"):'


class Net(BaseModel):
    """The digits net, as a runner asks for it."""

    def __init__(self, norm_eval: bool = False) -> None:
        super().__init__()
        parts = make_model()
        self.backbone, self.head = parts.backbone, parts.head
        self.norm_eval = norm_eval
        self.losses: list[Tensor] = []
        self.fails_at = 99

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if self.norm_eval:
            for layer in backbone_norms(self):
                layer.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        if len(self.losses) == self.fails_at:
            raise ZeroDivisionError("theirs")
        scores = self.head(self.backbone(images))
        loss = nn.functional.cross_entropy(scores, labels)
        self.losses.append(loss.detach().clone())
        return {"loss": loss} if mode == "loss" else scores


def run(model: Net, folder: Path, *changes: tuple[str, str]) -> None:
    """The recipe of the documentation, after changes in its code."""
    (recipe,) = LOOPS["mmengine"]
    quiet = "optim_wrapper=optim_wrapper, log_level='ERROR', randomness={'seed': 3})"
    recipe = recipe.replace("optim_wrapper=optim_wrapper)", quiet)
    for old, new in changes:
        assert old in recipe
        recipe = recipe.replace(old, new)
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    run_code(recipe, {"model": model, "folder": str(folder), "loader": loader})


def test_recipe_is_norm_eval_for_any_backbone(tmp_path: Path) -> None:
    """Bit for bit what a backbone with ``norm_eval`` does by itself; beside it, too. Without either, it drifts."""
    drifting, twin = Net(), Net(norm_eval=True)
    run(drifting, tmp_path, (BLOCK, "if True:"))
    run(twin, tmp_path, (BLOCK, "if True:"))
    assert drifted(nn.Sequential(drifting.backbone, drifting.head))
    for model in (Net(), Net(norm_eval=True)):
        before = values(statistics(model))
        run(model, tmp_path)
        assert_same_bits(model.losses, twin.losses)
        assert_same_bits(model.state_dict(), twin.state_dict())
        assert_same_bits(statistics(model), before)
        assert_clean(model)


def test_run_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """The user's error comes out, and the statistics are those of before."""
    model = Net()
    before = values(statistics(model))
    model.fails_at = 4
    with pytest.raises(ZeroDivisionError, match="theirs"):
        run(model, tmp_path)
    assert_same_bits(statistics(model), before)
    assert_clean(model)


def test_run_that_resumes_begins_with_the_statistics_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner loads it before the loop: it is no change."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine saves objects of its own
    first = Net()
    run(first, tmp_path, (BLOCK, "if True:"))
    assert drifted(nn.Sequential(first.backbone, first.head))
    second = Net()
    resumes = ("Runner(model, folder, loader,", "Runner(model, folder, loader, resume=True,")
    run(second, tmp_path, ("max_epochs=2", "max_epochs=3"), resumes)
    assert len(second.losses) == 3
    assert_same_bits(statistics(second), statistics(first))


def test_wrapper_for_several_processes_is_seen_through() -> None:
    """Names are those of the model inside."""

    class MMDistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = bnguard.frozen(MMDistributedDataParallel(Net()), include="backbone")
    assert [layer.names for layer in wrapped.layers] == [("backbone.bn1",), ("backbone.bn2",)]
