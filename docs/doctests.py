"""Renders doctests in docstrings as code, for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A doctest reaches from a prompt to the next empty line.
DOCTEST = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts a code fence around each doctest."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
