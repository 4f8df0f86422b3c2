"""ultralytics: the recipe, against unguarded twins, on four made-up images."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.asserts import assert_clean, statistics, values
from tests.loops import little_waiting, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("no ultralytics", allow_module_level=True)
    from tests.zoo.torchvision_ops import import_torchvision

    import_torchvision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_VERBOSE", "false")
        import ultralytics

__all__ = ["little_waiting"]

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch and numpy

BLOCK = 'run.enter_context(bnguard.frozen(trainer.model, use_running_stats=True, include="model.[0-9]"))'
QUIET = "imgsz=32, batch=2, workers=0, device='cpu', plots=False, val=False, save=False, amp=False, verbose=False"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with a box each; returns the description of the data set."""
    cv2, folder = pytest.importorskip("cv2"), tmp_path_factory.mktemp("data")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    noise = torch.randint(255, (4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number, image in enumerate(noise):
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image.numpy())
        (folder / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    description = folder / "data.yaml"
    description.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [thing]\n")
    return description


class Seen:
    """The trainer's model, and its statistics when training begins."""

    def begin(self, trainer: Any) -> None:
        """Looks at them; is called before the recipe's own callback."""
        self.model = trainer.model
        self.before = values(statistics(self.model))

    def moved(self) -> set[int]:
        """The stages with a layer whose statistics have moved."""
        now = statistics(self.model).items()
        return {int(name.split(".")[1]) for name, value in now if not torch.equal(value, self.before[name])}


def run(dataset: Path, folder: Path, *changes: tuple[str, str], seen: Seen | None = None) -> Seen:
    """The recipe of the documentation, after changes in its code."""
    seen = seen or Seen()
    (recipe,) = LOOPS["ultralytics"]
    quiet = ("epochs=1)", f"epochs=1, project={str(folder)!r}, {QUIET})")
    watch = ("with contextlib", 'model.add_callback("on_train_start", seen.begin)\nwith contextlib')
    for old, new in (quiet, watch, *changes):
        assert old in recipe
        recipe = recipe.replace(old, new)
    try:
        run_code(recipe, {"data": str(dataset), "seen": seen})
    finally:
        assert_clean(seen.model)
    return seen


def test_recipe_holds_the_backbone_and_no_more(dataset: Path, tmp_path: Path) -> None:
    """Without it, all stages move; the stages after the backbone do in any case."""
    assert ultralytics.__version__
    plain = run(dataset, tmp_path, (BLOCK, "pass"))
    assert {0, 9, 10, 22} <= plain.moved()
    held = run(dataset, tmp_path)
    assert held.moved() == {stage for stage in plain.moved() if stage > 9}


def test_run_that_fails_leaves_nothing_behind(dataset: Path, tmp_path: Path) -> None:
    """The user's error comes out, the backbone has its statistics, and the guard has ended."""
    fails = (
        "    model.train(",
        '    model.add_callback("on_train_batch_end", lambda trainer: 1 / 0)\n    model.train(',
    )
    seen = Seen()
    with pytest.raises(ZeroDivisionError):
        run(dataset, tmp_path, fails, seen=seen)
    assert seen.moved()
    assert min(seen.moved()) > 9
