"""The marker ``bn_frozen``: which models it finds, what its options do, and what it refuses."""

import pytest

from tests.suites import Suite, block, suite

__all__ = ["suite"]


def test_marker_fails_a_test_that_updates(suite: Suite):
    """A model that a fixture brings is guarded; the message says by what."""
    result = suite.fails("@pytest.mark.bn_frozen\ndef test_it(model):\n    model(IMAGES)", failed=1)
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: 1 (BatchNorm2d) is in train mode inside @pytest.mark.bn_frozen:\n"
        "this forward would update running_mean, running_var and num_batches_tracked.\n"
        "  at test_it.py:19 in test_it\n"
        "Call eval() on it after model.train(), or choose what you meant:\n"
        "  @pytest.mark.bn_frozen(use_running_stats=True)    normalise with the frozen statistics\n"
        '  @pytest.mark.bn_frozen(on_change="restore")       normalise with the batch, keep the statistics'
    )


def test_marker_fails_a_test_that_writes(suite: Suite):
    """What no forward did fails the test at its own line, decorated or not."""
    result = suite.fails(
        """
@pytest.mark.bn_frozen
@pytest.mark.parametrize("value", [1.0])
def test_it(model, value):
    model[1].running_mean.data.add_(value)
""",
        failed=1,
    )
    assert block(result, "StatsChangedError") == (
        "bnguard.StatsChangedError: running statistics of 1 layer changed inside @pytest.mark.bn_frozen:\n"
        "  1 (BatchNorm2d): running_mean; mean moved by up to 1 standard deviations\n"
        "No forward that bnguard can see explains it: look for load_state_dict(), reset_running_stats(), assignments,\n"
        "F.batch_norm() or forward() called directly, a forward that failed, another thread or process, or a\n"
        "compiled or scripted model.\n"
        "The original statistics have been restored."
    )
    result.stdout.fnmatch_lines([">   def test_it(model, value):"])


