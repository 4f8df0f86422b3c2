"""The fixture ``bn_frozen``: from its call to the end of the test, and what pytest then says."""

import pytest

from tests.suites import Suite, block, suite

__all__ = ["suite"]

# pytest cannot rewrite the assertions of a package that these tests have imported before.
_OWN_CASE = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def test_fixture_lets_a_test_pass_that_moves_nothing(suite: Suite):
    """An evaluation in eval mode passes."""
    suite.run("def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model.eval()(IMAGES)", passed=1)


def test_fixture_fails_the_test_at_the_users_line(suite: Suite):
    """An update fails the test from inside the forward; nothing of torch or bnguard is in the traceback."""
    result = suite.fails("def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model(IMAGES)", failed=1)
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: 1 (BatchNorm2d) is in train mode inside bn_frozen():\n"
        "this forward would update running_mean, running_var and num_batches_tracked.\n"
        "  at test_it.py:19 in test_it\n"
        "Call eval() on it after model.train(), or choose what you meant:\n"
        "  bn_frozen(model, use_running_stats=True)    normalise with the frozen statistics\n"
        '  bn_frozen(model, on_change="restore")       normalise with the batch, keep the statistics'
    )
    result.stdout.fnmatch_lines([">       model(IMAGES)", "test_it.py:19: StatsChangedError"])
    result.stdout.no_fnmatch_line("*_call_impl*")
    result.stdout.no_fnmatch_line("*_sentry.py*")


def test_full_trace_shows_everything(suite: Suite):
    """With --full-trace the traceback is whole."""
    source = "def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model(IMAGES)"
    suite.fails(source, "--full-trace", failed=1).stdout.fnmatch_lines(["*_call_impl*"])


def test_swallowed_error_fails_the_test(suite: Suite):
    """A test that catches the error fails all the same, at its first line."""
    result = suite.fails(
        """
def test_it(model, bn_frozen):
    bn_frozen(model)
    try:
        model(IMAGES)
    except Exception:
        pass
""",
        failed=1,
    )
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: 1 layer would have updated inside bn_frozen(), "
        "and the StatsChangedError that said so was caught:\n"
        "  1 (BatchNorm2d): running_mean, running_var and num_batches_tracked; "
        "1 update stopped at test_it.py:21 in test_it\n"
        "The updates did not happen. Let the error through, or use on_change='restore' where they are expected."
    )
    result.stdout.fnmatch_lines([">   def test_it(model, bn_frozen):", "test_it.py:18: StatsChangedError"])


def test_change_without_a_forward_fails_the_test_and_not_its_teardown(suite: Suite):
    """What only the comparison at the end sees fails the call phase."""
    result = suite.fails(
        "def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model[1].running_mean.data.add_(1)", failed=1
    )
    assert block(result, "StatsChangedError").startswith(
        "bnguard.StatsChangedError: running statistics of 1 layer changed inside bn_frozen():\n"
        "  1 (BatchNorm2d): running_mean; mean moved by up to 1 standard deviations\n"
    )


