"""The README's transcript: the script in ``benchmarks`` makes it."""

import re

from matplotlib import image

from benchmarks import transcript

NUMBER = re.compile(r"\d+\.\d+(e[-+]\d+)?%?")


def normalised(text):
    """Without what another processor computes in the last digits, or ranks otherwise by that."""
    head, _, drift = text.partition("moved most:")
    return [line.split() for line in NUMBER.sub("0.0", head).splitlines()], len(drift.splitlines())


def test_script_makes_it_again(tmp_path):
    """Lines, counts and findings are the same; so is the size of the picture."""
    again = transcript.transcript(tmp_path)
    assert normalised(again) == normalised(transcript.TRANSCRIPT.read_text())
    sizes = [image.imread(path).shape[:2] for path in (tmp_path / "drift.png", transcript.PICTURE)]
    assert abs(sizes[0][0] - sizes[1][0]) < 5
    assert sizes[0][1] == sizes[1][1] == 1200