HOLDERS = {
    "list": "[net]",
    "tuple": "(0, net)",
    "dict": "{'net': net}",
    "nested": "[{'nets': (net,)}]",
    "dataclass": "Data(net)",
    "slots": "Slots(net)",
    "object": "Plain(net)",
    "object of a list": "Plain([net])",
    "namespace": "types.SimpleNamespace(net=net)",
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_model_is_found_in(suite: Suite, holder):
    """Models reach a test in collections, dataclasses and attributes of plain objects."""
    result = suite.fails(
        f"""
import dataclasses, types

@dataclasses.dataclass
class Data:
    net: nn.Module

@dataclasses.dataclass(slots=True)
class Slots:
    net: nn.Module

class Plain:
    def __init__(self, net):
        self.net = net

net = make()

@pytest.fixture
def holder():
    return {holder}

@pytest.mark.bn_frozen
def test_it(holder):
    net(IMAGES)
""",
        failed=1,
    )
    result.stdout.fnmatch_lines(["E*StatsChangedError: 1 (BatchNorm2d) is in train mode*"])


def test_models_of_parameters_and_of_fixtures_that_fixtures_use(suite: Suite):
    """Parameters, parametrised fixtures, autouse fixtures, and what only another fixture asks for are looked at."""
    suite.fails(
        """
FIRST, SECOND, THIRD, FOURTH = make(), make(), make(), make()

@pytest.mark.bn_frozen
@pytest.mark.parametrize("net", [FIRST])
def test_parameter(net):
    net(IMAGES)

@pytest.fixture(params=[SECOND])
def made(request):
    return request.param

@pytest.mark.bn_frozen
def test_parametrised_fixture(made):
    made(IMAGES)

@pytest.fixture(scope="session")
def shared():
    return THIRD

@pytest.fixture
def predict(shared):
    return lambda: shared(IMAGES)

@pytest.mark.bn_frozen
def test_behind_a_fixture(predict):
    predict()

class TestAutouse:
    @pytest.fixture(autouse=True)
    def _set(self):
        self.net = FOURTH

    @pytest.mark.bn_frozen
    def test_attribute_of_self(self):
        self.net(IMAGES)

def test_all_are_back():
    pass
""",
        failed=4,
        passed=1,
    )


def test_marker_on_classes_and_modules(suite: Suite):
    """A marker further out holds for all tests in there; the nearest one decides."""
    suite.run(
        """
pytestmark = pytest.mark.bn_frozen

def test_module(model):
    model(IMAGES)

@pytest.mark.bn_frozen("restore")
class TestClass:
    def test_class(self, model):
        model(IMAGES)
        assert not moved(model)

    @pytest.mark.bn_frozen("warn")
    def test_nearest(self, model):
        with pytest.warns(bnguard.BNGuardWarning):
            model(IMAGES)
        assert moved(model)
""",
        failed=1,
        passed=2,
    )


def test_options_are_those_of_frozen(suite: Suite):
    """Options reach the guard; a part of a model that comes by itself as well is guarded once."""
    suite.run(
        """
@pytest.fixture
def both():
    return nn.Sequential(make(), nn.BatchNorm2d(4))

@pytest.mark.bn_frozen(use_running_stats=True)
def test_running(model):
    assert torch.equal(model.train()(IMAGES), make().eval()(IMAGES))

@pytest.mark.bn_frozen(include="1")
def test_include(both):
    both[0](IMAGES)

@pytest.mark.bn_frozen(updates=1)
def test_budget(both):
    both(IMAGES)

@pytest.mark.bn_frozen("restore", exclude="0")
def test_exclude(both):
    both(IMAGES)
    assert moved(both[0])
    assert not both[1].num_batches_tracked

@pytest.fixture
def part(both):
    return both[0]

@pytest.mark.bn_frozen("restore", updates=1)
def test_part(both, part):
    part(IMAGES)
    part(IMAGES)
    assert part[1].num_batches_tracked == 1
""",
        passed=5,
    )


def test_pattern_may_be_about_one_of_several_models(suite: Suite):
    """With several models a pattern needs to match in one of them; in none of them is an error."""
    source = """
@pytest.fixture
def named():
    net = nn.Sequential()
    net.stem = nn.BatchNorm2d(3)
    return net

@pytest.mark.bn_frozen(include="{pattern}")
def test_it(model, named):
    model(IMAGES)
"""
    suite.run(source.format(pattern="stem"), passed=1)
    suite.run(source.format(pattern="head"), failed=1).stdout.fnmatch_lines(
        ["@pytest.mark.bn_frozen: include='head' matches none of the 1 layer with running statistics; *"]
    )


NO_MODEL = (
    "@pytest.mark.bn_frozen guards the models that a test gets from its fixtures and parameters, and this test gets "
    "none: there is no torch.nn.Module among them, in their lists, tuples and dicts, or in their attributes. Inside "
    "the test, call the fixture: bn_frozen(model)"
)


def test_marker_without_a_model_fails_with_a_sentence(suite: Suite):
    """A marker that guards nothing fails the test before it runs."""
    result = suite.fails(
        "@pytest.mark.bn_frozen\ndef test_it(tmp_path, request, monkeypatch):\n    print('it ran')", failed=1
    )
    assert NO_MODEL in result.outlines
    result.stdout.no_fnmatch_line("*it ran*")


def test_model_without_statistics_is_warned_about(suite: Suite):
    """A model that has nothing to guard is no failure: it may be one of many parameters."""
    suite.run(
        """
@pytest.mark.bn_frozen
@pytest.mark.parametrize("net", [nn.Linear(2, 2)])
def test_it(net):
    net(torch.ones(1, 2))
""",
        passed=1,
    ).stdout.fnmatch_lines(["*BNGuardWarning: Linear has no layer with running statistics*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'rais'", "@pytest.mark.bn_frozen: on_change='rais': did you mean 'raise'? *"),
        ("updates=-1", "@pytest.mark.bn_frozen: updates=-1: the number of updates *"),
        (
            "use_runing_stats=True",
            "@pytest.mark.bn_frozen: unknown option 'use_runing_stats': did you mean 'use_running_stats'? *",
        ),
        ("include='backbone'", "@pytest.mark.bn_frozen: include='backbone' matches none of the 1 layer *"),
    ],
)
def test_wrong_options_fail_with_a_sentence(suite: Suite, arguments, message):
    """Options are checked as those of frozen() are."""
    result = suite.run(f"@pytest.mark.bn_frozen({arguments})\ndef test_it(model):\n    pass", failed=1)
    result.stdout.fnmatch_lines([message])


