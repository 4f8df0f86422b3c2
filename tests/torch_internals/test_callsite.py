"""The user's line: where a finding happened, in code that is neither torch's nor ours."""

from __future__ import annotations

import _thread
import gc
import inspect
import linecache
import os
import re
import sysconfig
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from bnguard.torch_internals import callsite
from bnguard.torch_internals.callsite import CallSite, CallSites, call_site, end_in_users_line
from tests.asserts import GuardedThread, warns
from tests.nets import conv_net, images

HERE = __file__
FILE = "tests/torch_internals/test_callsite.py"


def here() -> int:
    """The line of the caller."""
    return inspect.currentframe().f_back.f_lineno


def where_of(net: nn.Module, run: Any) -> str:
    """What a guard under warn says about where the first update was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bnguard.frozen(net, "warn") as guard:
            run()
    return guard.changes[0].where


def run_as(code: str, filename: str, **names: Any) -> dict[str, Any]:
    """Runs code as if it stood in a file."""
    exec(compile(code, filename, "exec"), names)
    return names


def test_call_site_is_the_callers_line() -> None:
    """Called in the user's own function: that line, with a stacklevel of one."""
    assert call_site()[:4] == (HERE, here(), "test_call_site_is_the_callers_line", 1)


def test_call_site_as_text() -> None:
    """The path relative to the working directory, the line and the function."""
    assert str(call_site()) == f"{FILE}:{here()} in test_call_site_as_text"


def test_comprehensions_belong_to_their_function() -> None:
    """A user has not named them; a lambda is what it is called."""
    (site,) = [call_site() for _ in range(1)]
    assert site.function == "test_comprehensions_belong_to_their_function"
    assert next(call_site() for _ in range(1)).function == "test_comprehensions_belong_to_their_function"
    assert {call_site().function for _ in range(1)} == {"test_comprehensions_belong_to_their_function"}
    assert {n: call_site().function for n in range(1)}[0] == "test_comprehensions_belong_to_their_function"
    assert (lambda: call_site())().function == "<lambda>"
    names: dict[str, Any] = {"call_site": call_site}
    exec(compile("found = [call_site() for _ in range(1)]", "script.py", "exec"), names)
    assert names["found"][0].function == "<module>"


def test_call_site_elsewhere_is_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not below the working directory is given in full."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(callsite, "roots", [])
    assert str(call_site()).startswith(f"{HERE}:")


def test_call_site_survives_a_lost_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the working directory is gone, the path is given as the interpreter knows it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr(callsite, "roots", [])
    gone.rmdir()
    assert str(call_site()).startswith(f"{HERE}:")


def test_call_site_of_a_string_is_its_name() -> None:
    """Code without a file is the user's, by the name that it was given."""
    names = run_as("def f():\n    return str(call_site())", "<string>", call_site=call_site)
    assert names["f"]() == "<string>:2 in f"


class Net(nn.Module):
    """A model whose forward is the user's code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(input)


IN_NET = f"{FILE}:{inspect.getsourcelines(Net.forward)[1] + 1} in forward"


def change_of(net: nn.Module, run: Any) -> bnguard.StatsChange:
    """What a guard under warn says about the first layer that updated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bnguard.frozen(net, "warn") as guard:
            run()
    return guard.changes[0]


def test_finding_in_a_model_points_at_the_loop_and_then_into_the_model() -> None:
    """A user asks which of the loops it was; the line in the model comes second."""
    net = Net()

    def train_step() -> None:
        net(images())

    change = change_of(net, train_step)
    line = inspect.getsourcelines(train_step)[1] + 1
    assert change.where == f"{FILE}:{line} in train_step"
    assert change.inside == IN_NET
    with (
        pytest.raises(bnguard.StatsChangedError, match=re.escape(f"  at {change.where} ({IN_NET})\n")),
        bnguard.frozen(net),
    ):
        train_step()


def test_wrapped_model_is_called_where_its_wrapper_is() -> None:
    """``DataParallel`` and ``torch.compile`` call the model; the user calls them."""
    net = Net()
    for model in (nn.DataParallel(net), torch.compile(net, backend="eager", disable=True), nn.Sequential(net)):
        change = change_of(net, lambda model=model: model(images()))
        assert change.where == f"{FILE}:{here() - 1} in <lambda>"
        assert change.inside == IN_NET


