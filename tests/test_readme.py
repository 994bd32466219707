"""What the README promises, and the table of all promises."""

import re

from tests.pages import ROOT


def test_what_is_promised_is_shown_by_tests_that_exist() -> None:
    table = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    folder, rows = ROOT / "tests", table.split("| promised |")[1].splitlines()[2:]
    shown = [re.findall(r"`([\w/]*(?:\.py)?)(?:::(test_\w+))?`", row.split("|")[-2])
             for row in rows if row.startswith("|")]  # fmt: skip
    assert len(shown) > 15 and all(shown)
    for references in shown:
        file = ""
        for path, test in references:
            file = path or file
            assert not test or f"def {test}(" in (folder / file).read_text(), f"{file}::{test}"
            assert (folder / file).is_file(), file


def test_the_readme_promises_nothing_more() -> None:
    """Its few promises are those of the table, word for word."""
    plain = [
        re.sub(r"\]\([^)]*\)|\[", "", " ".join((ROOT / page).read_text(encoding="utf-8").split()))
        for page in ("README.md", "docs/promises.md")
    ]
    given = re.findall(r"- (\*\*.*?)(?= - \*\*| All promises)", plain[0].split("it promises")[1])
    assert len(given) == 6
    assert not [promise for promise in given if promise not in plain[1]]
