"""The switch ``--bn-frozen`` and the ini value: every model that runs in any test is watched, wherever it was made."""

import re

import pytest
import torch
from torch.nn.modules import module as torch_module

from tests.old_torch import guards_graphs
from tests.suites import HEAD, Suite, block, suite

__all__ = ["suite"]


def test_switch_fails_every_test_that_updates(suite: Suite):
    """A model that the test makes itself is watched; the message says how to allow it."""
    result = suite.fails("def test_it():\n    make()(IMAGES)", "--bn-frozen=raise", failed=1)
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: 1 (BatchNorm2d) is in train mode inside --bn-frozen=raise:\n"
        "this forward would update running_mean, running_var and num_batches_tracked.\n"
        "  at test_it.py:18 in test_it\n"
        "Call eval() on it after model.train(), or choose what you meant:\n"
        "  bn_frozen(model, use_running_stats=True)    normalise with the frozen statistics\n"
        '  bn_frozen(model, on_change="restore")       normalise with the batch, keep the statistics\n'
        '  @pytest.mark.bn_updates("why")              let this test update'
    )


def test_switch_off_is_the_default(suite: Suite):
    """Without the switch nothing is watched, and torch has no hook of ours."""
    suite.run("def test_it():\n    make()(IMAGES)", passed=1)
    suite.run(
        "from torch.nn.modules import module\ndef test_it():\n    assert not module._global_forward_pre_hooks", passed=1
    )


def test_switch_leaves_torch_as_it_was(suite: Suite):
    """After the session torch's table of hooks is as before, and no model carries anything."""
    before = dict(torch_module._global_forward_pre_hooks)
    suite.run(
        """
MODEL = make()

def test_it():
    MODEL.eval()(IMAGES)
    assert "bnguard" in MODEL[1]._forward_pre_hooks

def test_between():
    assert "bnguard" not in MODEL[1]._forward_pre_hooks
""",
        "--bn-frozen=raise",
        passed=2,
    )
    assert dict(torch_module._global_forward_pre_hooks) == before


def test_ini_value_switches_it_on(suite: Suite):
    """``bn_frozen = raise`` in the configuration file is the switch for everybody; the message names it."""
    suite.ini("bn_frozen = raise")
    result = suite.run("def test_it():\n    make()(IMAGES)", failed=1)
    result.stdout.fnmatch_lines(["E*is in train mode inside bn_frozen = raise:"])


def test_wrong_values_are_refused(suite: Suite):
    """A value that does not exist ends the run before any test, and says which do."""
    suite.ini("bn_frozen = rais")
    suite.pytester.makepyfile("def test_it():\n    pass")
    result = suite.pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *tox.ini: bn_frozen = rais: did you mean 'raise'? (valid are*"])
    suite.ini()
    result = suite.pytester.runpytest_inprocess("--bn-frozen=restore")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*--bn-frozen: invalid choice: 'restore' (choose from *raise*, *no-grad*, *warn*, *off*)"]
    )


def test_warn_lets_tests_pass(suite: Suite):
    """``warn`` changes no result: the change stands, and one warning a test says so."""
    result = suite.run(
        "def test_it(model):\n    model(IMAGES)\n    model(IMAGES)\n    assert moved(model)",
        "--bn-frozen=warn",
        passed=1,
    )
    text = "\n".join(result.outlines)
    assert text.count("BNGuardWarning") == 1
    assert (
        "1 (BatchNorm2d) is in train mode inside --bn-frozen=warn and updates its running statistics: running_mean, "
        "running_var and num_batches_tracked."
    ) in text
    assert (
        "The update was kept. Later ones are recorded without further warnings; pytest --bn-report lists them all."
        in text
    )
    # Errors in place of warnings are for who asks for them by name.
    suite.again("--bn-frozen=warn", "-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning", passed=1)
    suite.again("--bn-frozen=warn", "-W", "error::bnguard.BNGuardWarning", failed=1)


