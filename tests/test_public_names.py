"""The names of the package ``bnguard``: where classes say they are from, and what a wrong name gets."""

import pickle
import subprocess
import sys
import typing

import pytest

import bnguard
from bnguard.records import StatsChange

CLASSES = [name for name in bnguard.__all__ if isinstance(getattr(bnguard, name), type)]


@pytest.mark.parametrize("name", CLASSES)
def test_class_is_named_as_a_user_imports_it(name):
    """In tracebacks, ``repr()`` and ``help()``: ``bnguard.StatsChangedError``, not where its file is."""
    cls = getattr(bnguard, name)
    assert (cls.__module__, cls.__qualname__) == ("bnguard", name)
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_errors_and_records_pickle_into_a_process_without_torch():
    """The pickle names the class by its public name, which alone imports no torch."""
    change = StatsChange(("bn",), "BatchNorm2d", ("running_mean",), 1, None, 0.5)
    text = pickle.dumps(bnguard.StatsChangedError("why", (change,)))
    assert b"bnguard.errors" not in text
    code = (
        f"import pickle, sys\nerror = pickle.loads({text!r})\n"
        "print(repr(type(error)), error, error.changes[0].names, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "<class 'bnguard.StatsChangedError'> why ('bn',) False\n"


@pytest.mark.parametrize("name", ["StatsUpdates", "Finding", "StatsChange", "Mode"])
def test_annotations_of_records_can_be_resolved(name):
    """``typing.get_type_hints()`` looks for other records where the class says it is from."""
    code = f"import typing, bnguard; print(len(typing.get_type_hints(bnguard.{name})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(typing.get_type_hints(getattr(bnguard, name))) > 5


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("freeze", "frozen"), ("frozn", "frozen"), ("Watch", "watch"), ("StatChange", "StatsChange")],
)
def test_wrong_name_gets_a_suggestion(wrong, nearest):
    """From Python, for what is spelled like a name, and from bnguard, for what means one; once each."""
    done = subprocess.run([sys.executable, "-c", f"import bnguard; bnguard.{wrong}"], capture_output=True, text=True)
    line = f"AttributeError: module 'bnguard' has no attribute '{wrong}'. Did you mean: '{nearest}'?"
    assert done.stderr.splitlines()[-1] == line


def test_wrong_name_is_an_attribute_error_with_its_data():
    """``hasattr()`` and tools can use it."""
    with pytest.raises(AttributeError) as caught:
        _ = bnguard.no_such_name
    assert (caught.value.name, caught.value.obj) == ("no_such_name", bnguard)
    assert not hasattr(bnguard, "freeze")