@pytest.mark.parametrize("way", ["assert 1 == 2", "pytest.fail('mine')", "pytest.fail('mine', pytrace=False)"])
def test_both_failures_are_shown(suite: Suite, way):
    """A test that fails for a reason of its own shows that, and the finding."""
    source = f"def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model[1].running_mean.data.add_(1)\n    {way}"
    result = suite.run(source, failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*" if "assert" in way else "*mine*"])
    result.stdout.fnmatch_lines(["*bnguard: running statistics of 1 layer changed inside bn_frozen():"])


@pytest.mark.parametrize("way", ["pytest.skip('later')", "pytest.xfail('known')"])
def test_skip_in_the_middle_hides_nothing(suite: Suite, way):
    """A test that skips itself after a change has failed."""
    source = f"def test_it(model, bn_frozen):\n    bn_frozen(model)\n    model[1].running_mean.data.add_(1)\n    {way}"
    suite.run(source, failed=1).stdout.fnmatch_lines(["E   bnguard.StatsChangedError: running statistics*"])
    suite.run(source.replace(".data.add_(1)", ""), **{"skipped" if "skip" in way else "xfailed": 1})


def test_expected_error_counts_as_expected(suite: Suite):
    """xfail(raises=...) knows the error, at a forward and at the end."""
    suite.run(
        """
@pytest.mark.xfail(raises=bnguard.StatsChangedError, strict=True)
@pytest.mark.parametrize("end", [False, True])
def test_it(model, bn_frozen, end):
    bn_frozen(model)
    model[1].running_mean.data.add_(1) if end else model(IMAGES)
""",
        xfailed=2,
    )


def test_statistics_are_back_for_the_next_test(suite: Suite):
    """A model that several tests share is as it was, whatever the first of them did."""
    suite.run(
        """
@pytest.fixture(scope="module")
def shared():
    return make()

def test_first(shared, bn_frozen):
    bn_frozen(shared)
    shared[1].running_mean.data.add_(1)

def test_second(shared):
    assert not moved(shared)
    assert not shared[1]._forward_pre_hooks
    shared(IMAGES)
    assert moved(shared)
""",
        failed=1,
        passed=1,
    )


def test_with_block_is_narrower(suite: Suite):
    """In a ``with`` block the guard ends with it; an expected error can be caught around it."""
    suite.run(
        """
def test_passes(model, bn_frozen):
    with bn_frozen(model) as guard:
        model.eval()(IMAGES)
    assert isinstance(guard, bnguard.frozen)
    model.train()(IMAGES)
    assert moved(model)

def test_expected(model, bn_frozen):
    with pytest.raises(bnguard.StatsChangedError), bn_frozen(model):
        model(IMAGES)
    model(IMAGES)
    assert moved(model)

def test_again(model, bn_frozen):
    guard = bn_frozen(model, "restore")
    with guard:
        model(IMAGES)
    assert not moved(model)
    with guard:
        model(IMAGES)
    assert not moved(model)

def test_stopped(model, bn_frozen):
    guard = bn_frozen(model)
    guard.stop()
    model(IMAGES)
    assert moved(model)

def test_decorates(model, bn_frozen):
    @bn_frozen(model, "restore")
    def step():
        model(IMAGES)
    step()
    step()
    assert not moved(model)
""",
        passed=5,
    )


def test_with_block_fails_inside_the_test(suite: Suite):
    """A change inside the ``with`` block is raised at its end."""
    result = suite.fails(
        "def test_it(model, bn_frozen):\n    with bn_frozen(model):\n        model[1].running_mean.data.add_(1)",
        failed=1,
    )
    result.stdout.fnmatch_lines([">       with bn_frozen(model):"])


def test_every_option_of_frozen_is_taken(suite: Suite):
    """The options do what they do in frozen(), and wrong ones are refused as there."""
    suite.run(
        """
def test_restore(model, bn_frozen):
    assert model(IMAGES).shape
    before = model[1].running_mean.clone()
    bn_frozen(model, "restore")
    model(IMAGES)
    assert torch.equal(model[1].running_mean, before)

def test_running(model, bn_frozen):
    expected = make().eval()(IMAGES)
    bn_frozen(model, use_running_stats=True)
    assert torch.equal(model.train()(IMAGES), expected)

def test_affine(model, bn_frozen):
    bn_frozen(model, "restore", affine=True)
    model(IMAGES).sum().backward()
    assert model[1].weight.grad is None

def test_updates(model, bn_frozen):
    bn_frozen(model, updates=1)
    model(IMAGES)

def test_include(model, bn_frozen):
    both = nn.Sequential(model, nn.BatchNorm2d(4))
    bn_frozen(both, include="1")
    model(IMAGES)
    bn_frozen(both, exclude="0")
    model(IMAGES)

def test_refused(model, bn_frozen):
    with pytest.raises(ValueError, match="did you mean 'raise'"):
        bn_frozen(model, "rais")
    with pytest.raises(TypeError, match="takes a torch.nn.Module"):
        bn_frozen([])
    with pytest.raises(ValueError, match="matches none"):
        bn_frozen(model, include="backbone")
    model(IMAGES)
""",
        passed=6,
    )


def test_budget_that_is_spent_fails_the_test(suite: Suite):
    """The message of a second update names the fixture and its budget."""
    result = suite.fails(
        "def test_it(model, bn_frozen):\n    bn_frozen(model, updates=1)\n    model(IMAGES)\n    model(IMAGES)",
        failed=1,
    )
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: 1 (BatchNorm2d) has updated once inside bn_frozen(updates=1):\n"
        "this forward would update running_mean, running_var and num_batches_tracked once more.\n"
        "  at test_it.py:20 in test_it\n"
        "A step should update each layer once: run the batches through the model in one forward, or\n"
        '  bn_frozen(model, on_change="restore", updates=1)    let the first one update, not the rest'
    )


