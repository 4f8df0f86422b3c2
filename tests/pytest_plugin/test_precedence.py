"""Precedence, highest first: the fixture, the marker, the command line, the configuration file.

Each policy shows in what a train-mode forward does: ``raise`` stops it, ``warn`` keeps the update and warns,
``restore`` keeps the statistics without a warning, ``off`` keeps the update without a warning. The switch warns after
the test only.
"""

import pytest

from tests.suites import Suite, suite

__all__ = ["suite"]

SOURCE = """
import warnings

{mark}
def test_it(model, bn_frozen):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        {call}
        try:
            model(IMAGES)
            did = "stood" if moved(model) else "restored"
        except bnguard.StatsChangedError as error:
            did = "stopped"
            raise
        finally:
            did += "".join([" warned" for record in caught if record.category is bnguard.BNGuardWarning])
            print("did", did)
"""

DID = {"raise": "stopped", "warn": "stood warned", "restore": "restored", "off": "stood", "updates": "stood"}


def what_happens(suite, *, call=None, mark=None, line=None, ini=None):
    """Runs the test with a policy at each place; returns what became of its forward."""
    marks = {None: "", "updates": "@pytest.mark.bn_updates('trains')"}
    suite.ini(*([f"bn_frozen = {ini}"] if ini else []))
    source = SOURCE.format(
        mark=marks.get(mark, f"@pytest.mark.bn_frozen({mark!r})"),
        call=f"bn_frozen(model, {call!r})" if call else "pass",
    )
    ends = "stopped" if DID[call or mark or line or ini or "off"] == "stopped" else "passed"
    result = suite.run(source, "-s", *([f"--bn-frozen={line}"] if line else []), **{ENDS[ends]: 1})
    did = next(text.partition("did ")[2] for text in result.outlines if text.startswith("did ") or " did " in text)
    return did + " warned" * any(": BNGuardWarning: " in text for text in result.outlines)


ENDS = {"stopped": "failed", "passed": "passed"}
PLACES = ("call", "mark", "line", "ini")
POLICIES = {
    "call": ("raise", "warn", "restore"),
    "mark": ("raise", "warn", "restore", "updates"),
    "line": ("raise", "warn", "off"),
    "ini": ("raise", "warn"),
}
PAIRS = [
    (near, first, far, second)
    for position, near in enumerate(PLACES)
    for far in PLACES[position + 1 :]
    for first in POLICIES[near]
    for second in POLICIES[far]
    if first != second
]


@pytest.mark.parametrize(("near", "first", "far", "second"), PAIRS)
def test_nearer_place_decides(suite: Suite, near, first, far, second):
    """With a policy at two places, what happens is what the nearer one says, and nothing of the other."""
    assert what_happens(suite, **{near: first, far: second}) == DID[first]


@pytest.mark.parametrize(("where", "policy"), [(where, policy) for where in PLACES for policy in POLICIES[where]])
def test_one_place_alone_decides(suite: Suite, where, policy):
    """The same policies at one place: what happens is not what no policy does."""
    assert what_happens(suite, **{where: policy}) == DID[policy]


def test_all_places_at_once(suite: Suite):
    """The fixture wins against all three."""
    assert what_happens(suite, call="warn", mark="raise", line="raise", ini="raise") == "stood warned"


def test_marker_decides_again_after_a_narrower_block(suite: Suite):
    """What a ``with`` block of the fixture had is the marker's again afterwards, and so with the suite's switch."""
    source = """
{mark}
def test_it(model, bn_frozen):
    with pytest.warns(bnguard.BNGuardWarning), bn_frozen(model, "warn"):
        model(IMAGES)
    assert moved(model)
    with bn_frozen(model, "restore"):
        model(IMAGES)
    assert model[1].num_batches_tracked == 1
    model(IMAGES)
"""
    result = suite.run(source.format(mark="@pytest.mark.bn_frozen"), failed=1)
    result.stdout.fnmatch_lines(["E*in train mode inside @pytest.mark.bn_frozen:", "E*at test_it.py:26 in test_it"])
    result = suite.run(source.format(mark=""), "--bn-frozen=raise", failed=1)
    result.stdout.fnmatch_lines(["E*in train mode inside --bn-frozen=raise:", "E*at test_it.py:26 in test_it"])


def test_place_decides_about_its_own_layers_only(suite: Suite):
    """A fixture's guard of a part leaves the rest to the marker, and the marker's models leave others to the switch."""
    source = """
@pytest.fixture
def net():
    return nn.Sequential(make(), nn.BatchNorm2d(4))

@pytest.mark.bn_frozen("restore")
def test_it(net, bn_frozen):
    bn_frozen(net[0], "warn")
    with pytest.warns(bnguard.BNGuardWarning):
        net(IMAGES)
    assert moved(net[0])
    assert not net[1].num_batches_tracked
    other = make()
    other(IMAGES)
"""
    result = suite.run(source, "--bn-frozen=raise", failed=1)
    result.stdout.fnmatch_lines(["E*in train mode inside --bn-frozen=raise:", "E*at test_it.py:30 in test_it"])
    suite.again(passed=1)