def test_test_case_is_guarded_from_the_end_of_its_set_up(suite: Suite):
    """On a ``unittest.TestCase``, models that setUp() makes are guarded; what setUp() does with them is not."""
    suite.fails(
        """
import unittest

@pytest.mark.bn_frozen
class Test(unittest.TestCase):
    def setUp(self):
        self.model = make()
        self.model(IMAGES)

    def test_updates(self):
        self.model(IMAGES)

    def test_fine(self):
        self.model.eval()(IMAGES)
        assert moved(self.model)

@pytest.mark.bn_frozen
class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.model = make()

    async def test_updates(self):
        self.model(IMAGES)

    async def test_fine(self):
        self.model.eval()(IMAGES)
""",
        failed=2,
        passed=2,
    )


def test_test_case_without_a_model_fails(suite: Suite):
    """The same sentence as for functions."""
    result = suite.fails(
        """
import unittest

@pytest.mark.bn_frozen
class Test(unittest.TestCase):
    def test_it(self):
        pass
""",
        failed=1,
    )
    assert any(NO_MODEL in line for line in result.outlines)


def test_asynchronous_tests_are_guarded(suite: Suite):
    """The marker reaches coroutines."""
    suite.fails(
        """
@pytest.mark.asyncio
@pytest.mark.bn_frozen
async def test_it(model):
    model(IMAGES)
""",
        failed=1,
    )


ODD = {
    "mock": "unittest.mock.Mock(spec=nn.Module)",
    "magic mock": "unittest.mock.MagicMock(spec=nn.Sequential)",
    "list in itself": "itself([])",
    "dict in itself": "itself({})",
    "raising list": "RaisingList([1])",
    "raising property": "RaisingData(1)",
    "no attributes": "Closed()",
    "no __dict__": "object()",
    "class": "nn.BatchNorm2d",
    "module": "torch",
}


@pytest.mark.parametrize("thing", ODD.values(), ids=ODD)
def test_what_cannot_be_looked_into_is_passed_over(suite: Suite, thing):
    """A fixture beside the model may be anything."""
    suite.run(
        f"""
import dataclasses, unittest.mock

def itself(value):
    value.append(value) if isinstance(value, list) else value.update(me=value)
    return value

class RaisingList(list):
    def __iter__(self):
        raise OSError

@dataclasses.dataclass
class RaisingData:
    field: int

    def __getattribute__(self, name):
        raise OSError(name)

    def __setattr__(self, name, value):
        pass

class Closed:
    def __getattribute__(self, name):
        raise OSError(name)

@pytest.fixture
def thing():
    return {thing}

@pytest.mark.bn_frozen("restore")
def test_it(thing, model):
    model(IMAGES)
    assert not moved(model)
""",
        passed=1,
    )


def test_models_that_are_equal_are_two(suite: Suite):
    """Each module is guarded, whatever its class says of equality."""
    suite.fails(
        """
class Equal(nn.Sequential):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

NETS = [Equal(make()), Equal(make())]

@pytest.mark.bn_frozen
@pytest.mark.parametrize("nets", [NETS])
def test_it(nets):
    nets[1](IMAGES)
""",
        failed=1,
    )


def test_models_on_the_class_are_found(suite: Suite):
    """setup_class, setUpClass and request.cls put them there; one on the instance hides none of them."""
    result = suite.fails(
        """
import unittest

@pytest.mark.bn_frozen
class TestSetup:
    @classmethod
    def setup_class(cls):
        cls.model = make()

    def setup_method(self):
        self.other = make()

    def test_it(self):
        self.model(IMAGES)

@pytest.mark.bn_frozen
class TestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = make()

    def test_it(self):
        self.model(IMAGES)
""",
        failed=2,
    )
    assert "\n".join(result.outlines).count("StatsChangedError: 1 (BatchNorm2d) is in train mode") == 2