def test_several_models_in_one_test(suite: Suite):
    """Each model has its guard; findings about both are shown."""
    result = suite.fails(
        """
def test_it(model, bn_frozen):
    other = make()
    bn_frozen(model), bn_frozen(other)
    model[1].running_mean.data.add_(1)
    other[1].running_var.data.add_(1)
""",
        failed=1,
    )
    text = block(result, "StatsChangedError")
    assert "  1 (BatchNorm2d): running_var\n" in text
    assert "bnguard: running statistics of 1 layer changed inside bn_frozen():\n" in text
    assert "  1 (BatchNorm2d): running_mean; mean moved by up to 1 standard deviations\n" in text


def test_warning_points_at_the_test(suite: Suite):
    """Under ``"warn"`` the test passes, the change stands, and the warning names the user's line or the test."""
    result = suite.run(
        """
@pytest.fixture(scope="module")
def shared():
    return make()

def test_forward(shared, bn_frozen):
    bn_frozen(shared, "warn")
    shared(IMAGES)

def test_stands(shared, bn_frozen):
    assert moved(shared)
    bn_frozen(shared, "warn")
    shared[1].running_mean.data.add_(1)
""",
        passed=2,
    )
    text = "\n".join(result.outlines)
    assert "/test_it.py:24: BNGuardWarning: 1 (BatchNorm2d) is in train mode inside bn_frozen() and" in text
    assert "test_it.py:26: BNGuardWarning: running statistics of 1 layer changed inside bn_frozen():" in text
    suite.again("-W", "error", *_OWN_CASE, failed=2)


def test_guard_from_another_fixture(suite: Suite):
    """A fixture that guards its model guards it until the end of the test, through setup and call."""
    suite.fails(
        """
@pytest.fixture
def guarded(model, bn_frozen):
    bn_frozen(model)
    yield model
    model(IMAGES)  # after the test: nobody minds

def test_it(guarded):
    guarded(IMAGES)

def test_other(guarded):
    guarded.eval()(IMAGES)
""",
        failed=1,
        passed=1,
    )


def test_setup_that_fails_leaves_nothing(suite: Suite):
    """A guard that a failing setup has opened is closed, and what it found is shown."""
    result = suite.run(
        """
MODEL = make()

@pytest.fixture
def broken(bn_frozen):
    bn_frozen(MODEL)
    MODEL[1].running_mean.data.add_(1)
    raise OSError("no data")

def test_it(broken):
    pass

def test_next():
    assert not moved(MODEL)
    assert "__getstate__" not in MODEL[1].__dict__
""",
        errors=1,
        passed=1,
    )
    result.stdout.fnmatch_lines(["E*OSError: no data", "E*bnguard: running statistics of 1 layer changed*"])


def test_setup_that_skips_hides_nothing(suite: Suite):
    """A change in a setup that then skips is an error of the setup."""
    source = """
@pytest.fixture
def skips(model, bn_frozen):
    bn_frozen(model)
    model[1].running_mean.data.add_(1)
    pytest.skip("no data")

def test_it(skips):
    pass
"""
    result = suite.run(source, "--bn-report", errors=1)
    result.stdout.fnmatch_lines(["E*StatsChangedError: running statistics of 1 layer changed inside bn_frozen():"])
    result.stdout.fnmatch_lines(["1 test moved running statistics."])
    suite.run(source.replace(".data.add_(1)", ""), skipped=1)


def test_call_after_the_test_is_refused(suite: Suite):
    """In a teardown it is too late to guard."""
    result = suite.run(
        """
@pytest.fixture
def late(model, bn_frozen):
    yield
    bn_frozen(model)

def test_it(late):
    pass
""",
        passed=1,
        errors=1,
    )
    result.stdout.fnmatch_lines(
        ["E*BNGuardError: bn_frozen() guards a model until its test ends, and this test has ended:*"]
    )


