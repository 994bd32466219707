"""The promises in the README and the table of all promises."""

import re

from tests.pages import ROOT


def test_promises_name_existing_tests() -> None:
    table = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    folder, rows = ROOT / "tests", table.split("| promise |")[1].splitlines()[2:]
    shown = [re.findall(r"`([\w/]*(?:\.py)?)(?:::(test_\w+))?`", row.split("|")[-2])
             for row in rows if row.startswith("|")]  # fmt: skip
    assert len(shown) > 15 and all(shown)
    for references in shown:
        file = ""
        for path, test in references:
            file = path or file
            assert not test or f"def {test}(" in (folder / file).read_text(), f"{file}::{test}"
            assert (folder / file).is_file(), file


def test_the_readme_promises_are_in_the_table() -> None:
    """The README repeats promises of the table word for word."""
    plain = [
        re.sub(r"\]\([^)]*\)|\[", "", " ".join((ROOT / page).read_text(encoding="utf-8").split()))
        for page in ("README.md", "docs/promises.md")
    ]
    promises = re.findall(r"- (\*\*.*?)(?= - \*\*| All promises)", plain[0].split("it promises")[1])
    assert len(promises) == 6
    assert not [promise for promise in promises if promise not in plain[1]]
