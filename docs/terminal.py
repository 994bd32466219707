"""Draws docs/images/terminal.svg: what examples/quickstart.py prints in a terminal.

python docs/terminal.py
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS = 100
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SCHEDULE = "Block-sparse training: "
# What begins a line anew: the cursor goes to its start or up, or the line is erased.
_REWRITE = re.compile(r"\r|\x1b\[[0-9]*[AK]")


def run_in_terminal() -> str:
    """Return what the example writes to a terminal of `COLUMNS` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, COLUMNS, 0, 0))
    hidden = ("COLUMNS", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    written = b""
    with tempfile.TemporaryDirectory() as folder:  # for its checkpoint
        example = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "quickstart.py")],
            cwd=folder, env=environment, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        try:
            while chunk := os.read(ours, 4096):
                written += chunk
        except OSError:  # Linux reports the end of a terminal like this
            pass
        finally:
            os.close(ours)
        if example.wait():
            raise RuntimeError(f"The example failed:\n{written.decode()}")
    return written.decode()


def select_lines(output: str) -> list[str]:
    """Return the lines to show, with their colours: the table, the last bar, and the panel."""
    lines = []
    # A log line may follow a progress bar without a line break.
    for line in output.replace(_SCHEDULE, f"\n{_SCHEDULE}").split("\n"):
        written = [part for part in _REWRITE.split(line) if _ESCAPE.sub("", part).strip()]
        # A progress bar rewrites its line; only the last version stays on the screen.
        lines.append(written[-1] if written else "")
    plain = [_ESCAPE.sub("", line) for line in lines]

    def find(start: str) -> int:
        found = (i for i, line in enumerate(plain) if line.startswith(start))
        line = next(found, None)
        if line is None:
            raise RuntimeError(f"No line begins with {start!r}:\n{output!r}")
        return line

    bar = max(i for i, line in enumerate(plain) if line.startswith("Epoch"))
    # Other lines follow the bar without a line break.
    last_bar = lines[bar].partition("`Trainer.fit`")[0]
    table = lines[find("Block-sparse layers") : find("Left dense") + 1]
    panel = lines[find("╭─ Block-sparse training") : find("╰─") + 1]
    return [*table, "", lines[find(_SCHEDULE)], last_bar, *panel]


def draw(lines: list[str]) -> str:
    """Return the SVG of lines with ANSI colours; it loads nothing from the network."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line.rstrip()), overflow="crop", no_wrap=True)
    svg = console.export_svg(title="python examples/quickstart.py", unique_id="terminal")
    return re.sub(r" *@font-face \{.*?\}\n+", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    picture = ROOT / "docs" / "images" / "terminal.svg"
    picture.write_text(draw(select_lines(run_in_terminal())), encoding="utf-8")
