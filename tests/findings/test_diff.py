"""``diff``: models, state dicts and files, and files that are none."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

import bnguard
from bnguard.testing import assert_stats_unchanged
from tests.nets import conv_net, images


def pair():
    """A net, and the same after a step."""
    net = conv_net()
    later = copy.deepcopy(net)
    later(images())
    return net, later


def names_of(net):
    """The layers with statistics."""
    return tuple(name for name, module in net.named_modules() if module._buffers)


def as_module(net, path):
    """The net itself."""
    return net


def as_state_dict(net, path):
    """Its state dict."""
    return net.state_dict()


def as_file(net, path):
    """A file with that."""
    torch.save(net.state_dict(), path / f"{id(net)}.pth")
    return path / f"{id(net)}.pth"


def as_lightning(net, path):
    """A checkpoint as Lightning writes them."""
    checkpoint = {"epoch": 1, "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}, "hyper": {"lr": 0.1}}
    torch.save(checkpoint, path / f"{id(net)}.ckpt")
    return str(path / f"{id(net)}.ckpt")


def as_nested(net, path):
    """A checkpoint of a wrapped model, in memory."""
    return {"epoch": 3, "model": {f"module.{k}": v for k, v in net.state_dict().items()}}


def as_compiled(net, path):
    """The state dict of a compiled model."""
    return {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}


def as_safetensors(net, path):
    """A file without pickle."""
    from safetensors.torch import save_file

    save_file(net.state_dict(), path / f"{id(net)}.safetensors")
    return path / f"{id(net)}.safetensors"


FORMS = (as_module, as_state_dict, as_file, as_lightning, as_nested, as_compiled, as_safetensors)


@pytest.mark.parametrize("left", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("right", FORMS, ids=lambda form: form.__name__)
def test_every_form_compares_with_every_other(left, right, tmp_path):
    """The same layers have moved by the same, whatever they are kept in."""
    net, later = pair()
    expected = bnguard.diff(net, later)
    found = bnguard.diff(left(net, tmp_path), right(later, tmp_path))
    prefix = "net." if left is right is as_lightning else ""
    assert expected.changed == names_of(net)
    assert sorted(name.removeprefix(prefix) for name in found.changed) == sorted(expected.changed)
    assert (found.missing, found.added, found.unchanged) == ((), (), ())
    theirs = {drift.names[0]: drift for drift in expected.moved}
    assert len(found.moved) == len(theirs)
    for drift in found.moved:
        twin = theirs[drift.names[0].removeprefix(prefix)]
        torch.testing.assert_close(drift.divergence, twin.divergence)
        assert drift.worst == twin.worst
    assert not found.is_clean


def test_equal_states_are_clean(tmp_path):
    """Nothing moved, nothing broken."""
    net, _ = pair()
    found = bnguard.diff(net, as_file(net, tmp_path))
    assert found.is_clean
    assert found.unchanged == names_of(net)
    assert found.report().splitlines()[0] == f"0 of {len(names_of(net))} layers moved"


def test_report_says_all():
    """What moved most first, then what is missing, added and broken."""
    before = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    after = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Identity(), nn.BatchNorm2d(2))
    after[0].running_mean += 1
    after[1].running_mean[1] = 5
    before[2].running_var[0] = -1
    after[3].running_mean[1] = float("nan")
    found = bnguard.diff(before, after)
    lines = found.report().splitlines()
    assert lines == [
        "1 layer of the later state is broken: take an earlier checkpoint",
        "2 of 2 layers moved, 1 missing, 1 added",
        "",
        "moved:",
        "  layer            channel  mean  variance  divergence",
        "  1 (BatchNorm2d)        1  5 sd       x 1   12.5 nats",
        "  0 (BatchNorm2d)        0  1 sd       x 1    0.5 nats",
        "",
        "only before:",
        "  layer",
        "  2",
        "",
        "only after:",
        "  layer",
        "  3",
        "",
        "broken before (NaN, infinite or negative):",
        "  layer",
        "  2",
        "",
        "broken after (NaN, infinite or negative):",
        "  layer",
        "  3",
    ]


def test_counter_alone_is_a_change():
    """Bits decide."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    later = copy.deepcopy(net)
    later[0].num_batches_tracked += 1
    found = bnguard.diff(net, later)
    assert found.changed == ("0",)
    assert not found.moved[0].has_moved
    assert found.report().splitlines()[2:] == ["other statistics than mean and variance moved:", "  layer", "  0"]


def test_key_chooses():
    """Where a checkpoint has several."""
    net, later = pair()
    checkpoint = {"model": net.state_dict(), "averaged": later.state_dict()}
    assert bnguard.diff(net, checkpoint).is_clean
    assert bnguard.diff(later, checkpoint, key="averaged").is_clean
    with pytest.raises(ValueError, match=r"after has no 'ema'; it has 'model', 'averaged'"):
        bnguard.diff(net, checkpoint, key="ema")