def test_model_in_a_model_of_the_user() -> None:
    """The outermost call that the user's code makes."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, input: Tensor) -> Tensor:
            return self.net(input)

    pair = Pair()
    change = change_of(pair.net, lambda: pair(images()))
    assert change.where == f"{FILE}:{here() - 1} in <lambda>"
    assert change.inside == IN_NET


def test_step_that_a_library_runs_is_the_users_line() -> None:
    """A trainer of a package calls the user's step, which calls the model."""
    filename = os.path.join(sysconfig.get_paths()["purelib"], "trainer", "loop.py")
    fit = run_as("def fit(step):\n    step()", filename)["fit"]
    net = Net()

    def training_step() -> None:
        net(images())

    change = change_of(net, lambda: fit(training_step))
    assert change.where == f"{FILE}:{inspect.getsourcelines(training_step)[1] + 1} in training_step"


def test_model_that_a_library_calls_is_found_in_the_users_forward() -> None:
    """Where a package calls the model itself, the user has no other line than those in it."""
    filename = os.path.join(sysconfig.get_paths()["purelib"], "trainer", "loop.py")
    fit = run_as("def fit(net, batch):\n    net(batch)", filename)["fit"]
    net = Net()
    change = change_of(net, lambda: fit(net, images()))
    assert change.where == IN_NET
    assert change.inside is None


def test_recomputation_is_found_where_backward_is_called() -> None:
    """That call makes the checkpointed region run again."""
    net = Net()
    output = torch.utils.checkpoint.checkpoint(net, images().requires_grad_(), use_reentrant=False)
    change = change_of(net, lambda: output.sum().backward())
    assert change.where == f"{FILE}:{here() - 1} in <lambda>"
    assert change.inside == IN_NET


class Called(nn.Module):
    """Finds its caller in two ways."""

    def __init__(self, sites: CallSites) -> None:
        super().__init__()
        self.sites = sites
        self.found: list[tuple[CallSite, CallSite | None, CallSite, CallSite | None]] = []

    def forward(self, input: Tensor) -> Tensor:
        again, plain = self.sites.find(), call_site()
        assert again.stacklevel == plain.stacklevel
        self.found.append((again, again.inside, plain, plain.inside))
        return input


