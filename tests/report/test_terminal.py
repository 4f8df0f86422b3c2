"""Reports on a terminal: rich at 80 columns; plain text when piped, under NO_COLOR, or without rich."""

import os
import pty
import re
import threading

import pytest

from tests import forks

pytestmark = pytest.mark.usefixtures("interpreter")

SCRIPT = """\
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential()
for number in range(30):
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net.add_module(f"some_rather_long_stage_name_{number}", block)


def validate_the_model_on_all_the_held_out_images():
    with torch.no_grad():
        net(torch.randn(8, 4))


for _ in range(3):
    validate_the_model_on_all_the_held_out_images()
"""
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture
def script(tmp_path):
    """A script with long names, in the current directory."""
    (tmp_path / "train_a_network_with_a_long_name.py").write_text(SCRIPT)
    return tmp_path


def on_a_terminal(folder, *code, **variables):
    """What a command prints on a terminal of 80 columns."""
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    command = code or ("-m", "bnguard", "run", "train_a_network_with_a_long_name.py")
    parts = []
    reader = threading.Thread(target=read_all, args=(master, parts))
    reader.start()
    program = forks.start(*command, cwd=folder, environment=environment, terminal=os.ttyname(slave))
    done = program.end()
    os.close(slave)
    reader.join()
    os.close(master)
    assert done.returncode == 0, done.stderr
    return b"".join(parts).decode().replace("\r\n", "\n")


def read_all(master, parts):
    """Reads what a terminal gets until it is closed."""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # that is how a terminal ends
            return
        if not part:
            return
        parts.append(part)


def piped(folder):
    """What the command prints into a pipe."""
    done = forks.run("-m", "bnguard", "run", "train_a_network_with_a_long_name.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(text):
    """The words of a text, without lines that were drawn."""
    return re.sub(r"[^\w.%()':,/=-]+", "", text)


def test_rich_fits_into_80_columns(script):
    """In colour, nothing cut off, every line at most as wide as the terminal."""
    text = on_a_terminal(script)
    assert ESCAPES.search(text)
    plain = ESCAPES.sub("", text)
    assert max(map(len, plain.splitlines())) <= 80
    assert "…" not in plain
    assert "90 updates of 30 layers" in plain
    assert "some_rather_long_stage_name_" in plain
    assert "and 27 more" in plain
    # Wrapped or not, what is said is what a pipe gets.
    verdict = piped(script).splitlines()[2]
    assert "train_a_network_with_a_long_name.py:13 in validate_the_model" in verdict
    assert words(verdict) in words(plain)


def test_a_pipe_gets_plain_text(script):
    """No colour, no frames, no line broken."""
    text = piped(script)
    assert not ESCAPES.search(text)
    assert text.isascii()
    assert max(map(len, text.splitlines())) > 80


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_is_plain(script, variables):
    """A terminal that wants none gets what a pipe gets."""
    assert on_a_terminal(script, **variables) == piped(script)


def test_without_rich_it_is_plain(script):
    """The extra is one."""
    code = "import sys; sys.modules['rich'] = None; from bnguard.cli import main; sys.exit(main())"
    text = on_a_terminal(script, "-c", code, "run", "train_a_network_with_a_long_name.py")
    assert text == piped(script)


@pytest.mark.parametrize(("model", "is_green"), [("BatchNorm1d(2)", True), ("Linear(1, 1)", False)])
def test_green_is_for_what_was_looked_at_and_is_clean(tmp_path, model, is_green):
    """A model that has nothing to look at is no clean one."""
    (tmp_path / "models.py").write_text(f"from torch import nn\nnet = nn.{model}\n")
    printed = on_a_terminal(tmp_path, "-m", "bnguard", "audit", "models:net")
    assert "running statistics" in printed or "no finding; 1 layer" in printed
    assert ("\x1b[1;32m" in printed) == is_green
