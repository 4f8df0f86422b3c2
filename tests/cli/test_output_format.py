"""``--output-format`` and ``--output-file`` of ``run`` and ``audit``."""

import json

import pytest

from tests import forks

pytestmark = pytest.mark.usefixtures("interpreter")

SCRIPT = """\
import torch
from torch import nn

net = nn.Sequential(nn.BatchNorm1d(2, momentum=0.9))
{mode}
with torch.no_grad():
    net(torch.randn(16, 2))
print("the script's own")
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script that has two findings, one without a line; or a correct one that looks like it."""

    def run(*args, is_correct=False):
        (tmp_path / "train.py").write_text(SCRIPT.replace("{mode}", "net.eval()" if is_correct else ""))
        return forks.run("-m", "bnguard", "run", *args, "train.py", cwd=tmp_path)

    return run


ANNOTATIONS = [
    "::warning file=train.py,line=7,title=BN002 train-mode forward that nothing learns from::1 layer (0) made 1 update",
    "::warning title=BN007 momentum by another convention::1 layer (0) has momentum 0.9",
]


def test_annotations_come_after_the_script(run):
    """Each at the beginning of a line, and no report; a correct script has none."""
    done = run("--output-format", "github", "--fail-on", "all")
    assert (done.returncode, done.stderr) == (1, "")
    own, empty, *lines = done.stdout.splitlines()
    assert (own, empty) == ("the script's own", "")
    assert [line[: len(text)] for line, text in zip(lines, ANNOTATIONS, strict=True)] == ANNOTATIONS
    done = run("--output-format", "github", is_correct=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the script's own\n", "")


def test_ignored_findings_are_no_annotations(run):
    """What the report would say beside the findings is on stderr."""
    done = run("--output-format", "github", "--ignore", "BN002", "--ignore", "BN003")
    assert done.stdout.count("::warning") == 1
    assert done.stderr == "Unused ignore: BN003 (command line)\n"


def test_sarif_comes_after_the_script(run):
    """One document; a correct script has one without results."""
    for is_correct, codes in ((False, ["BN002", "BN007"]), (True, [])):
        done = run("--output-format", "sarif", is_correct=is_correct)
        assert done.returncode == 0, done.stderr
        own, _, text = done.stdout.partition("\n\n")
        assert own == "the script's own"
        results = json.loads(text)["runs"][0]["results"]
        assert [result["ruleId"] for result in results] == codes
        places = [result["locations"][0]["physicalLocation"] for result in results]
        uris = [(place["artifactLocation"]["uri"], place["region"]["startLine"]) for place in places]
        assert uris == ([] if is_correct else [("train.py", 7), ("train.py", 1)])


def test_file_has_the_findings_and_stdout_the_report(run, tmp_path):
    """So that a log can be read by people, and a file by programs."""
    done = run("--output-format", "sarif", "--output-file", "out.sarif")
    assert "2 findings; 1 update of 1 layer" in done.stdout
    assert done.stdout.endswith(f"Written: {tmp_path / 'out.sarif'}\n")
    assert len(json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"]) == 2
    run("--output-format", "github", "--output-file", "out.txt")
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line[: len(text)] for line, text in zip(lines, ANNOTATIONS, strict=True)] == ANNOTATIONS
    run("--output-format", "github", "--output-file", "out.txt", is_correct=True)
    assert (tmp_path / "out.txt").read_text() == ""
    done = run("--output-file", "out.txt")
    assert "\n2 findings; 1 update of 1 layer\n" in (tmp_path / "out.txt").read_text()
    assert "2 findings; 1 update of 1 layer" in done.stdout


def test_module_that_is_run_is_the_place_of_findings_without_a_line(run, tmp_path):
    """As a script is."""
    run()
    done = forks.run("-m", "bnguard", "run", "--output-format", "sarif", "-m", "train", cwd=tmp_path)
    result = json.loads(done.stdout.partition("\n\n")[2])["runs"][0]["results"][1]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "train.py"


def test_audit_has_the_formats(tmp_path):
    """Its document is all that stdout has; the file is that of the model."""
    (tmp_path / "models.py").write_text("from torch import nn\nnet = nn.BatchNorm1d(2, momentum=0.9)\n")

    def audit(name):
        done = forks.run("-m", "bnguard", "audit", "models:net", "--output-format", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        return done.stdout

    (result,) = json.loads(audit("sarif"))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "models.py"
    assert audit("github").startswith("::warning title=BN007 ")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--output-format", "xml"], "argument --output-format: expected 'text', 'github' or 'sarif', got 'xml'"),
        (
            ["--output-file", "missing/out.sarif"],
            "argument --output-file: expected a file in an existing folder, got 'missing/out.sarif'",
        ),
        (["--output-file", "."], "argument --output-file: expected a file, got '.', which is a folder"),
    ],
)
def test_bad_options_are_refused_before_the_script_runs(run, args, problem):
    """Not after hours of training."""
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr


def test_file_that_cannot_be_written_in_the_end(run, tmp_path):
    """The report is there all the same."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "nets.py").write_text("import os; os.rmdir('folder')\n")
    (tmp_path / "other.py").write_text("import nets\n" + SCRIPT.replace("{mode}", ""))
    args = ("run", "--output-format", "sarif", "--output-file", "folder/out", "other.py")
    done = forks.run("-m", "bnguard", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert "2 findings" in done.stdout
    assert "No such file or directory" in done.stderr
