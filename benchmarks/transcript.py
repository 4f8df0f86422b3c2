"""``python -m benchmarks.transcript``: makes the transcript of ``bnguard run`` and the README's pictures, anew.

The transcript is written into the README and the page of ``bnguard run`` as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.results import FOLDER

if TYPE_CHECKING:
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text

__all__ = ["ERROR", "PICTURE", "TRANSCRIPT", "main", "pictures_of", "traceback_of", "transcript"]

TRANSCRIPT: Final = FOLDER / "digits.txt"
PICTURE: Final = FOLDER / "digits.png"
ERROR: Final = FOLDER / "finetune.txt"  # the end of the traceback
_COMMAND: Final = ("run", "--plot", "drift.png", "digits.py")
_ROOT: Final = Path(__file__).parents[1]
_PAGES: Final = (_ROOT / "README.md", _ROOT / "docs" / "run.md")
_COLUMNS: Final = 92
_ERROR: Final = r"bnguard\.(?:\w+\.)*StatsChangedError"
# As rich's own, without a font from the network: every letter has its place, whatever the font.
_SVG: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
{lines}
</defs>
<rect fill="BACKGROUND" width="{width}" height="{height}" rx="8"/>
<g transform="translate(16, 12)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def transcript(folder: Path) -> str:
    """Runs the command in a folder, which gets the picture, and returns what it prints."""
    (folder / "digits.py").write_text((Path(__file__).parent / "digits.py").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "bnguard", *_COMMAND]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    printed = done.stdout.replace(f"{folder.resolve()}/", "")
    return f"$ bnguard {' '.join(_COMMAND)}\n{printed}"


def traceback_of(folder: Path) -> tuple[str, str]:
    """Runs the first block of the README; the traceback in the files of the user, and the error."""
    found = re.search(r"^```python\n(.*?)^```$", _PAGES[0].read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    (folder / "finetune.py").write_text(found[1], encoding="utf-8")
    done = subprocess.run([sys.executable, "finetune.py"], cwd=folder, capture_output=True, text=True, check=False)
    head, error = re.split(rf"^(?={_ERROR}: )", done.stderr, maxsplit=1, flags=re.M)
    first, *frames = re.split(r"^(?=  File )", head.replace(f"{folder.resolve()}/", ""), flags=re.M)
    own = [frame for frame in frames if frame.startswith('  File "finetune.py"')]
    others = len(frames) - len(own)
    return "".join([first, *own, f"  [{others} frames in torch and bnguard]\n" if others else ""]), error


def pictures_of(traceback: str, error: str) -> dict[str, str]:
    """The terminal as SVG, by colour scheme."""
    from rich.terminal_theme import TerminalTheme

    grey, red, green, blue = (110, 119, 129), (207, 34, 46), (17, 99, 41), (9, 105, 218)
    light = TerminalTheme((246, 248, 250), (31, 35, 40), [grey, red, green, grey, blue, grey, grey, grey])
    grey, red, green, blue = (139, 148, 158), (255, 123, 114), (126, 231, 135), (121, 192, 255)
    dark = TerminalTheme((22, 27, 34), (230, 237, 243), [grey, red, green, grey, blue, grey, grey, grey])
    text = _coloured(traceback, error)
    return {"light": _svg(text, light, "#f6f8fa"), "dark": _svg(text, dark, "#161b22")}


def _coloured(traceback: str, error: str) -> Text:
    from rich.text import Text

    text = Text().append("$ python finetune.py\n", style="bold")
    text.append(traceback, style="black")  # the theme's grey
    message = Text(error.rstrip("\n"))
    message.highlight_regex(rf"(?m)^{_ERROR}", "bold red")
    message.highlight_regex(r"finetune\.py:\d+ in \w+", "bold blue")
    message.highlight_regex(r"(?m)^  frozen\(.*?\)(?=  )", "bold green")
    return text.append(message)


def _svg(text: Text, theme: TerminalTheme, background: str) -> str:
    from rich.console import Console

    console = Console(width=_COLUMNS, record=True, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text, soft_wrap=False)
    svg = console.export_svg(theme=theme, code_format=_SVG.replace("BACKGROUND", background), unique_id="finetune")
    return "\n".join([line.rstrip() for line in svg.splitlines()]) + "\n"


def shown_in(page: str, printed: str) -> str:
    """The text of a page with another transcript in the place of its own."""
    before, after = re.split(r"(?<=^```text\n)\$ bnguard run .*?(?=^```$)", page, maxsplit=1, flags=re.M | re.S)
    return f"{before}{printed}{after}"


def main() -> None:
    """Writes all of them into the results."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        TRANSCRIPT.write_text(transcript(Path(name)), encoding="utf-8")
        PICTURE.write_bytes((Path(name) / "drift.png").read_bytes())
        traceback, error = traceback_of(Path(name))
    ERROR.write_text(error, encoding="utf-8")
    for page in _PAGES:
        page.write_text(
            shown_in(page.read_text(encoding="utf-8"), TRANSCRIPT.read_text(encoding="utf-8")), encoding="utf-8"
        )
    written = [TRANSCRIPT, PICTURE, ERROR, *_PAGES]
    for scheme, svg in pictures_of(traceback, error).items():
        written.append(FOLDER / f"finetune-{scheme}.svg")
        written[-1].write_text(svg, encoding="utf-8")
    print("\n".join([f"written: {path}" for path in written]))


if __name__ == "__main__":
    main()
