"""Requests to guard models, as the plugin and ``bnguard run`` make them: what their end says, and of which models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

import bnguard
from bnguard.guard.options import Settings
from bnguard.guard.requests import GuardRequests, Precedence
from tests.nets import conv_net, images


@pytest.fixture
def requests() -> Iterator[GuardRequests]:
    """None so far; at the end all have ended."""
    made = GuardRequests()
    yield made
    assert made.end(None) == []


@contextmanager
def guarded(requests: GuardRequests) -> Iterator[nn.Module]:
    """A new model, guarded; what that finds is kept for the end."""
    net = conv_net()
    request = requests.add(Precedence.FIXTURE, net, Settings())
    request.begin(request.layers)
    yield net
    requests.remove(request)


@pytest.mark.parametrize("is_same_line", [True, False])
def test_error_stands_for_all_that_was_stopped_at_its_line(requests: GuardRequests, is_same_line: bool) -> None:
    """Where a test runs many times with new models; also as a cause, even in a circle. Of others there is a note."""
    stopped = []
    for is_first in (True, False):
        with guarded(requests) as net, pytest.raises(bnguard.StatsChangedError) as caught:
            if is_first or is_same_line:
                net(images())
            net(images())
        stopped.append(caught.value)
    error = ZeroDivisionError()
    error.__cause__, stopped[1].__cause__ = stopped[1], error
    requests.end(error)
    notes = getattr(error, "__notes__", [])
    assert len(notes) == (not is_same_line)
    assert all(stopped[0].changes[0].where in note for note in notes)
    stopped[1].__cause__ = None


def test_warnings_of_other_code_come_through(requests: GuardRequests) -> None:
    """Those of bnguard are returned, another one while the guards end is given as it is."""

    class Talkative(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is Tensor.detach:
                warnings.warn("of a tensor", UserWarning, stacklevel=1)
            return super().__torch_function__(function, types, args, kwargs or {})

    net = nn.BatchNorm2d(2)
    net.running_mean = net.running_mean.as_subclass(Talkative)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        request = requests.add(Precedence.FIXTURE, net, Settings("warn"))
        request.begin(request.layers)
    net.running_var.data.add_(1)
    with pytest.warns(UserWarning, match="of a tensor") as caught:
        texts = requests.end(None)
    assert {record.category for record in caught} == {UserWarning}
    assert len(texts) == 1
    assert "running_var" in texts[0]
