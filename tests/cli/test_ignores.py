"""Findings that are meant: ``--ignore``, comments, ``pyproject.toml`` and ``--fail-on all``, on scripts and models."""

import json
import signal

import pytest

from bnguard.cli.exit_codes import fails
from bnguard.records import Finding
from tests import forks
from tests.scripts import ended_by, started

pytestmark = pytest.mark.usefixtures("interpreter")

SCRIPT = """\
import torch
from torch import nn
from nets import calibrate

net = nn.Sequential(nn.BatchNorm1d(2))
images = torch.randn(16, 2)


def validate():
    with torch.no_grad():
        net(images){comment}


validate()
calibrate(net, images){last}
"""
NETS = """\
import torch


def calibrate(net, images):
    with torch.no_grad():
        net(
            images
        ){comment}
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script and a module that both update without gradients, with comments."""

    def write(comment="", in_module="", last=""):
        (tmp_path / "train.py").write_text(SCRIPT.replace("{comment}", comment).replace("{last}", last))
        (tmp_path / "nets.py").write_text(NETS.replace("{comment}", in_module))

    return write


def run(*args, cwd):
    """Runs the script."""
    return forks.run("-m", "bnguard", "run", *args, "train.py", cwd=cwd)


def unused(done):
    """The lines of the report about entries without effect."""
    return [line.removeprefix("Unused ignore: ") for line in done.stdout.splitlines() if line.startswith("Unused")]


def test_ignored_findings_leave_the_report(script, tmp_path):
    """Neither verdict nor exit code is about them; they are counted, and are in the JSON under their own key."""
    script()
    done = run("--ignore", "BN002:train.py:11", "--fail-on", "BN002", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[2:4] == [
        "nets.py:6 in calibrate moved 1 layer, 1 update, without gradients: call model.eval() before it.",
        "1 finding; 2 updates of 1 layer; 1 finding ignored",
    ]
    assert "train.py:11 in validate\n  1 layer" not in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert [finding["where"] for finding in written["findings"]] == ["nets.py:6 in calibrate"]
    assert [(finding["where"], finding["ignored_by"]) for finding in written["ignored"]] == [
        ("train.py:11 in validate", "BN002:train.py:11 (command line)")
    ]
    assert unused(done) == []
    done = run("--ignore", "train.py,nets.py", "--fail-on", "BN002", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[2]) == (0, "no finding; 2 updates of 1 layer; 2 findings ignored")


def test_comments_ignore_findings(script, tmp_path):
    """In the script and in what it imports; on any line of the statement."""
    script("  # bnguard: ignore[BN002]", "  # as the paper does it  # bnguard: ignore")
    done = run("--fail-on", "BN002", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[2]) == (0, "no finding; 2 updates of 1 layer; 2 findings ignored")
    assert unused(done) == []


def test_comment_on_another_line_ignores_nothing(script, tmp_path):
    """One on the head of a block, or about another code, looks like it."""
    script("  # bnguard: ignore[BN003]", "", "  # bnguard: ignore[BN001,BN002]")
    done = run("--fail-on", "all", cwd=tmp_path)
    assert done.returncode == 1
    assert "2 findings; 2 updates of 1 layer\n" in done.stdout
    assert unused(done) == ["BN003 (train.py:11)", "BN001 (train.py:15)", "BN002 (train.py:15)"]


def test_comment_that_cannot_be_read_is_told(script, tmp_path):
    """The finding stays."""
    script("  # bnguard: ignore[BN02]")
    done = run(cwd=tmp_path)
    assert "2 findings; 2 updates" in done.stdout
    assert "train.py:11: unknown code 'BN02': did you mean 'BN002'? (valid are BN001 to " in done.stdout


def test_unused_entries_are_told_with_their_place(script, tmp_path):
    """One line each; not where the script failed before it came to what they are about."""
    script("  # bnguard: ignore[BN006]")
    (tmp_path / "pyproject.toml").write_text('[tool.bnguard]\nignore = ["BN002", "BN003:gan.py"]\n')
    done = run(cwd=tmp_path)
    assert unused(done) == ["BN003:gan.py (pyproject.toml)", "BN006 (train.py:11)"]
    done = run("--ignore", "BN002", "--ignore", "BN001,nets.py:7", cwd=tmp_path)
    assert unused(done) == ["BN001 (command line)", "nets.py:7 (command line)", "BN006 (train.py:11)"]
    script("; 1 / 0  # bnguard: ignore[BN006]")
    done = run("--ignore", "BN003", cwd=tmp_path)
    assert (done.returncode, unused(done)) == (1, [])


def test_paths_start_where_the_command_does(script, tmp_path):
    """Also where the script changes its folder before it trains."""
    script()
    path = tmp_path / "train.py"
    path.write_text(path.read_text().replace("validate()\ncali", "__import__('os').chdir('..')\nvalidate()\ncali"))
    done = run("--ignore", "BN002:train.py:11", "--ignore", "BN002:nets.py", cwd=tmp_path)
    assert done.stdout.splitlines()[2] == "no finding; 2 updates of 1 layer; 2 findings ignored", done.stdout
    script("  # bnguard: ignore", "  # bnguard: ignore")
    path.write_text(path.read_text().replace("validate()\ncali", "__import__('os').chdir('..')\nvalidate()\ncali"))
    assert "2 findings ignored" in run(cwd=tmp_path).stdout


def test_early_report_leaves_them_out_too(script, tmp_path):
    """The one that SIGTERM asks for."""
    script("  # bnguard: ignore", "", "; print('ready', flush=True); __import__('time').sleep(60)")
    process = started(tmp_path, "-m", "bnguard", "run", "--ignore", "nets.py", "train.py")
    _, out, _ = ended_by(process, signal.SIGTERM)
    assert "no finding; 2 updates of 1 layer; 2 findings ignored" in out


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("BN02", "bnguard run: argument --ignore: unknown code 'BN02': did you mean 'BN002'? (valid are BN001 to "),
        (
            "BN002,gan.py:x",
            "bnguard run: argument --ignore: the line of 'gan.py:x' must be a positive integer, got 'x'",
        ),
        ("", "bnguard run: argument --ignore: cannot read '': write CODE, "),
    ],
)
def test_entry_that_cannot_be_read_is_refused_before_the_script_runs(script, tmp_path, entry, problem):
    """As other options."""
    script()
    done = run("--ignore", entry, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr


def test_file_of_the_project_says_what_holds_for_every_run(script, tmp_path):
    """It is found from a folder inside; each option of the command line replaces the key of its name."""
    script()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "pyproject.toml").write_text("[tool.other]\nkey = 1\n")
    file = tmp_path / "pyproject.toml"
    file.write_text('[tool.bnguard]\nfail-on = ["BN002"]\nignore = ["BN002:train.py"]\n')

    def run_inside(*args):
        return forks.run("-m", "bnguard", "run", *args, "../train.py", cwd=tmp_path / "inside")

    done = run_inside()
    assert (done.returncode, "2 updates of 1 layer; 1 finding ignored" in done.stdout) == (1, True), done.stderr
    assert run_inside("--ignore", "BN002").returncode == 0
    assert run_inside("--fail-on", "BN003").returncode == 0
    file.write_text('[tool.bnguard]\nfail-on = "all"\nfrozen = "0"\n')
    done = run_inside()
    assert done.returncode == 1
    assert "0 (BatchNorm1d) is in train mode inside bnguard run --frozen 0:" in done.stderr
    done = run_inside("--on-change", "restore")  # of what the file guards
    assert (done.returncode, done.stderr) == (0, "")
    assert "no finding; no update" in done.stdout
    assert "--frozen nothing matched no layer" in run_inside("--frozen", "nothing").stderr
    file.write_text('[tool.bnguard]\nfrozen = "nothing"\n')
    assert "--frozen nothing (from ../pyproject.toml) matched no layer" in run_inside().stderr