@pytest.mark.parametrize("switch", ["--bn-frozen=warn", "--bn-report"])
def test_recording_leaves_no_trace_in_a_test(suite: Suite, switch):
    """What a test can see of its models, in their forwards and after them, is what it sees without the switch."""
    source = """
import copy, gc, pickle, warnings, weakref
from torch.utils.checkpoint import checkpoint

class Running(nn.Module):  # torch knows no such layer: only a comparison shows that it updates
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)).detach(), 0.1)
        return x - self.running_mean[:, None, None]

def state(layer):
    tables = {name: value for name, value in vars(layer).items() if name not in ("_parameters", "_buffers")}
    return repr(tables), sorted(vars(layer)), "forward" in dir(layer) and layer.forward.__func__

LAYERS = [lambda: nn.BatchNorm2d(3), lambda: nn.InstanceNorm2d(3, track_running_stats=True), Running]

@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("inside", [False, True])
def test_it(make_layer, mode, inside):
    layer = getattr(make_layer(), mode)()
    net = nn.Sequential(layer) if inside else layer
    plain, seen = state(layer), []
    handle = net.register_forward_hook(lambda *args: seen.append(state(layer)))
    gc.disable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.cpu.amp.autocast", FutureWarning)  # of checkpoint() in torch 2.4
        for _ in range(2):
            net(IMAGES)
        checkpoint(net, IMAGES.requires_grad_(), use_reentrant=False).sum().backward()
        handle.remove()
        copy.deepcopy(layer)
        pickle.dumps(layer)
    assert not caught
    if inside:
        assert seen[0] == state(layer) == plain
    gone = [weakref.ref(thing) for thing in (net, layer, layer.running_mean)]
    del net, layer
    del seen
    gc.enable()
    assert [reference() for reference in gone] == [None] * 3
"""
    result = suite.run(source, switch, "-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning", passed=12)
    if switch == "--bn-report":
        result.stdout.fnmatch_lines(["6 tests moved running statistics: 22 updates."])


@pytest.mark.parametrize("switch", ["--bn-frozen=warn", "--bn-report"])
def test_recording_knows_what_blocks_of_the_test_do(suite: Suite, switch):
    """What is held, put back, stopped, lent or somebody else's to tell did not happen; what was allowed did."""
    source = """
def test_held(model):
    with bnguard.frozen(model, "restore"):
        model(IMAGES)
    with bnguard.frozen(model, "rollback"):
        model(IMAGES)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(model):
        model(IMAGES)
    stats = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.func.functional_call(model, stats, (IMAGES,))
    assert not moved(model)

def test_told_by_the_fixture(model, bn_frozen):
    with bn_frozen(model, "warn"), pytest.warns(bnguard.BNGuardWarning):
        model(IMAGES)

def test_allowed(model, bn_frozen):
    with bnguard.frozen(model, updates=2):
        model(IMAGES)
        model(IMAGES)

def test_around_the_fixture(model, bn_frozen):
    model(IMAGES)
    with bn_frozen(model, "restore"):
        model(IMAGES)
    model(IMAGES)

def test_written(model):
    model.eval()(IMAGES)
    model[1].running_var.data.mul_(2)
"""
    result = suite.run(source, switch, passed=5)
    text = "\n".join(result.outlines)
    if switch == "--bn-report":
        result.stdout.fnmatch_lines(["4 tests moved running statistics: 5 updates."])
        assert text.count("test_it.py::test_around_the_fixture") == 1
    else:
        tests = ["test_allowed", "test_around_the_fixture", "test_written"]
        assert [line for line in result.outlines if line.startswith("test_it.py::")] == [
            f"test_it.py::{t}" for t in tests
        ]
        assert "changed inside --bn-frozen=warn:" in text


def test_setup_and_teardown_may_update(suite: Suite):
    """Only the test itself is watched: a fixture may train the model that it brings."""
    suite.run(
        """
@pytest.fixture
def trained(model):
    model(IMAGES)
    yield model
    model(IMAGES)

def test_it(trained):
    assert moved(trained)
    trained.eval()(IMAGES)
""",
        "--bn-frozen=raise",
        passed=1,
    )


def test_shared_model_is_watched_in_each_test(suite: Suite):
    """A model of the whole session is put back after each test that moved it."""
    suite.run(
        """
@pytest.fixture(scope="session")
def shared():
    return make()

@pytest.mark.parametrize("write", [False, True, True])
def test_it(shared, write):
    assert not moved(shared)
    shared.eval()(IMAGES)
    if write:
        shared[1].running_mean.data.add_(1)
""",
        "--bn-frozen=raise",
        failed=2,
        passed=1,
    )