class Sneaky:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Sneaky.folder),)


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda state: {"epoch": 3, "model_state_dict": state, "loss": torch.tensor(0.3)},
        lambda state: {"epoch": torch.tensor(3), "state_dict": state},
        lambda state: {"rng_state": torch.zeros(4), "model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"ema": {"module": state, "decay": torch.tensor(0.9)}},
    ],
)
def test_state_dict_is_found_beside_other_tensors(checkpoint):
    """In the format of torch's tutorials, with random states, and one below the other."""
    net, later = pair()
    assert bnguard.diff(net, checkpoint(net.state_dict())).is_clean
    assert bnguard.diff(net, checkpoint(later.state_dict())).changed == names_of(net)


def test_key_may_have_dots():
    """For what is nested in an unusual place."""
    net, later = pair()
    checkpoint = {"student": {"weights": later.state_dict()}, "teacher": {"weights": net.state_dict()}}
    assert bnguard.diff(net, checkpoint, key="teacher.weights").is_clean
    with pytest.raises(ValueError, match=r"after has no 'teacher\.bias'; it has 'weights'"):
        bnguard.diff(net, checkpoint, key="teacher.bias")


def test_a_submodule_called_module_is_one():
    """It is no wrapper: a model and its state dict have the same layers."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = conv_net()
            self.bn = nn.BatchNorm1d(2)

    net = Net()
    assert bnguard.diff(net, net.state_dict()).is_clean
    inner = nn.Module()
    inner.module = conv_net()
    assert bnguard.diff(inner, inner.state_dict()).is_clean


def test_a_part_compares_with_the_whole():
    """What is under the prefix; the rest is missing."""
    backbone = conv_net()
    whole = nn.Module()
    whole.backbone, whole.head = copy.deepcopy(backbone), nn.BatchNorm1d(3)
    found = bnguard.diff(backbone, whole)
    assert found.unchanged == names_of(backbone)
    assert (found.missing, found.added) == ((), ("head",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_files_cut_anywhere_give_one_error(tmp_path, is_zip):
    """Whatever torch makes of them."""
    net, _ = pair()
    torch.save(net.state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for end in range(1, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.pt"):
            bnguard.diff(net, path)


@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to("meta")]
)
def test_odd_tensors_are_compared(change):
    """Sparse ones, ones of eight bits, and ones without values."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    state = {name: change(tensor) if "running" in name else tensor for name, tensor in net.state_dict().items()}
    assert bnguard.diff(state, state).is_clean
    bnguard.diff(net, state).report()


def test_files_that_would_run_code_are_refused(tmp_path):
    """Nothing of them is executed; one sentence says what to do."""
    net, _ = pair()
    Sneaky.folder = tmp_path / "executed"
    for number, content in enumerate((Sneaky(), net, {"state_dict": net.state_dict(), "hook": Sneaky()})):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds Python objects, not only tensors: loading them could run any code"):
            bnguard.diff(net, path)
    assert not Sneaky.folder.exists()


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("content", ["nothing", "text", "truncated", "pickle", "zeros"])
def test_foreign_files_give_one_error(content, suffix, tmp_path):
    """Empty, truncated, or something else: one clear error with the name."""
    net, _ = pair()
    path = tmp_path / f"file.{suffix}"
    whole = (as_safetensors if suffix == "safetensors" else as_file)(net, tmp_path).read_bytes()
    path.write_bytes(
        {
            "nothing": b"",
            "text": b"hello, this is no checkpoint\n" * 9,
            "truncated": whole[: len(whole) // 2],
            "pickle": pickle.dumps("a string"),
            "zeros": bytes(4096),
        }[content]
    )
    said = ("is empty", "is a text file: ", "is a zip archive of which a part is missing: ", "holds Python objects")
    with pytest.raises(ValueError, match=rf"file\.{suffix} ({'|'.join(said)}|is no checkpoint, or it is truncated)"):
        bnguard.diff(net, path)


def test_other_mistakes_are_named(tmp_path):
    """No state dict, no statistics, no file, no such type."""
    net, _ = pair()
    with pytest.raises(TypeError, match="before must be a model, a state dict or the path of a checkpoint, got int"):
        bnguard.diff(3, net)
    with pytest.raises(ValueError, match="after holds no state dict that bnguard can find: it has 'epoch'"):
        bnguard.diff(net, {"epoch": 3})
    with pytest.raises(ValueError, match="after, a Linear, has no running statistics"):
        bnguard.diff(net, nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        bnguard.diff(net, tmp_path / "nowhere.pt")


def test_comparing_changes_nothing():
    """Neither state is touched."""
    net, later = pair()
    assert_stats_unchanged(net, lambda: bnguard.diff(net, later))
    assert_stats_unchanged(later, lambda: bnguard.diff(net, later))


@pytest.mark.parametrize("as_model", [True, False])
def test_lost_statistics_are_missing_and_have_not_moved(as_model: bool) -> None:
    """A mean and a variance that were removed, with a counter that stayed; and the other way round they were added."""
    before = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    after = copy.deepcopy(before)
    after[0].running_mean = after[0].running_var = None
    states = [before, after] if as_model else [before.state_dict(), after.state_dict()]
    found = bnguard.diff(*states)
    assert (found.missing, found.added, found.changed, found.unchanged) == (("0",), (), (), ("1",))
    assert found.report().splitlines()[0] == "0 of 1 layer moved, 1 missing"
    found = bnguard.diff(*states[::-1])
    assert (found.missing, found.added, found.changed) == ((), ("0",), ())