def test_all_fails_on_every_finding_but_notes():
    """A code that is named counts in any case."""
    note, warning = (Finding("BN004", "", severity, (), None, "", "", "") for severity in ("note", "warning"))
    assert fails([warning], frozenset(["all"]))
    assert not fails([note], frozenset(["all"]))
    assert fails([note], frozenset(["all", "BN004"]))
    assert not fails([note, warning], frozenset(["BN003"]))
    assert not fails([note, warning], frozenset())


def test_all_of_the_command_line(script, tmp_path):
    """In any case of letters, and beside codes; a clean run passes."""
    script()
    assert run("--fail-on", "ALL", cwd=tmp_path).returncode == 1
    assert run("--fail-on", "BN009,all", cwd=tmp_path).returncode == 1
    assert run("--fail-on", "all", "--ignore", "BN002", cwd=tmp_path).returncode == 0


def test_audit_ignores_by_code(tmp_path):
    """Of the entries of a project, which are about its runs, none is called unused."""
    (tmp_path / "models.py").write_text("from torch import nn\nnet = nn.BatchNorm1d(2, momentum=0.9).half()\n")

    def audit(*args):
        return forks.run("-m", "bnguard", "audit", "models:net", *args, cwd=tmp_path)

    done = audit("--ignore", "BN007", "--json", "out.json")
    assert (done.returncode, done.stdout.splitlines()[2]) == (1, "1 finding; 1 layer; 1 finding ignored")
    assert json.loads((tmp_path / "out.json").read_text())["ignored"][0]["code"] == "BN007"
    (tmp_path / "pyproject.toml").write_text('[tool.bnguard]\nignore = ["BN003", "BN007", "BN009"]\n')
    done = audit()
    assert (done.returncode, done.stdout) == (0, "bnguard audit models:net\nno finding; 1 layer; 2 findings ignored\n")
    done = audit("--ignore", "BN003", "--ignore", "BN007:models.py")
    assert done.returncode == 1
    assert unused(done) == ["BN003 (command line)", "BN007:models.py (command line)"]