def test_swallowed_error_fails_the_test(suite: Suite):
    """A test that catches the error of the suite's guard fails; a guard of its own is nearer, and may be expected."""
    source = """
def test_it(model):
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(model):
        model(IMAGES)

def test_caught(model):
    try:
        model(IMAGES)
    except RuntimeError:
        pass
"""
    suite.run(source, "--bn-frozen=raise", failed=1, passed=1)


def test_layers_with_a_forward_of_their_own(suite: Suite):
    """Where nothing can be predicted the forward is compared."""
    suite.fails(
        """
class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5

def test_it():
    Norm(3)(IMAGES)

def test_fine():
    Norm(3).eval()(IMAGES)
""",
        "--bn-frozen=raise",
        failed=1,
        passed=1,
    )


def test_part_before_the_whole(suite: Suite):
    """A backbone that runs by itself, then inside a net: each layer is watched once, and counted once."""
    result = suite.run(
        """
def test_it(model):
    model(IMAGES)
    net = nn.Sequential(model, nn.BatchNorm2d(4))
    net(IMAGES)
    net(IMAGES)
    assert model[1].num_batches_tracked == 3
""",
        "--bn-frozen=warn",
        "--bn-report",
        passed=1,
    )
    result.stdout.fnmatch_lines(["1 test moved running statistics: 5 updates."])


def test_layer_that_comes_later_is_watched(suite: Suite):
    """A layer that is put into a model after its first forward is met at its own."""
    suite.fails(
        """
def test_it(model):
    model.eval()(IMAGES)
    model.append(nn.BatchNorm2d(4))
    model(IMAGES)
""",
        "--bn-frozen=raise",
        failed=1,
    )


def test_many_models_in_one_test(suite: Suite):
    """Guards make way for newer ones, and what they found still fails the test; memory stays bounded."""
    suite.fails(
        """
import gc, weakref

def test_many():
    models = [make().eval() for _ in range(40)]
    for _ in range(3):
        for model in models:
            model(IMAGES)

def test_written():
    models = [make().eval() for _ in range(40)]
    for model in models:
        model(IMAGES)
        model[1].running_var.data.mul_(2)

def test_forgotten():
    seen = []
    for _ in range(40):
        model = make().eval()
        model(IMAGES)
        seen.append(weakref.ref(model))
    del model
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 17
""",
        "--bn-frozen=raise",
        failed=1,
        passed=2,
    )


COMPILED = """
import pytest
torch._dynamo.config.cache_size_limit = 64
MODEL = make()
STEP = torch.compile(lambda x: MODEL(x), backend="eager", fullgraph=True)
NET = torch.compile(make(), backend="eager")

@pytest.mark.parametrize("mode", ["eval", "train", "train", "eval"])
def test_function(mode):
    getattr(MODEL, mode)()
    assert not moved(MODEL)
    STEP(IMAGES)

FIRST = make()
FIRST_STEP = torch.compile(lambda x: FIRST(x), backend="eager", fullgraph=True)

@pytest.mark.parametrize("mode", ["train", "train", "eval"])
def test_first(mode):
    getattr(FIRST, mode)()
    assert not moved(FIRST)
    FIRST_STEP(IMAGES)

@pytest.mark.parametrize("mode", ["eval", "train", "train", "eval"])
def test_module(mode):
    getattr(NET, mode)()
    NET(IMAGES)
"""


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models_are_compared(suite: Suite):
    """In a graph no hook runs, in the second test no line of Python: the comparison at the end finds it.

    Before torch 2.12 a graph that is traced through a guarded layer is refused.
    """
    result = suite.run(COMPILED, "--bn-frozen=raise", failed=6, passed=5)
    found = "In a compiled graph no forward can be seen or stopped; this comparison finds what it changed."
    text = "\n".join(result.outlines)
    assert guards_graphs == (text.count(found) == 6)
    for test in re.split(r"^_{3,} test_\w+\[train\d\] _{3,}$", text, flags=re.MULTILINE)[1:]:
        assert found in test or "guards inside torch.compile need torch 2.12 or later" in test


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models_run_without_warnings_of_torch(suite: Suite):
    """A warning of torch, about hooks that see all modules, does not reach a suite that runs under -W error."""
    source = COMPILED.replace('"train", "train", "eval"', '"eval"')
    suite.run(source, "--bn-frozen=raise", "-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning", passed=5)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "code",
    [
        "torch.jit.trace(model.eval(), IMAGES, check_trace=False)(IMAGES)",
        "torch.fx.symbolic_trace(model)",
        "torch.export.export(model.eval(), (IMAGES,))",
        "torch.export.export(model.train(), (IMAGES,), strict=False)",
        "copy.deepcopy(model).eval()(IMAGES)",
        "pickle.loads(pickle.dumps(model)).eval()(IMAGES)",
        "torch.jit.script(model.eval())(IMAGES)",
        "torch.func.functional_call(model.eval(), dict(model.named_parameters()), (IMAGES,))",
        "model.eval()(IMAGES); torch.testing.assert_close(torch.jit.script(model)(IMAGES), model(IMAGES))",
        "nn.utils.fusion.fuse_conv_bn_eval(model[0].eval(), model[1].eval())(IMAGES)",
        "model.half().eval()",
    ],
)
def test_tools_work_as_without_the_switch(suite: Suite, code):
    """Programs, copies and transforms of a model that runs only in eval mode raise and warn of nothing."""
    suite.run(
        f"import copy, pickle\ndef test_it(model):\n    {code}",
        "--bn-frozen=raise",
        "-W",
        "error::bnguard.BNGuardWarning",
        passed=1,
    )


