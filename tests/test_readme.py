"""The README: its code runs, its error is a real one, and what it names exists."""

import inspect
import re
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import bnguard
from bnguard.findings.codes import CODES
from bnguard.integrations._phase import RunOptions
from tests import forks
from tests.readme import IMPORTS, LOOPS, PASTED, README, RECIPES, SECTIONS, code
from tests.suites import suite

__all__ = ["suite"]

ROOT = Path(__file__).parents[1]
(SCRIPT,) = code(SECTIONS[""])
(ERROR,) = code(SECTIONS[""], "text")
PREAMBLE, *EXAMPLES = code(SECTIONS["Quickstart"])
(SUITE,) = [example for example in EXAMPLES if example.startswith("# test_model.py\n")]
EXAMPLES.remove(SUITE)


def run_example(example, names):
    """Runs one block after the preamble; an example of ``warn`` may warn, of bnguard's category only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        exec(compile(example, "README.md", "exec"), names)


def test_error_is_the_one_that_the_script_gives(tmp_path):
    """The first block, run as a file, ends with the error that the README shows, to the letter."""
    (tmp_path / "finetune.py").write_text(SCRIPT)
    done = forks.run("finetune.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(ERROR)
    lineno = next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if "head(backbone(" in line)
    assert f'finetune.py", line {lineno}, in train_step' in done.stderr


def test_script_passes_with_what_the_error_advises(tmp_path):
    """Each way out that the error names lets the script run to its end."""
    advised = re.findall(r"frozen\(model, ([^)]*)\)", ERROR)
    assert len(advised) == 2
    for option in advised:
        script = SCRIPT.replace("bnguard.frozen(backbone)", f"bnguard.frozen(backbone, {option})")
        assert script != SCRIPT
        run_example(script, {})


def test_examples_run():
    """The blocks of the quickstart run one after the other, with the preamble that they share."""
    names = {}
    run_example(PREAMBLE, names)
    assert len(EXAMPLES) >= 4
    for example in EXAMPLES:
        run_example(example, names)


def test_no_block_is_left_out():
    """Each block of Python is run: here, by ``test_recipes.py``, or by the tests of a library whose loop it is for."""
    pasted = [block for pair in PASTED.values() for block in (pair.before, pair.now)]
    run = [SCRIPT, PREAMBLE, *EXAMPLES, SUITE, IMPORTS, *RECIPES.values(), *pasted, *chain(*LOOPS.values())]
    assert sorted(run) == sorted(code(README))


@pytest.mark.parametrize("switches", [(), ("--bn-report",), ("-W", "error", "--strict-markers")])
def test_suite_passes(suite, switches):
    """The complete file passes as it stands."""
    suite.pytester.makepyfile(test_model=SUITE)
    suite.again(*switches, *REWRITTEN, passed=6)


def test_suite_passes_while_everything_is_watched(suite):
    """Under the switch the one test that trains beside its guard, without saying why, fails, and no other."""
    suite.pytester.makepyfile(test_model=SUITE)
    result = suite.again("--bn-frozen=raise", *REWRITTEN, passed=5, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_model.py::test_what_moves_and_what_does_not *"])


def test_tests_of_the_suite_fail_where_they_should(suite):
    """They are tests: a validation in train mode fails three of them, a second forward in the step one."""
    suite.pytester.makepyfile(test_model=SUITE.replace("    model.eval()\n", "    model.train()\n"))
    result = suite.again(*REWRITTEN, passed=3, failed=3)
    result.stdout.fnmatch_lines(["E*StatsChangedError: bn1 (BatchNorm2d) is in train mode inside bn_frozen():"])
    suite.pytester.makepyfile(test_model=SUITE.replace("model(IMAGES).sum()", "(model(IMAGES) + model(IMAGES)).sum()"))
    result = suite.again(*REWRITTEN, passed=5, failed=1)
    result.stdout.fnmatch_lines(["E*bn1 (BatchNorm2d) has updated once inside @pytest.mark.bn_frozen(updates=1):"])


# pytest cannot rewrite the assertions of a package that this process has imported.
REWRITTEN = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def test_calls_in_the_text_are_valid():
    """Every call of ``frozen`` in the text is one that it takes."""
    model = nn.Sequential()
    model.stem = nn.BatchNorm2d(2)
    model.layer1 = nn.BatchNorm2d(2)
    calls = re.findall(r"`(?:bnguard\.)?(frozen\(\w+(?:, [^`]*)?\))`", README)
    assert len(calls) >= 8
    names = dict.fromkeys(("model", "backbone", "discriminator", "teacher"), model)
    for call in calls:
        eval(call, {"frozen": bnguard.frozen, **names})


def test_options_in_the_text_exist():
    """Every option that the README writes is one of ``frozen``, ``strict``, a callback, or a function of torch."""
    own = (bnguard.frozen, bnguard.strict, bnguard.watch, bnguard.recalibrate)
    functions = (*own, torch.compile, torch.jit.trace, nn.BatchNorm2d, DDP)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= set(RunOptions.__annotations__)
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    options = set(re.findall(r"`(\w+)=[^`]*`", prose))
    assert options
    assert options <= known


def test_every_finding_is_listed():
    """The table has each code once, in order."""
    assert re.findall(r"^\| (BN\d+) \|", README, re.M) == list(CODES)


def test_links_lead_to_files():
    """Every relative link has its file."""
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