def test_sites_are_found_again_as_by_themselves() -> None:
    """From other lines, other depths, the same line of a function that others call, and through wrappers."""
    layer = Called(CallSites())
    net = nn.Sequential(layer, nn.Sequential(layer), nn.DataParallel(nn.Sequential(layer)))

    class Outer(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return through(input)

    def through(input: Tensor) -> Tensor:
        return net(input)

    outer, input = Outer(), images()
    for _ in range(2):
        for call in (net, layer, outer, through):
            call(input)
        through(outer(input)); through(input)  # fmt: skip  # noqa: E702
        layer.forward(input)
    assert len({str(again) for again, *_ in layer.found}) == 4
    for again, again_inside, plain, plain_inside in layer.found:
        assert again[:4] == plain[:4]
        assert (again_inside or ())[:4] == (plain_inside or ())[:4]


def test_sites_keep_no_frame() -> None:
    """What a caller has in its variables is freed when the caller returns."""
    sites = CallSites()

    def caller() -> weakref.ref[nn.Module]:
        local = nn.Module()
        sites.find()
        return weakref.ref(local)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()


def test_sites_forget_code_that_is_compiled_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cells of a notebook are: few stacks are known at once, and the lines stay right."""
    monkeypatch.setattr(callsite, "_MOST", 400)
    sites = CallSites()
    for number in range(50):
        names: dict[str, Any] = {"sites": sites}
        exec(compile("\n" * number + "found = sites.find()", f"cell-{number}.py", "exec"), names)
        assert names["found"][:2] == (f"cell-{number}.py", number + 1)
        assert sum([len(codes) for _, codes in sites._known.values()]) <= 400
    assert sites._known


def test_layer_that_the_loop_calls_itself_has_one_line() -> None:
    """There is nothing to add."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    assert change_of(net, lambda: net(images())).inside is None


def test_finding_through_torch_points_at_the_users_line() -> None:
    """Frames of torch are passed over: containers, compiled graphs' wrappers, fx."""
    net = conv_net()
    for model in (net, nn.DataParallel(net), torch.fx.symbolic_trace(net)):
        assert where_of(model, lambda model=model: model(images())) == f"{FILE}:{here()} in <lambda>"


def test_finding_through_the_standard_library_points_at_the_users_line() -> None:
    """Frames of the standard library are passed over where the user's are further out."""
    import functools

    net = nn.Sequential(nn.BatchNorm2d(2))
    call = functools.singledispatch(lambda batch: net(batch))
    line = here() - 1
    assert where_of(net, lambda: call(images())) == f"{FILE}:{line} in <lambda>"
    where = where_of(net, lambda: functools.reduce(lambda x, y: y, map(net, [images()]), 0))
    assert where.startswith(f"{FILE}:{here() - 1} in <lambda>")  # older pytest counts the lines of an assert otherwise


@pytest.mark.parametrize("key", ["purelib", "stdlib"])
def test_finding_through_a_package_points_at_the_users_line(key: str) -> None:
    """Frames of installed packages are passed over where the user's are further out."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    filename = os.path.join(sysconfig.get_paths()[key], "trainer", "loop.py")
    fit = run_as("def fit(net, batch):\n    net(batch)", filename)["fit"]
    assert where_of(net, lambda: fit(net, images())) == f"{FILE}:{here()} in <lambda>"


def test_finding_without_a_users_frame_points_into_the_package() -> None:
    """Where no frame is the user's, the innermost one outside torch and bnguard is given."""
    net = nn.Sequential(nn.BatchNorm2d(2))

    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(net, images()).result()

    path, _, rest = where_of(net, run).rpartition(":")
    assert path.endswith(os.path.join("concurrent", "futures", "thread.py"))
    assert rest.endswith(" in run")


def test_warning_without_a_users_frame_points_into_the_package() -> None:
    """The warning points where its text says."""
    net = nn.Sequential(nn.BatchNorm2d(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with bnguard.frozen(net, "warn"), ThreadPoolExecutor(1) as pool:
            pool.submit(net, images()).result()
    assert os.path.basename(caught[0].filename) == "thread.py"
    assert "net" not in linecache.getline(caught[0].filename, caught[0].lineno)


def test_finding_in_a_thread_points_at_the_threads_line() -> None:
    """A thread's own code is the user's, whoever started the thread."""
    net = nn.Sequential(nn.BatchNorm2d(2))

    def run() -> None:
        net(images())

    def start() -> None:
        thread = GuardedThread(run)
        thread.start()
        thread.join(20)

    line = inspect.getsourcelines(run)[1] + 1
    assert where_of(net, start) == f"{FILE}:{line} in run"


def test_finding_without_any_line_but_torchs_points_into_torch() -> None:
    """Nobody else is on the stack of a bare thread that runs a model: torch's first line is better than none."""
    net, over = nn.BatchNorm2d(2), threading.Event()
    net.register_forward_hook(lambda *_: over.set())

    def run() -> None:
        _thread.start_new_thread(net, (images(),))
        assert over.wait(20)

    assert re.fullmatch(r".*module\.py:\d+ in _wrapped_call_impl", change_of(net, run).where or "")


def test_finding_in_a_users_hook_points_at_the_hook() -> None:
    """A hook that runs the layer once more is the second line: the first is the call of the model."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Identity())

    def hook(module: nn.Module, args: Any) -> None:
        net[0](args[0])

    net[1].register_forward_pre_hook(hook)
    with bnguard.frozen(net, "warn", updates=1), warns(at="net(images())") as caught:
        net(images())
    assert f"({FILE}:{inspect.getsourcelines(hook)[1] + 1} in hook)" in caught.messages[0]


def test_constructor_points_at_its_line_through_a_package() -> None:
    """A guard made inside an installed package warns at the user's line that led there."""
    filename = os.path.join(sysconfig.get_paths()["purelib"], "trainer", "guard.py")
    make = run_as("def make(net):\n    return bnguard.frozen(net)", filename, bnguard=bnguard)["make"]
    with warns(at="make(nn.ReLU())"):
        make(nn.ReLU())


def test_error_without_a_users_line_keeps_its_traceback() -> None:
    """One that was not raised has none; one that only torch's code has led to keeps it."""
    error = bnguard.StatsChangedError("not raised")
    end_in_users_line(error)
    assert error.__traceback__ is None
    with pytest.raises(NotImplementedError) as caught:
        nn.Module()(1)
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    trace = error.__traceback__
    end_in_users_line(error)
    assert error.__traceback__ is trace
    assert trace.tb_next is not None