def test_layer_that_is_the_model_is_stopped_at_its_first_forward(suite: Suite):
    """A layer that nobody calls from a model is met at its own forward, and judged there; every update counts."""
    source = """
def test_it():
    layer = nn.BatchNorm2d(3)
    layer(IMAGES)
    layer(IMAGES)
    layer(IMAGES)

def test_inside_a_block_of_its_own():
    layer = nn.BatchNorm2d(3)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer):
        layer(IMAGES)
"""
    result = suite.run(source, "--bn-frozen=raise", failed=1, passed=1)
    result.stdout.fnmatch_lines(["E*at test_it.py:20 in test_it"])
    result = suite.again("--bn-report", passed=2)
    result.stdout.fnmatch_lines(["1 test moved running statistics: 3 updates."])


def test_compiled_module_where_warnings_are_errors(suite: Suite):
    """Where the test itself makes every warning an error, torch's about hooks that see all modules does not come."""
    suite.run(
        """
import contextlib, warnings

def test_it(model):
    compiled = torch.compile(model.eval(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(IMAGES)

def test_hooks_of_others_are_still_warned_about(model):
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    has_warning = hasattr(nn.modules.module, "_has_any_global_hook")  # torch 2.8 and later
    with pytest.warns(UserWarning, match="global hooks") if has_warning else contextlib.nullcontext():
        torch.compile(model.eval(), backend="eager")(IMAGES)
    handle.remove()
""",
        "--bn-frozen=raise",
        passed=2,
    )


def test_models_are_let_go_after_their_test(suite: Suite):
    """What was watched is not kept for the rest of the session."""
    suite.run(
        """
import gc, weakref
SEEN = []

@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it(mode):
    model = getattr(make(), mode)()
    SEEN.append(weakref.ref(model))
    model(IMAGES)

def test_gone():
    gc.collect()
    assert [ref() for ref in SEEN] == [None, None]
""",
        "--bn-report",
        passed=3,
    )


def test_torch_is_imported_before_any_test_is_in_its_way(suite: Suite):
    """Tests that stand in for a machine without torch pass under the switch, too."""
    suite.pytester.makepyfile(
        """
import sys

def test_platform(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")

def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
"""
    )
    suite.pytester.runpytest_subprocess("--bn-frozen=raise").assert_outcomes(passed=2)


def test_suite_inside_a_suite(suite: Suite):
    """A session in a test, as of pytester, leaves the watch of the outer one on."""
    suite.run(
        """
pytest_plugins = ["pytester"]

def test_it(pytester):
    pytester.makepyfile("def test_inner(): pass")
    pytester.runpytest_inprocess("--bn-report").assert_outcomes(passed=1)
    make()(IMAGES)
""",
        "--bn-frozen=raise",
        failed=1,
    )


def test_fixtures_that_the_test_asks_for_may_update(suite: Suite):
    """request.getfixturevalue() in a test sets a fixture up: what that trains is none of the test's."""
    suite.run(
        """
@pytest.fixture
def trained():
    model = make()
    model(IMAGES)
    return model

def test_it(request):
    request.getfixturevalue("trained").eval()(IMAGES)

def test_later(request):
    request.getfixturevalue("trained")(IMAGES)
""",
        "--bn-frozen=raise",
        passed=1,
        failed=1,
    )


