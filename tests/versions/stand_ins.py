"""Make stand-ins for the CUDA libraries that torch is linked with. See Note [A build for CUDA on a machine without]."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NEEDED: Final = re.compile(r"\(NEEDED\).*\[(.+)\]")
_FILE: Final = re.compile(r"Version: 1\s+File: (\S+)")
_NAME: Final = re.compile(r"Name: (\S+)\s+Flags")
# Of the system; what they define is asked for by name, too.
_SYSTEM: Final = ("ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0",
                  "librt.so.1", "libstdc++.so.6", "libutil.so.1")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Symbol:
    """A row of the dynamic symbol table.

    Attributes:
        name: Its name.
        version: Its version; empty for none.
        is_defined: Whether the file has it, or asks for it.
        is_weak: Whether it may be missing.
    """

    name: str
    version: str
    is_defined: bool
    is_weak: bool


def make_stand_ins(site: Path) -> None:
    """Makes a shared object for each library that torch is linked with and that is neither installed nor the system's.

    It has every symbol that torch asks of it, in the version that torch asks for. None of them is ever called.

    Args:
        site: The folder of the installed packages.
    """
    folder = site / "torch" / "lib"
    own = [*folder.glob("*.so*"), *(site / "torch").glob("_C*.so")]
    installed = [*own, *(site / "nvidia").rglob("*.so*")]
    there = {path.name for path in installed} | set(_SYSTEM)
    missing: dict[str, dict[str, set[str]]] = {
        name: {} for path in own for name in _NEEDED.findall(_readelf(path, "-d")) if name not in there
    }
    for path in own:
        for library, version in _versions(path):
            if library in missing:
                missing[library][version] = set()
    defined = {symbol.name for path in [*installed, *_system_files()] for symbol in _symbols(path) if symbol.is_defined}
    loose = set()
    for symbol in [symbol for path in own for symbol in _symbols(path) if not symbol.is_defined]:
        versions = next((versions for versions in missing.values() if symbol.version in versions), None)
        if versions is not None:
            versions[symbol.version].add(symbol.name)
        elif symbol.name not in defined and not symbol.is_weak and not re.match("_?Py", symbol.name):
            loose.add(symbol.name)  # of one library or another: all stand-ins get it
    for library, versions in missing.items():
        _compile(folder / library, versions, loose)


def _readelf(path: Path, option: str) -> str:
    return subprocess.run(["readelf", "-W", option, path], check=True, capture_output=True, text=True).stdout


def _versions(path: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a library and a version that a file asks for."""
    library = ""
    for line in _readelf(path, "-V").splitlines():
        if found := _FILE.search(line):
            library = found[1]
        elif found := _NAME.search(line):
            yield library, found[1]


def _symbols(path: Path) -> Iterator[_Symbol]:
    """The dynamic symbol table of a file."""
    for line in _readelf(path, "--dyn-syms").splitlines():
        columns = line.split()
        if len(columns) > 7 and columns[0][:-1].isdigit():
            name, _, version = columns[7].partition("@")
            yield _Symbol(name, version.lstrip("@"), columns[6] != "UND", columns[4] == "WEAK")


def _system_files() -> Iterator[Path]:
    for name in _SYSTEM:
        command = ["cc", f"-print-file-name={name}"]
        path = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        if path.exists():
            yield path


def _compile(path: Path, versions: dict[str, set[str]], loose: set[str]) -> None:
    """Compiles a shared object with these symbols, by version, and some without a version."""
    names = sorted(set().union(*versions.values(), loose))
    code = [f'int f{i}(void) __asm__("{name}"); int f{i}(void) {{ return 1; }}\n' for i, name in enumerate(names)]
    groups = [
        f"{version} {{ {'global: ' + '; '.join(sorted(group)) + ';' if group else ''} }};\n"
        for version, group in versions.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "versions"
        script.write_text("".join(groups), encoding="utf-8")
        command = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", path]
        if versions:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True, input="".join(code), text=True)