def test_setup_only_leaves_nothing(suite: Suite):
    """With --setup-only no test runs, and guards of fixtures end with the fixture."""
    suite.run(
        """
MODEL = make()

@pytest.fixture
def guarded(bn_frozen):
    bn_frozen(MODEL)

def test_it(guarded):
    pass

@pytest.fixture
def later():
    assert "__getstate__" not in MODEL[1].__dict__

def test_later(later):
    pass
""",
        "--setup-only",
    )


def test_guard_lasts_over_a_coroutine(suite: Suite):
    """Asynchronous tests of pytest-asyncio and anyio are guarded to their end."""
    suite.fails(
        """
import asyncio

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.asyncio
async def test_asyncio(model, bn_frozen):
    bn_frozen(model)
    await asyncio.sleep(0)
    model(IMAGES)

@pytest.mark.anyio
async def test_anyio(model, bn_frozen):
    bn_frozen(model)
    await asyncio.sleep(0)
    model(IMAGES)

@pytest.mark.asyncio
async def test_swallowed(model, bn_frozen):
    bn_frozen(model)
    await asyncio.sleep(0)
    model[1].running_mean.data.add_(1)
""",
        failed=3,
    )


def test_fixture_in_a_test_case(suite: Suite):
    """A ``unittest.TestCase`` gets at the fixture as pytest says; both its failure and the finding are shown."""
    result = suite.run(
        """
import unittest

class Test(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _guarded(self, bn_frozen):
        self.model = make()
        bn_frozen(self.model)

    def test_forward(self):
        self.model(IMAGES)

    def test_end(self):
        self.model[1].running_mean.data.add_(1)

    def test_both(self):
        self.model[1].running_mean.data.add_(1)
        self.assertEqual(1, 2)

    def test_skips(self):
        self.model[1].running_mean.data.add_(1)
        self.skipTest("later")

    def test_fine(self):
        self.model.eval()(IMAGES)
""",
        failed=4,
        passed=1,
    )
    text = "\n".join(result.outlines)
    assert "E       AssertionError: 1 != 2\nE       bnguard: running statistics of 1 layer changed" in text
    assert text.count("E   bnguard.StatsChangedError: running statistics of 1 layer changed") == 2


@pytest.mark.slow
def test_errors_cross_processes(suite: Suite):
    """Under pytest-xdist errors, warnings and notes arrive."""
    result = suite.run(
        """
def test_forward(model, bn_frozen):
    bn_frozen(model)
    model(IMAGES)

def test_warned(model, bn_frozen):
    bn_frozen(model, "warn")
    model(IMAGES)
""",
        "-n2",
        failed=1,
        passed=1,
    )
    result.stdout.fnmatch_lines(["E*StatsChangedError: 1 (BatchNorm2d) is in train mode inside bn_frozen():"])
    result.stdout.fnmatch_lines(["*BNGuardWarning: 1 (BatchNorm2d) is in train mode inside bn_frozen()*"])


def test_test_that_is_run_again_begins_anew(suite: Suite):
    """Plugins that run a failed test again get a test with guards of its own each time."""
    suite.pytester.makeconftest("""
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            item.ihook.pytest_runtest_logreport(report=report)
    return True
""")
    suite.run(
        """
RUNS = []

def test_it(model, bn_frozen):
    bn_frozen(model)
    RUNS.append(model)
    model.train(len(RUNS) == 1)(IMAGES)
""",
        "--bn-report",
        failed=1,
        passed=1,
    )


def test_strict_suite_without_the_fixture(suite: Suite):
    """The plugin brings no warning and no unknown marker into a strict suite."""
    source = "@pytest.mark.bn_updates\ndef test_it(model):\n    model(IMAGES)"
    suite.run(source, "--strict-markers", "--strict-config", "-W", "error", *_OWN_CASE, passed=1)


def test_guard_that_is_stopped_twice_is_reported_once(suite: Suite):
    """The second ``stop()`` ends no block, and adds nothing to the report."""
    source = """
def test_it(model, bn_frozen):
    guard = bn_frozen(model, "warn")
    with pytest.warns(bnguard.BNGuardWarning):
        model(IMAGES)
    guard.stop()
    guard.stop()
"""
    result = suite.run(source, "--bn-report", passed=1)
    result.stdout.fnmatch_lines(["1 test moved running statistics: 1 update."])