@pytest.mark.parametrize(
    "members",
    [
        "def __eq__(self, other): return self is other",
        "def __getattr__(self, name): raise KeyError(name)",
        "def __len__(self): return 0",
        "def __bool__(self): raise ValueError",
    ],
)
def test_unusual_models_run_as_without_the_switch(suite: Suite, members):
    """What runs unwatched runs watched."""
    suite.run(
        f"""
class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "inner", make().eval())

    def forward(self, x):
        return self.inner(x)

    {members}

def test_it():
    Unusual()(IMAGES)
""",
        "--bn-frozen=raise",
        passed=1,
    )


@pytest.mark.parametrize(
    "way",
    [
        "raise KeyboardInterrupt",
        pytest.param("pytest.exit('enough')", marks=pytest.mark.slow),
        pytest.param("pytest.skip('later')", marks=pytest.mark.slow),
    ],
)
def test_warning_replaces_no_exception(suite: Suite, way):
    """Under -W error a finding is a note on whatever is on its way, Ctrl-C above all."""
    suite.pytester.makepyfile(
        test_it=HEAD
        + f"""
def test_it(model):
    model.eval()(IMAGES)
    model[1].running_mean.data.add_(1)
    {way}

def test_next():
    pass
"""
    )
    arguments = ("--bn-frozen=warn", "-W", "error::bnguard.BNGuardWarning", "-p", "no:cacheprovider")
    result = suite.pytester.runpytest_subprocess(*arguments)
    if "skip" in way:
        result.assert_outcomes(skipped=1, passed=1)
    else:
        assert result.ret == pytest.ExitCode.INTERRUPTED


def test_threads_meet_one_guard(suite: Suite):
    """Several threads may be the first to run a model."""
    suite.run(
        """
import threading

def test_it():
    model = make().eval()
    threads = [threading.Thread(target=model, args=(IMAGES,)) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
""",
        "--bn-frozen=raise",
        passed=1,
    )


def test_test_cases_doctests_and_coroutines(suite: Suite):
    """Every kind of test is watched."""
    suite.fails(
        '''
import unittest

class Test(unittest.TestCase):
    def test_case(self):
        make()(IMAGES)

    def test_fine(self):
        make().eval()(IMAGES)

@pytest.mark.asyncio
async def test_coroutine():
    make()(IMAGES)

def train():
    """
    >>> make()(IMAGES).shape
    torch.Size([2, 4, 6, 6])
    """

def write():
    """
    >>> model = make().eval()
    >>> model(IMAGES).shape
    torch.Size([2, 4, 6, 6])
    >>> _ = model[1].running_mean.data.add_(1)
    """
''',
        "--bn-frozen=raise",
        "--doctest-modules",
        failed=4,
        passed=1,
    )


def test_hypothesis_finds_and_shrinks(suite: Suite):
    """A property whose examples update fails with the smallest one."""
    result = suite.fails(
        """
from hypothesis import given, strategies as st

@given(size=st.integers(0, 100))
def test_it(size):
    model = make()
    if size < 7:
        model.eval()
    model(IMAGES)
""",
        "--bn-frozen=raise",
        failed=1,
    )
    result.stdout.fnmatch_lines(["E*StatsChangedError: 1 (BatchNorm2d) is in train mode inside --bn-frozen=raise:"])
    result.stdout.fnmatch_lines(["*size=7,*"])
    result.stdout.no_fnmatch_line("*was caught*")


