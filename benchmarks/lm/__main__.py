"""The command line: `python benchmarks/lm COMMAND`, or `python -m lm` beside this folder."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # `python benchmarks/lm` searches this folder for modules, not the one that holds the package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lm.command import main

raise SystemExit(main())
