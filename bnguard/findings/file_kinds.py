"""What kind of file a path names, for errors about a file of the wrong kind. Importing this module imports no torch."""

from __future__ import annotations

import os
from typing import Final

SCRIPT: Final = "a Python file"
TEXT: Final = "a text file"
BINARY: Final = "a binary file"
EMPTY: Final = "an empty file"
PICKLE: Final = "a pickle"
CHECKPOINT: Final = "a checkpoint of torch.save()"
SAFETENSORS: Final = "a safetensors file"
LFS_POINTER: Final = "a Git LFS pointer, not the file itself: run git lfs pull"

_BEGINNINGS: Final = (
    (b"version https://git-lfs", LFS_POINTER),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a compiled program"),
)
_SUFFIXES: Final = {
    ".py": SCRIPT,
    ".ipynb": "a Jupyter notebook",
    ".json": "a JSON file",
    ".html": "an HTML page",
    ".yaml": "a YAML file",
    ".yml": "a YAML file",
    ".toml": "a TOML file",
    ".csv": "a CSV file",
    ".sh": "a shell script",
}


def kind_of(path: str) -> str:
    """What a file is, such as ``"a JSON file"``, by its first bytes, and for text by its suffix.

    Raises:
        OSError: The file cannot be read.
    """
    if os.path.isdir(path):
        return "a folder"
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        return EMPTY
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return SAFETENSORS
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    return BINARY if b"\0" in head else _kind_of_text(head.decode("utf-8", "replace"), path)


def _kind_of_zip(path: str) -> str:
    import zipfile  # for errors alone

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "a zip archive of which a part is missing"
    if any([name.endswith("data.pkl") for name in names]):
        return CHECKPOINT
    return "a NumPy archive" if any([name.endswith(".npy") for name in names]) else "a zip archive"


def _kind_of_text(text: str, path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    first = text.lstrip().split("\n", 1)[0].lower()
    if first.startswith("#!"):
        return SCRIPT if "python" in first else "a shell script"
    return _SUFFIXES[".html"] if first.startswith(("<!doctype html", "<html")) else TEXT
