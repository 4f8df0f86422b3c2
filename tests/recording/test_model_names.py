"""Several models in one report: each has the name that the user gave it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnguard

ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
MODEL_OF_THIS_FILE = nn.BatchNorm1d(4)


def net_of() -> nn.Sequential:
    """A small net."""
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def fit(net: nn.Module, rows: Tensor) -> None:
    """Calls a parameter of its own."""
    for _ in range(2):
        net(rows)


@torch.no_grad()
def validate(rows: Tensor, *, model: nn.Module) -> None:
    """Decorated, with a keyword."""
    fit(model, rows)


def fit_a_copy(net: nn.Module) -> None:
    """Another model than the one that was passed."""
    net = copy.deepcopy(net)
    net(ROWS)


class Distiller:
    """Models as attributes."""

    def __init__(self) -> None:
        self.student, self.teacher = net_of(), net_of()

    def step(self, rows: Tensor) -> None:
        """A step."""
        loss = (self.teacher(rows).detach() - self.student(rows)).square().mean()
        loss.backward()


def called_directly() -> None:
    """By variables."""
    generator, critic = net_of(), nn.DataParallel(net_of())
    generator(critic(ROWS) + critic(ROWS)).square().mean().backward()


def passed_to_functions() -> None:
    """The parameter has one name for all of them."""
    generator, critic, ema = net_of(), net_of(), net_of()
    fit(generator, ROWS)
    fit(rows=ROWS, net=critic)
    validate(ROWS, model=ema)


def attributes() -> None:
    """Of an object."""
    Distiller().step(ROWS)


def a_loop_variable() -> None:
    """One name for all."""
    for net in [net_of(), net_of()]:
        net(ROWS)
    MODEL_OF_THIS_FILE(ROWS)


def a_parameter_that_is_assigned() -> None:
    """What was passed is another model: its name is not the copy's, which would make two of it."""
    student = net_of()
    student(ROWS)
    fit_a_copy(student)


def called_by_a_library() -> None:
    """No source of the user's calls it."""
    nets = [net_of(), MODEL_OF_THIS_FILE]
    torch.optim.swa_utils.update_bn([ROWS], nets[0])
    torch.optim.swa_utils.update_bn([ROWS], nets[1])


CASES: list[tuple[Callable[[], None], list[str]]] = [
    (called_directly, ["critic", "generator"]),
    (passed_to_functions, ["generator", "critic", "model"]),
    (attributes, ["teacher", "student"]),
    (a_loop_variable, ["Sequential at LINE", "Sequential 2 at LINE", "MODEL_OF_THIS_FILE"]),
    (a_parameter_that_is_assigned, ["student", "net"]),
    (called_by_a_library, ["Sequential at LINE", "MODEL_OF_THIS_FILE"]),
]


@pytest.mark.parametrize(("run", "names"), CASES, ids=[run.__name__ for run, _ in CASES])
def test_models_have_the_names_of_the_users_variables(run: Callable[[], None], names: list[str]) -> None:
    """What two models share names neither: then it is the class, and the line of the first call."""
    with bnguard.watch() as record:
        run()
    models = [update.model for update in record.updates]
    places = [(update.where or "").partition(" ")[0] for update in record.updates]
    assert models == [name.replace("LINE", place) for name, place in zip(names, places, strict=True)]
    assert all(place.startswith("tests/recording/test_model_names.py:") for place in places)


def test_naming_a_model_leaves_locals_alone() -> None:
    """Looking at a frame's variables would add to the dictionary that the user has, and keep a model alive."""
    seen = locals()
    net, other = net_of(), net_of()
    with bnguard.watch() as record:
        net(ROWS)
        other(ROWS)
    assert set(seen) <= {"seen"}
    assert [update.model for update in record.updates] == ["net", "other"]


def test_source_that_is_gone_names_by_class() -> None:
    """As that of a notebook of another kernel."""
    code = "def go(rows):\n    one, two = make(), make()\n    one(rows)\n    two(rows)\n"
    names = {"make": net_of}
    exec(compile(code, "nowhere.py", "exec"), names)
    with bnguard.watch() as record:
        names["go"](ROWS)  # type: ignore[operator]
    assert [one.model for one in record.updates] == ["Sequential at nowhere.py:3", "Sequential 2 at nowhere.py:4"]
