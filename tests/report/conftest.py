"""Pages in headless Chromium; tests that use it are skipped without it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Any) -> Callable[[bool], Any]:
    """A computer's or a phone's; a new tab or another address would compile Plotly anew."""
    return functools.cache(lambda phone: browser.new_page(has_touch=phone, is_mobile=phone))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test writes its page."""
    return tmp_path_factory.mktemp("page") / "report.html"


@pytest.fixture
def visit(tab: Callable[[bool], Any], file: Path) -> Iterator[Callable[..., Any]]:
    """Opens `file`; neither an error nor a network request may occur."""
    wrong: list[str] = []
    listening = contextlib.ExitStack()
    url = file.as_uri()
    listeners = {
        "pageerror": lambda error: wrong.append(f"error: {error}"),
        "console": lambda message: wrong.append(f"{message.type}: {message.text}"),
        "dialog": lambda dialog: (wrong.append("a name was run"), dialog.dismiss()),
        "request": lambda request: (
            wrong.append(request.url)
            if request.url != url and not request.url.startswith(("data:", "blob:"))
            else None
        ),
    }

    def open_page(
        *,
        width: int = 1280,
        height: int = 900,
        color_scheme: str = "light",
        phone: bool = False,
    ) -> Any:
        page = tab(phone)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=color_scheme)
        page.mouse.move(0, 0)
        for event, listener in listeners.items():
            page.on(event, listener)
            listening.callback(page.remove_listener, event, listener)
        # At the end, the page first does what it was about to do.
        listening.callback(page.evaluate, "new Promise((done) => setTimeout(done))")
        page.goto(url)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    with listening:
        yield open_page
    assert not wrong, wrong


@pytest.fixture
def sheets(tmp_path: Path) -> Callable[..., list[str]]:
    """The text of each sheet of paper of a page, with some pixels of space before one element."""
    if shutil.which("pdftotext") is None:
        pytest.skip("needs pdftotext")

    def printed(page: Any, before: str, space: int) -> list[str]:
        page.eval_on_selector(before, f"(e) => {{ e.style.paddingTop = '{space}px'; }}")
        page.pdf(format="A4", path=tmp_path / "page.pdf")
        subprocess.run(["pdftotext", "-layout", "page.pdf"], cwd=tmp_path, check=True)
        return (tmp_path / "page.txt").read_text(encoding="utf-8").split("\f")[:-1]

    return printed
