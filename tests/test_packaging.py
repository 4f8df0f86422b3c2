"""The package as it is installed, and the files that install it."""

import configparser
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import bnguard
from tests.versions.environment import _DOCUMENTATION, pinned
from tests.versions.table import TABLE, read_table

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PINS = dict(
    line.split("==")
    for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def declared_requirements():
    """What setup.cfg requires, by extra; ``""`` is the package itself."""
    lists = {"": SETUP["options"]["install_requires"], **SETUP["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in lists.items()}


def installed_requirements(name, extra):
    """What an installed distribution requires on every system, with one of its extras or, as ``""``, without."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        # One system's own: colorama on Windows, CUDA's libraries on Linux.
        if marker is None or (marker.evaluate({"extra": extra}) and not re.search("platform|os_name", str(marker))):
            yield requirement


def test_import_of_bnguard_leaves_torch_alone():
    """``import bnguard`` alone imports neither torch nor wrapt nor anything of an extra."""
    code = (
        "import sys, bnguard; bnguard.__version__; dir(bnguard);"
        "print([name for name in ('torch', 'wrapt', 'numpy', 'sklearn', 'rich', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_import_of_frozen_leaves_to_later_what_few_blocks_need():
    """Beside torch, neither wrapt nor the public records are imported, nor what only some options and findings need."""
    names = ("wrapt", "sysconfig", "bnguard.records", "bnguard.guard.affine", "bnguard.guard.deferred")
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        from bnguard import frozen
        with frozen(torch.nn.BatchNorm1d(2), "restore") as guard:
            pass
        print([name for name in {names} if name in sys.modules.keys() - before])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_run_loads_what_it_needs(tmp_path):
    """Not the other commands, and no reader or writer of a format that nobody has asked for."""
    (tmp_path / "train.py").touch()
    names = ("html", "tomllib", "bnguard.cli.demo", "bnguard.findings.explanations", "bnguard.guard.recalibration")
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        from bnguard.cli import main
        assert main(["run", "train.py"]) == 0
        print([name for name in {names} if name in sys.modules.keys() - before])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("\n[]\n")


def test_public_names_are_there():
    """What ``dir()`` lists can be had, and nothing else."""
    for name in dir(bnguard):
        assert getattr(bnguard, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bnguard.no_such_name


def test_version_is_the_installed_one():
    """The version in the code is the version in the metadata."""
    assert metadata.version("bnguard") == bnguard.__version__


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "bnguard"], [Path(sys.executable).with_name("bnguard")]],
    ids=["module", "script"],
)
def test_command_is_installed(command):
    """``bnguard`` and ``python -m bnguard`` are the same command, and ask for no extra to say the versions."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    torchs = f"torch {torch.__version__} (its normalisation layers are known)"
    assert done.stdout == f"bnguard {bnguard.__version__}, {torchs}\n"


def test_classifiers_say_what_was_run():
    """The Pythons of the table of versions, and the oldest torch of it."""
    rows = [row for row in read_table(TABLE) if not row.failed]
    pythons = {".".join(row.python.split(".")[:2]) for row in rows}
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert set(named) == pythons
    (torch_itself,) = [one for one in declared_requirements()[""] if one.name == "torch"]
    assert str(torch_itself.specifier) == ">=" + ".".join(map(str, min(row.torch_numbers for row in rows)[:2]))


def test_types_and_licence_ship():
    """The package carries its marker for type checkers, and its metadata the licence."""
    assert resources.files(bnguard).joinpath("py.typed").is_file()
    assert "py.typed" in SETUP["options.package_data"]["bnguard"]
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    fields = metadata.metadata("bnguard")
    assert (fields.get("License-Expression") or fields.get("License")) == "MIT"


def test_editable_install_is_a_plain_path():
    """``pip install -e`` adds this folder to the path: type checkers follow no import hook, and would find nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "import bnguard, sys; print(bnguard.__file__, *sys.path, sep='\\n')"],
        capture_output=True, text=True, check=True, cwd=ROOT.parent,
    )  # fmt: skip
    file, *path = done.stdout.splitlines()
    if "site-packages" in file:
        pytest.skip("bnguard is installed, but not from this folder")
    assert str(ROOT) in path


def test_runtime_needs_torch_and_wrapt_only():
    """Everything else is an extra."""
    assert {requirement.name for requirement in declared_requirements()[""]} == {"torch", "wrapt"}


def test_constraints_pin_what_is_declared():
    """Every package that setup.cfg names is pinned, within the bounds that it names."""
    for requirements in declared_requirements().values():
        for requirement in requirements:
            if requirement.name != "bnguard":
                assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_constraints_pin_what_is_installed():
    """Whatever the test extra brings into an environment with the constraints is pinned, transitively."""
    if any(Version(metadata.version(name)).public != PINS[name] for name in ("torch", "numpy", "pytest", "hypothesis")):
        pytest.skip("this environment was made without the constraints")
    waiting, seen = [("bnguard", "test"), ("bnguard", "")], set()
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        for requirement in installed_requirements(name, extra):
            found = {(canonicalize_name(requirement.name), part) for part in ("", *requirement.extras)}
            waiting += sorted(found - seen)
    brought = {name for name, _ in seen} - {"bnguard"}
    assert {"torch", "sympy", "wrapt", "scikit-learn", "scipy", "rich", "matplotlib", "pytest"} <= brought
    assert brought <= set(PINS)


def test_constraints_are_exact():
    """Every pin is one version of one package, in order."""
    assert len(PINS) > 40
    assert list(PINS) == sorted(PINS)
    for name, version in PINS.items():
        assert name == canonicalize_name(name)
        assert str(Version(version)) == version


def test_ci_runs_the_commands_of_the_readme():
    """CI runs the README's test command, then the slow tests, and stops where a step fails."""
    script = (ROOT / ".ci" / "run").read_text()
    command = re.search(
        r"^(pip install -e '\.\[test\]'.*) && (pytest)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert command is not None
    assert "set -euo pipefail" in script
    assert f"\n{command[1]}\n{command[2]}\n{command[2]} -m slow\n" in script


def test_ci_builds_the_documentation():
    """With its extra, and a warning is an error; the environments of other versions are spared its packages."""
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"/pip\" install -e '\.\[docs\]' -c tests/constraints\.txt\n.*/python\" -m sphinx -W ", script)
    names = {requirement.name for requirement in declared_requirements()["docs"]} - {"bnguard"}
    assert names == {"furo", "myst-parser", "sphinx"}
    assert names.isdisjoint(line.split("==")[0] for line in pinned())
    assert set(_DOCUMENTATION) <= set(PINS)


def test_version_is_cited_and_in_the_changelog():
    """Until it is published its entry is the first one."""
    version = re.escape(bnguard.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (first, *_) = re.findall(r"^## \[(.+)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(version, first)


def test_changelog_keeps_its_form():
    """Versions with their dates, and the headings of Keep a Changelog."""
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for entry in versions:
        assert re.match(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d\d-\d\d)\n", entry)
        assert set(re.findall(r"^### (.+)$", entry, re.MULTILINE)) <= kinds


@pytest.mark.parametrize(
    "path", ["CITATION.cff", *sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))], ids=lambda path: Path(path).name
)
def test_forms_are_valid_yaml(path):
    """GitHub ignores what it cannot read."""
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load((ROOT / path).read_text())
    if "body" in content:
        assert content["name"]
        assert content["description"]
        ids = [part["id"] for part in content["body"]]
        assert len(ids) == len(set(ids)) >= 2


def test_the_oldest_torch_has_its_command_and_ci_runs_the_newest():
    """The oldest is the one that setup.cfg names; the newest is left to pip."""
    script = (ROOT / ".ci" / "run").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    oldest = re.search(r"`python -m tests\.versions ([\d.]+) --dry-run`", contributing)
    assert oldest is not None
    (torch_itself,) = [requirement for requirement in declared_requirements()[""] if requirement.name == "torch"]
    (floor,) = torch_itself.specifier
    assert floor.operator == ">="
    assert Version(oldest[1]).release[:2] == Version(floor.version).release
    assert "\npython -m tests.versions --packages newest --dry-run\n" in script