def test_collecting_imports_no_torch(pytester: pytest.Pytester):
    """A suite that uses none of it pays for nothing: the entry point is there, and torch is not imported."""
    pytester.makepyfile(
        """
import sys

def test_it():
    assert "bnguard.pytest_plugin" in sys.modules
    assert "torch" not in sys.modules
"""
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-v")
    result.assert_outcomes(passed=1)
    result = pytester.runpytest_subprocess("--collect-only", "-p", "no:bnguard")
    assert result.ret == 0


def test_markers_are_unknown_without_the_plugin(pytester: pytest.Pytester):
    """Taken out with -p no:bnguard, the plugin is out: nothing of it is registered."""
    pytester.makepyfile("import pytest\n\n@pytest.mark.bn_updates\ndef test_it():\n    pass")
    assert pytester.runpytest_subprocess("--strict-markers").ret == 0
    result = pytester.runpytest_subprocess("--strict-markers", "-p", "no:bnguard")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*'bn_updates' not found in `markers` configuration option*"])


@pytest.mark.parametrize(
    ("option", "sentences"),
    [
        (
            "--help",
            [
                "*running statistics of BatchNorm layers (bnguard):*",
                "*--bn-frozen={raise,no-grad,warn,off}*",
                "*Fail every test that moves the running statistics*",
                "*--bn-report=?FILE.json|github?*",
                "*List which tests moved the running statistics of which*",
                "*bn_updates (linelist):*",
                "*Patterns of test files, such as tests/train/*",
                "*bn_frozen (string):*As --bn-frozen: what to do about tests that move*",
            ],
        ),
        (
            "--markers",
            [
                "@pytest.mark.bn_frozen(on_change='raise', [*][*]options): fail the test if it moves the running*",
                "@pytest.mark.bn_updates(reason=''): let the test move running statistics although *",
            ],
        ),
        (
            "--fixtures",
            ["bn_frozen -- *", "*A function: ``bn_frozen(model)`` fails the test if it moves the model's running*"],
        ),
    ],
)
def test_each_piece_is_described(suite: Suite, option, sentences):
    """--help, --markers and --fixtures say what there is, in a sentence each."""
    suite.pytester.runpytest_inprocess(option).stdout.fnmatch_lines(sentences)


TORCHLESS = """
import sys
import pytest

def test_plain():
    assert "torch" not in sys.modules

@pytest.mark.bn_updates("why not")
def test_marked():
    assert "torch" not in sys.modules

def test_moves():
    import torch
    torch.nn.BatchNorm1d(2)(torch.randn(3, 2))

@pytest.mark.bn_updates("it trains")
def test_may_move():
    import torch
    torch.nn.BatchNorm1d(2)(torch.randn(3, 2))

def test_moves_too():
    import torch
    torch.nn.BatchNorm1d(2)(torch.randn(3, 2))
"""


@pytest.mark.parametrize("switch", ["--bn-frozen=raise", "--bn-report"])
def test_suite_without_torch_imports_none(suite: Suite, switch: str):
    """In a suite that never imports torch the switches cost no import of it."""
    suite.pytester.makepyfile(TORCHLESS.partition("def test_moves")[0])
    suite.pytester.runpytest_subprocess(switch).assert_outcomes(passed=2)


def test_torch_is_seen_when_a_test_imports_it(suite: Suite):
    """The test that imports torch first is guarded, and so are those after it."""
    suite.pytester.makepyfile(TORCHLESS)
    result = suite.pytester.runpytest_subprocess("--bn-frozen=raise", "-rA")
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(["FAILED *::test_moves *", "FAILED *::test_moves_too *"])


def test_fixture_in_a_suite_that_imports_torch_late(suite: Suite):
    """The fixture brings torch along; the switch then guards the other models of the test."""
    suite.pytester.makepyfile(
        """
def test_it(bn_frozen):
    import torch
    with bn_frozen(torch.nn.BatchNorm1d(2)):
        torch.nn.BatchNorm1d(2)(torch.randn(3, 2))
"""
    )
    result = suite.pytester.runpytest_subprocess("--bn-frozen=raise")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*is in train mode inside --bn-frozen=raise:"])


WITHOUT_GRAD = """
from torch.utils.checkpoint import checkpoint

def test_train_step(model):
    loss = model(IMAGES).sum()
    loss.backward()
    model.eval()
    with torch.no_grad():
        model(IMAGES)
    assert moved(model)

@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_step(model, reentrant):
    images = IMAGES.clone().requires_grad_()
    checkpoint(model, images, use_reentrant=reentrant).sum().backward()
    assert model[1].num_batches_tracked == 2

def test_load(model):
    model.eval()(IMAGES)
    state = model.state_dict()
    state["1.running_mean"] = state["1.running_mean"] + 1
    model.load_state_dict(state)
    assert moved(model)

def test_compiled_step(model):
    torch.compile(model, backend="eager")(IMAGES).sum().backward()
    assert moved(model)

def test_parameters_without_gradients(model):
    model.requires_grad_(False)
    model(IMAGES)

def test_own_forward(model):
    class Scaled(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images) * 2
    nn.Sequential(model[0], Scaled(4))(IMAGES).sum().backward()

@pytest.mark.bn_updates("calibrates")
@torch.no_grad()
def test_marked(model):
    model(IMAGES)
"""
LEAKS = """
@torch.no_grad()
def test_validates(model):
    model(IMAGES)

def test_infers(model):
    with torch.inference_mode():
        model(IMAGES)

def test_trains_and_validates(model):
    model(IMAGES).sum().backward()
    with torch.no_grad():
        model(IMAGES)

def test_swallows(model):
    model(IMAGES).sum().backward()
    try:
        with torch.no_grad():
            model(IMAGES)
    except Exception:
        pass

def test_own_forward(model):
    class Scaled(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images) * 2
    scaled = nn.Sequential(model[0], Scaled(4))
    scaled(IMAGES).sum().backward()
    with torch.no_grad():
        scaled(IMAGES)
"""


def test_no_grad_lets_training_steps_pass(suite: Suite):
    """With ``no-grad`` a test may train: recomputed, compiled, with loaded statistics and frozen weights.

    Before torch 2.12 a graph that is traced through a guarded layer is refused.
    """
    outcomes = {"passed": 8} if guards_graphs else {"passed": 7, "failed": 1}
    suite.run(WITHOUT_GRAD, "--bn-frozen=no-grad", **outcomes)
    suite.again("--bn-frozen=raise", passed=1, failed=7)


def test_no_grad_fails_forwards_without_gradients(suite: Suite):
    """A validation in train mode fails its test, also where the error is caught, and after a training step."""
    result = suite.fails(LEAKS, "--bn-frozen=no-grad", failed=5)
    result.stdout.fnmatch_lines(["E*is in train mode inside --bn-frozen=no-grad:"])


def test_set_up_of_a_test_case_may_update(suite: Suite):
    """As a fixture may: under the switch, alone and with a marker, which then guards as if there were no switch."""
    suite.run(
        """
import unittest

class TestPlain(unittest.TestCase):
    def setUp(self):
        self.model = make()
        self.model(IMAGES)

    def test_eval(self):
        self.model.eval()(IMAGES)

    def test_moves(self):
        self.model(IMAGES)

class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.model = make()
        self.model(IMAGES)

    async def test_eval(self):
        self.model.eval()(IMAGES)

    async def test_moves(self):
        self.model(IMAGES)

@pytest.mark.bn_frozen("restore")
class TestMarked(TestPlain):
    def test_moves(self):
        self.model(IMAGES)
        assert self.model[1].num_batches_tracked == 1

class TestFails(unittest.TestCase):
    def setUp(self):
        make()(IMAGES)
        raise OSError("of the set-up")

    def test_it(self):
        pass
""",
        "--bn-frozen=raise",
        passed=4,
        failed=3,
    )


def test_set_up_that_imports_torch(suite: Suite):
    """The guard of a suite that imports torch late begins after it."""
    suite.pytester.makepyfile(
        """
import unittest

class TestLate(unittest.TestCase):
    def setUp(self):
        import torch
        self.layer, self.rows = torch.nn.BatchNorm1d(2), torch.randn(3, 2)
        self.layer(self.rows)

    def test_eval(self):
        self.layer.eval()(self.rows)

    def test_moves(self):
        self.layer(self.rows)
"""
    )
    suite.pytester.runpytest_subprocess("--bn-frozen=raise").assert_outcomes(passed=1, failed=1)


def test_subtests_are_told_once(suite: Suite):
    """The error of a subtest is not told again as one that was caught; what the end finds is shown all the same."""
    pytest.importorskip("_pytest.subtests")
    result = suite.run(
        """
import unittest

class TestPlain(unittest.TestCase):
    def test_it(self):
        model = make()
        for mode in (False, True):
            with self.subTest(mode=mode):
                model.train(mode)(IMAGES)

def test_fixture(subtests, model):
    for mode in (False, True):
        with subtests.test(mode=mode):
            model.train(mode)(IMAGES)

def test_found_at_the_end(subtests, model):
    with subtests.test():
        model(IMAGES)
    model[1].running_mean.data.add_(1)

def test_fine(subtests, model):
    with subtests.test():
        model.eval()(IMAGES)

def test_caught(model):
    try:
        model(IMAGES)
    except bnguard.StatsChangedError:
        pass
""",
        "--bn-frozen=raise",
        passed=2,
        failed=6,
    )
    text = str(result.stdout)
    assert text.count("was caught") == 1
    assert text.count("1 (BatchNorm2d): running_mean; mean moved") == 1
