"""What the command line says about words and files that it cannot use: the command, the value, and the nearest."""

import json
import pickle

import numpy as np
import pytest
import torch

from bnguard.cli import main
from bnguard.findings.file_kinds import kind_of
from bnguard.report.files import Outputs
from tests import forks


def refused(capsys, *arguments):
    """The lines on stderr of a command that ends with 2 and prints nothing else."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    return printed.err.splitlines()


def test_no_command_prints_the_help(capsys):
    """It lists the commands, and says what to type first; nothing was checked, so the exit code is not 0."""
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("usage: bnguard")
    for word in ("run", "audit", "diff", "explain", "demo", "Start with:"):
        assert f" {word} " in printed.out


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["rnu"], "bnguard: unknown command 'rnu': did you mean 'run'? (valid are 'run', 'audit', "),
        (["zzz"], "bnguard: unknown command 'zzz': valid are 'run', "),
        (["--versoin"], "bnguard: unknown option '--versoin': did you mean '--version'?"),
        (["run", "--jsn", "x.json", "t.py"], "bnguard run: unknown option '--jsn': did you mean '--json'?"),
        (["audit", "--zzz=1", "m:f"], "bnguard audit: unknown option '--zzz'"),
        (["explain", "BN001", "BN002"], "bnguard explain: unexpected argument 'BN002'"),
        (["explain", "BN3x"], "bnguard explain: argument CODE: unknown code 'BN3x'"),
        (["run", "--on-change", "rais", "t.py"], "bnguard run: argument --on-change: expected 'raise', 'warn' or 'r"),
        (["audit", "--output-format", "xml", "m:f"], "bnguard audit: argument --output-format: expected 'text', "),
        (["diff", "a.pt"], "bnguard diff: the following arguments are required: AFTER"),
    ],
)
def test_unknown_words_are_named_with_the_nearest(capsys, arguments, first):
    """One line, which begins with the command that it is about, and one about its help."""
    lines = refused(capsys, *arguments)
    assert lines[0].startswith(first)
    command = first.partition(":")[0]
    assert lines[1:] == [f"See {command} --help."]


def test_file_in_place_of_a_command(tmp_path, monkeypatch, capsys):
    """Whoever forgets ``run`` reads what to write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    line = "bnguard: expected a command, got the file 'train.py': to run a script, write bnguard run train.py"
    assert refused(capsys, "train.py")[0] == line


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A file of each kind in the working directory, by kind."""
    monkeypatch.chdir(tmp_path)
    torch.save({"bn.running_mean": torch.ones(2)}, "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    np.save("b.npy", np.ones(2))
    np.savez("c.npz", np.ones(2))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    contents = {
        "a zip archive of which a part is missing": ("half.pt", whole[:-40]),
        "a safetensors file": ("weights.pt", len(header).to_bytes(8, "little") + header + b"\0" * 4),
        "a pickle": ("x.pkl", pickle.dumps([1])),
        "a Git LFS pointer, not the file itself: run git lfs pull": ("b.pt", b"version https://git-lfs.github.com\n"),
        "a PNG picture": ("p.pt", b"\x89PNG\r\n\x1a\n\0"),
        "a binary file": ("bits", b"\1\0\2" * 9),
        "a JSON file": ("r.json", b"{}"),
        "a Jupyter notebook": ("n.ipynb", b"{}"),
        "an HTML page": ("page", b"<!DOCTYPE html>\n"),
        "a shell script": ("go", b"#!/bin/sh\n"),
        "a Python file": ("t.py", b"x = 1\n"),
        "a text file": ("notes", b"hello\n"),
        "an empty file": ("none.pt", b""),
    }
    for name, content in contents.values():
        (tmp_path / name).write_bytes(content)
    named = {kind: name for kind, (name, _) in contents.items()}
    return {**named, "a checkpoint of torch.save()": "a.pt", "a NumPy array": "b.npy", "a NumPy archive": "c.npz"}


def test_kinds_of_files_are_known(files):
    """By their first bytes, whatever they are called; text by its suffix."""
    assert {kind: kind_of(name) for kind, name in files.items()} == dict(zip(files, files, strict=True))
    assert kind_of(".") == "a folder"


def test_script_of_another_kind_is_named(files, capsys):
    """What Python would run is run; the rest is refused with what it is, before torch is asked."""
    runs = {"a Python file", "a text file", "an empty file"}
    for kind, name in files.items():
        if kind not in runs:
            line = f"bnguard run: expected a Python script, got {name!r}, which is {kind}"
            assert refused(capsys, "run", name) == [line]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a JSON file", "r.json is a JSON file: expected a checkpoint that torch.save() or safetensors has written"),
        ("a Python file", "t.py is a Python file: expected a checkpoint that "),
        ("a safetensors file", "weights.pt is a safetensors file: its name must end in .safetensors"),
        ("a Git LFS pointer, not the file itself: run git lfs pull", "b.pt is a Git LFS pointer, not the file itself"),
        ("a binary file", "bits is no checkpoint, or it is truncated"),
    ],
)
def test_checkpoint_of_another_kind_is_named(files, capsys, kind, text):
    """The file, what it is, and what was expected."""
    (line,) = refused(capsys, "diff", files[kind], files["a checkpoint of torch.save()"])
    assert line.startswith(f"bnguard diff: {text}")


@pytest.mark.parametrize(
    ("target", "end"),
    [
        ("t.py", ": write t:NAME"),
        ("./t.py:make", ": write t:make"),
        ("a.pt", ", which is a checkpoint of torch.save()"),
    ],
)
def test_file_in_place_of_a_callable(files, capsys, target, end):
    """``audit`` says how to write it."""
    line = f"bnguard audit: expected module:callable, such as models:make_net, got {target!r}{end}"
    assert refused(capsys, "audit", target) == [line]


def test_model_without_layers_is_said(capsys):
    """An audit that can find nothing does not read like one that has found nothing."""
    assert main(["audit", "torch.nn:Identity"]) == 0
    expected = "Identity has no layer with running statistics: there is nothing to find"
    assert capsys.readouterr().out == f"bnguard audit torch.nn:Identity\n{expected}\n"


def test_files_are_told_after_they_were_written(tmp_path, monkeypatch, capsys):
    """A line for each that is there; one that failed has its reason instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text("from torch import nn\nnet = nn.BatchNorm1d(2)\n")
    told = []
    write = Outputs.write

    def watched(self, *args):
        told.append("Written" in capsys.readouterr().out)
        return write(self, *args)

    monkeypatch.setattr(Outputs, "write", watched)
    monkeypatch.setattr("bnguard.report.html.write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert main(["audit", "models:net", "--json", "a.json", "--html", "b.html"]) == 2
    printed = capsys.readouterr()
    assert told == [False]
    assert printed.out == f"\nWritten: {tmp_path / 'a.json'}\n"
    assert printed.err == "bnguard audit: disk full\n"


def test_help_shows_frozen_and_on_change_by_example(capsys, tmp_path):
    """The examples of ``--frozen`` are lines that the command takes, for each policy."""
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("bnguard run --frozen")]
    assert len(examples) == 4
    assert {"warn", "restore"} <= {word for line in examples for word in line.split()}
    (tmp_path / "train.py").write_text(
        "import torch\nfrom torch import nn\n"
        "net = nn.Sequential()\nnet.add_module('backbone', nn.BatchNorm1d(2))\nnet(torch.ones(4, 2))\n"
    )
    for line in examples:
        arguments = [word.strip("'") for word in line.split()[1:]]
        done = forks.run("-m", "bnguard", *arguments, cwd=tmp_path)
        is_raise = "--on-change" not in arguments and "--use-running-stats" not in arguments
        assert done.returncode == is_raise, (line, done.stderr)