def test_change_before_a_nearer_guard_is_the_others(suite: Suite):
    """What happened before the fixture was called is judged by whoever was there then."""
    source = """
@pytest.mark.bn_frozen
def test_it(model, bn_frozen):
    model[1].running_mean.data.add_(1)
    bn_frozen(model, "warn")
    assert not moved(model)
"""
    result = suite.run(source, failed=1)
    result.stdout.fnmatch_lines(["E*running statistics of 1 layer changed inside @pytest.mark.bn_frozen:"])


def test_guard_in_the_test_is_nearer_than_all(suite: Suite):
    """A block in the test's own code decides inside of it, as nested blocks do: nothing stands, nothing is told."""
    source = """
def test_it(model):
    with bnguard.frozen(model, "restore"):
        model(IMAGES)
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(model):
        model(IMAGES)
    assert not moved(model)

@pytest.mark.bn_frozen
def test_marked(model):
    with bnguard.frozen(model, "restore"):
        model(IMAGES)

def test_fixture(model, bn_frozen):
    bn_frozen(model)
    with bnguard.frozen(model, "restore"):
        model(IMAGES)
"""
    suite.run(source, "--bn-frozen=raise", "-W", "error::bnguard.BNGuardWarning", passed=3)


def test_nearest_of_two_markers_decides(suite: Suite):
    """Between function, class and module; a marker that allows and one that forbids are compared by place alone."""
    suite.run(
        """
pytestmark = pytest.mark.bn_updates("trains throughout")

def test_module(model):
    model(IMAGES)

@pytest.mark.bn_frozen
def test_function(model):
    model(IMAGES)

@pytest.mark.bn_frozen
class TestClass:
    def test_class(self, model):
        model(IMAGES)

    @pytest.mark.bn_updates
    def test_inner(self, model):
        model(IMAGES)
""",
        "--bn-frozen=raise",
        passed=2,
        failed=2,
    )


def test_markers_that_contradict_each_other_fail_with_a_sentence(suite: Suite):
    """At one place there cannot be both."""
    result = suite.run(
        "@pytest.mark.bn_frozen\n@pytest.mark.bn_updates\ndef test_it(model):\n    model(IMAGES)", failed=1
    )
    assert (
        "bn_frozen and bn_updates contradict each other here: keep one of the two markers, or move the one that holds "
        "for fewer tests nearer to them"
    ) in result.outlines


@pytest.mark.parametrize("arguments", ["1", "'a', 'b'", "why='a'"])
def test_reason_is_one_string(suite: Suite, arguments):
    """bn_updates takes a reason and nothing else."""
    result = suite.run(f"@pytest.mark.bn_updates({arguments})\ndef test_it(model):\n    model(IMAGES)", failed=1)
    result.stdout.fnmatch_lines(["bn_updates takes one reason, as in @pytest.mark.bn_updates('trains'), got *"])


def test_fixture_guards_a_test_that_may_update(suite: Suite):
    """A call is nearer than bn_updates too: its model may not."""
    source = """
@pytest.mark.bn_updates("trains the student")
def test_it(model, bn_frozen):
    teacher = make()
    bn_frozen(teacher)
    model(IMAGES)
    teacher(IMAGES)
"""
    suite.run(source, "--bn-frozen=raise", failed=1).stdout.fnmatch_lines(["E*at test_it.py:23 in test_it"])


def test_marker_on_a_parameter_is_nearest(suite: Suite):
    """A mark on one of several parameters is nearer than one on the function."""
    source = """
@pytest.mark.bn_frozen
@pytest.mark.parametrize("mode", ["eval", "train", pytest.param("train", marks=pytest.mark.bn_updates("it trains"))])
def test_it(model, mode):
    getattr(model, mode)()(IMAGES)
"""
    suite.run(source, passed=2, failed=1)


def test_guard_of_the_fixture_can_be_used_again(suite: Suite):
    """Whenever a guard that the fixture returned is open, it is the nearest, and the end of the test closes it."""
    source = """
@pytest.fixture(scope="module")
def shared():
    return make()

@pytest.mark.bn_frozen
def test_with(shared, bn_frozen):
    guard = bn_frozen(shared, "warn")
    for _ in range(3):
        with pytest.warns(bnguard.BNGuardWarning), guard:
            shared(IMAGES)
    assert shared[1].num_batches_tracked == 3

def test_start(shared, bn_frozen):
    guard = bn_frozen(shared, "restore")
    guard.stop()
    guard.start()
    shared(IMAGES)

def test_nothing_is_left(shared):
    assert not shared[1]._forward_pre_hooks
    assert "forward" not in shared[1].__dict__
    assert shared[1].num_batches_tracked == 3
"""
    suite.run(source, passed=3)
