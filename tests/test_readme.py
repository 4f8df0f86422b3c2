"""The README and the pages of ``docs/``: their code runs, the error is a real one, and what they name exists."""

import html
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
from benchmarks import transcript
from bnguard.findings.codes import CODES
from bnguard.integrations._phase import RunOptions
from docs import pages
from tests import forks
from tests.readme import LOOPS, PAGES, README, code, is_suite
from tests.suites import suite

__all__ = ["suite"]

ROOT = Path(__file__).parents[1]
LOOPS_PAGE = "docs/guides/trainers.md"  # its blocks are run by tests/integrations
ELSEWHERE = ("README.md", LOOPS_PAGE)
LANGUAGES = {
    "python", "sh", "text", "toml", "{toctree}", "{eval-rst}", "{raw} html",
    "{figure} ../benchmarks/results/finetune-light.svg", "{figure} ../benchmarks/results/finetune-dark.svg",
}  # fmt: skip
PROSE = {path: re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S) for path, text in PAGES.items()}
SCRIPT = code(README)[0]
ERROR = transcript.ERROR.read_text(encoding="utf-8")
SUITES = {path: [block for block in code(text) if is_suite(block)] for path, text in PAGES.items()}
(SUITE,) = SUITES["docs/guides/testing.md"]


def run_page(blocks, names, path):
    """Runs blocks one after the other, sharing names; an example of ``warn`` may warn, of bnguard's category only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        for block in blocks:
            exec(compile(block, path, "exec"), names)


def test_error_is_the_one_that_the_script_gives(tmp_path):
    """The first block, run as a file, ends with the error that the picture shows, to the letter."""
    (tmp_path / "finetune.py").write_text(SCRIPT)
    done = forks.run("finetune.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(ERROR)
    lineno = next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if "head(backbone(" in line)
    assert f'finetune.py", line {lineno}, in train_step' in done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_picture_of_the_error_has_its_text(scheme):
    """Light and dark, as the README and the quickstart show them; the text for screen readers is the error's, too."""
    picture = (ROOT / f"benchmarks/results/finetune-{scheme}.svg").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<[^>]+>", "", picture)).replace("\N{NO-BREAK SPACE}", " ")
    for line in ERROR.splitlines():
        assert line in shown
    assert f"benchmarks/results/finetune-{scheme}.svg" in README
    assert f"../benchmarks/results/finetune-{scheme}.svg" in PAGES["docs/quickstart.md"]
    (alt,) = re.findall(r'alt="([^"]*)"', README)
    assert re.fullmatch(rf"bnguard\.(errors\.)?{re.escape(alt)}", " ".join(" ".join(ERROR.splitlines()[:3]).split()))


def test_script_passes_with_what_the_error_advises(tmp_path):
    """Each way out that the error names lets the script run to its end."""
    advised = re.findall(r"frozen\(model, ([^)]*)\)", ERROR)
    assert len(advised) == 2
    for option in advised:
        script = SCRIPT.replace("bnguard.frozen(backbone)", f"bnguard.frozen(backbone, {option})")
        assert script != SCRIPT
        run_page([script], {}, "finetune.py")


def test_readme_is_short():
    """What needs more room has a page of its own."""
    assert len(README.splitlines()) <= 250


def test_examples_of_the_readme_run():
    """After the script, which raises, the other blocks run one after the other."""
    names = {}
    with pytest.raises(bnguard.StatsChangedError):
        run_page([SCRIPT], names, "README.md")
    run_page([block for block in code(README)[1:] if not is_suite(block)], names, "README.md")


@pytest.mark.parametrize(
    "path", [path for path in PAGES if path not in ("README.md", LOOPS_PAGE) and code(PAGES[path])]
)
def test_examples_of_a_page_run(path, tmp_path, monkeypatch):
    """All blocks run one after the other, and share what they define."""
    monkeypatch.chdir(tmp_path)
    run_page([block for block in code(PAGES[path]) if not is_suite(block)], {"__name__": "__main__"}, path)


def test_no_block_is_left_out():
    """Every block of Python is marked as one, and those that are not run here are run by the tests of a library."""
    assert sorted(chain(*LOOPS.values())) == sorted(code(PAGES[LOOPS_PAGE]))
    for path, text in PAGES.items():
        fences = re.findall(r"^ *```(.*)$", text, re.M)
        assert set(fences[::2]) <= LANGUAGES, path
        assert not any(fences[1::2]), path


@pytest.mark.parametrize("path", [path for path, suites in SUITES.items() if suites])
def test_suite_of_a_page_passes(suite, path):
    """A complete file for pytest passes as it stands."""
    (block,) = SUITES[path]
    suite.pytester.makepyfile(test_model=block)
    suite.again(*REWRITTEN, passed=block.count("\ndef test_"))


@pytest.mark.parametrize("switches", [(), ("--bn-report",), ("-W", "error", "--strict-markers")])
def test_suite_passes(suite, switches):
    """The complete file passes as it stands."""
    suite.pytester.makepyfile(test_model=SUITE)
    suite.again(*switches, *REWRITTEN, passed=6)


def test_suite_passes_while_everything_is_watched(suite):
    """Under the switch the one test that trains beside its guard, without saying why, fails, and no other."""
    suite.pytester.makepyfile(test_model=SUITE)
    result = suite.again("--bn-frozen=raise", *REWRITTEN, passed=5, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_model.py::test_training_updates_and_validation_does_not *"])


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
    calls = re.findall(r"`(?:bnguard\.)?(frozen\(\w+(?:, [^`]*)?\))`", "".join(PAGES.values()))
    assert len(calls) >= 20
    names = dict.fromkeys(("model", "backbone", "discriminator", "teacher"), model)
    for call in calls:
        eval(call, {"frozen": bnguard.frozen, **names})


def test_options_in_the_text_exist():
    """Every option in the text is one of ``frozen``, ``strict``, a callback, or a function of torch."""
    own = (bnguard.frozen, bnguard.strict, bnguard.watch, bnguard.recalibrate, bnguard.register_layer)
    functions = (*own, torch.compile, torch.jit.trace, nn.BatchNorm2d, DDP)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= set(RunOptions.__annotations__)
    for path, prose in PROSE.items():
        options = set(re.findall(r"`(\w+)=[^`]*`", prose))
        assert options <= known | {"context_fn"}, path


def test_every_finding_is_listed():
    """The table has each code once, in order."""
    assert re.findall(r"^\| \[(BN\d+)\]\(bn\d+\.md\) \|", PAGES["docs/findings/index.md"], re.M) == list(CODES)


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_files(path):
    """Every relative link has its file, or its page that the build makes."""
    made = {(ROOT / "docs" / page).resolve() for page in pages.made()}
    for target in re.findall(r"\]\((?!http)([^)#]+)", PROSE[path]):
        file = ((ROOT / path).parent / target).resolve()
        assert file.is_file() or file in made, target


def test_every_page_is_linked_from_the_readme_or_the_index():
    """No page is lost."""
    for path in PAGES:
        if path.startswith("docs/guides/"):
            assert f"]({path})" in README
