"""``audit``: findings from the model as it stands, and none for models that are right."""

import pytest
import torch
from torch import nn

import bnguard
from bnguard.testing import assert_stats_unchanged
from tests.nets import conv_net


def net_of(**norm):
    """Two BatchNorm layers and a head, with statistics that are learned."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **norm), nn.BatchNorm2d(4, **norm), nn.Flatten())
    net(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return net


def found(net, optimizer=None):
    """The findings by code."""
    return {finding.code: finding for finding in bnguard.audit(net, optimizer)}


def test_models_that_are_right_have_no_finding():
    """In train mode, in eval mode once trained, frozen and in eval mode, fresh and in train mode."""
    assert found(net_of()) == {}
    assert found(net_of().eval()) == {}
    assert found(net_of().requires_grad_(False).eval()) == {}
    assert found(conv_net()) == {}
    assert found(nn.Linear(2, 2)) == {}


def test_bn001_frozen_in_train_mode():
    """The statistics of frozen layers will move."""
    finding = found(net_of().requires_grad_(False))["BN001"]
    assert finding.layers == ("1", "2")
    assert finding.where is None
    assert finding.what == (
        "2 layers (1, 2) are in train mode although none of their parameters is trained: statistics will move"
    )


def test_bn004_two_names():
    """One layer that a model has twice."""
    net = net_of()
    net.append(net[1])
    assert found(net)["BN004"].what == "1 layer (1 = 4) is used under several names"


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.6])
def test_bn007_momentum(momentum):
    """Above a half; one that keeps the last batch alone is meant."""
    assert found(net_of(momentum=momentum))["BN007"].what.startswith(f"2 layers (1, 2) have momentum {momentum}")
    assert "BN007" not in found(net_of(momentum=1.0))
    assert "BN007" not in found(net_of(momentum=None))


def test_bn008_single_layer_in_eval_mode():
    """It will not stay so; a frozen one is in eval mode on purpose."""
    net = net_of()
    net[1].eval()
    assert found(net)["BN008"].what == (
        "1 layer (1) is in eval mode in a model in train mode: the next train() reaches them"
    )
    net[1].requires_grad_(False)
    assert found(net) == {}


def test_bn009_half_precision():
    """float16 and bfloat16 statistics."""
    assert found(net_of().half())["BN009"].what == "2 layers (1, 2) have statistics in float16"
    assert found(net_of().bfloat16())["BN009"].what == "2 layers (1, 2) have statistics in bfloat16"


def test_bn010_parameters_that_the_next_step_moves():
    """Frozen, in the optimizer, with a gradient; zero alone moves nothing, with momentum or decay it does."""
    net = net_of()
    net(torch.randn(8, 3, 8, 8)).sum().backward()
    net[1].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    finding = found(net, optimizer)["BN010"]
    assert finding.what == (
        "the next step of SGD moves 2 parameters (1.weight, 1.bias) with requires_grad=False, "
        "which still have a gradient"
    )
    optimizer.zero_grad(set_to_none=False)
    assert "BN010" not in found(net, optimizer)
    assert "BN010" in found(net, torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1))
    assert "BN010" in found(net, torch.optim.Adam(net.parameters()))
    net.zero_grad()
    assert "BN010" not in found(net, torch.optim.Adam(net.parameters()))
    assert "BN010" not in found(net)


def test_bn011_flag_off():
    """A layer built without statistics has none to keep."""
    net = net_of()
    net[1].track_running_stats = False
    assert found(net)["BN011"].layers == ("1",)
    assert found(net_of(track_running_stats=False)) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bn012_broken(value):
    """A negative variance, too; a negative mean is none."""
    net = net_of()
    net[1].running_var[2] = value
    finding = found(net)["BN012"]
    assert finding.severity == "error"
    assert finding.what == "1 layer (1) has NaN, infinite or negative statistics"
    net = net_of()
    net[1].running_mean[2] = -1.0
    assert found(net) == {}


def test_bn014_evaluated_before_it_was_trained():
    """In eval mode with mean 0 and variance 1."""
    net = nn.Sequential(nn.BatchNorm2d(4)).eval()
    assert (
        found(net)["BN014"].what == "1 layer (0) is in eval mode with mean 0 and variance 1: no batch was ever counted"
    )
    assert found(net.train()) == {}


def test_errors_come_first():
    """The worst is at the top."""
    net = net_of(momentum=0.9).half()
    net[2].running_mean[0] = float("nan")
    assert [finding.code for finding in bnguard.audit(net)] == ["BN012", "BN007", "BN009"]


def test_bad_input_is_refused():
    """With what was given."""
    with pytest.raises(TypeError, match=r"audit\(\) takes a torch\.nn\.Module, got dict"):
        bnguard.audit({})
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        bnguard.audit(net_of(), [])


def test_audit_changes_nothing():
    """Values without a device's data are passed over, and nothing is touched."""
    assert bnguard.audit(conv_net().to("meta")) == ()
    net = net_of()
    assert_stats_unchanged(net, lambda: bnguard.audit(net))


def test_bn004_of_names_alone_is_a_note():
    """A second name may serve to reach the layer, and not to run it twice."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    net.alias = net[0]
    (finding,) = bnguard.audit(net)
    assert (finding.code, finding.severity) == ("BN004", "note")
