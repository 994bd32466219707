"""`sparse-lightning report`: selection of the history, output, and error messages."""

from __future__ import annotations

import json
import os
import re
import sys
import webbrowser
from pathlib import Path

import numpy as np
import pytest

from sparse_lightning.cli import main
from sparse_lightning.history import HistoryWriter
from sparse_lightning.report import page, write_report

EVIL = "</script><b>a</b><!--<script>"


def record(path: Path, name: str = "fc", updates: int = 2, metric: str = "loss") -> Path:
    generator = np.random.default_rng(0)
    writer = HistoryWriter(path)
    writer.start(0, {name: generator.random((4, 6)) < 0.5}, {name: 16}, {"device": EVIL})
    for number in range(1, updates + 1):
        writer.update(10 * number, number, {name: generator.random((4, 6)) < 0.5})
        writer.metrics(10 * number, {metric: float("nan") if number == 1 else 1.0})
    return path


def data_in(file: Path) -> dict:
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL
    )
    return json.loads(text)


def test_the_page_is_written_to_the_run_without_leftovers(tmp_path: Path, capsys) -> None:
    record(tmp_path / "logs" / "version_3" / "pattern.history")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'report.html'}: 1 layers, 2 updates, steps 0 to 20," in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "report.html"]
    text = (tmp_path / "report.html").read_text()
    assert (
        "<title>logs/version_3 · block masks</title>" in text
        and "{{ " not in text.split("<script>")[0]
    )
    assert data_in(tmp_path / "report.html")["updates"] == 2
    assert main(["report", str(tmp_path)]) == 0  # an existing file is replaced


def test_a_file_and_an_output(tmp_path: Path) -> None:
    path = record(tmp_path / "run" / "pattern.history")
    assert main(["report", str(path)]) == 0 and (path.parent / "report.html").is_file()
    assert main(["report", str(path), "--output", str(tmp_path / "x.html")]) == 0
    assert data_in(tmp_path / "x.html")["layers"][0]["name"] == "fc"


def test_the_newest_history_is_used(tmp_path: Path, capsys) -> None:
    for age, name in enumerate(("newest", "older", "oldest")):
        path = record(tmp_path / name / "pattern.history", name=name)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert main(["report", str(tmp_path)]) == 0
    assert data_in(tmp_path / "report.html")["layers"][0]["name"] == "newest"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("Older histories")
    assert lines[-2:] == [
        f"  {tmp_path / name / 'pattern.history'}" for name in ("older", "oldest")
    ]


def test_a_gap_is_shown_on_the_page_and_printed(tmp_path: Path, capsys) -> None:
    path = record(tmp_path / "pattern.history", updates=4)
    whole = path.read_bytes()
    assert main(["report", str(path)]) == 0
    assert "missing" not in capsys.readouterr().out
    assert data_in(tmp_path / "report.html")["gaps"] == ""
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for data, place in ((whole[:-1], "after step 40"), (bytes(middle), "between steps ")):
        path.write_bytes(data)
        assert main(["report", str(path)]) == 0
        sentence = f"Records are damaged or missing {place}"
        assert sentence in capsys.readouterr().out
        assert data_in(tmp_path / "report.html")["gaps"].startswith(sentence)


def test_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    record(tmp_path / "pattern.history")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url))  # None: no browser
    assert main(["report", str(tmp_path), "--open"]) == 0
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]
    assert "No browser was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/nowhere"], ["`RUN_DIR` must", "nowhere", "does not exist"]),
        (["{tmp}/empty"], ["`RUN_DIR` must hold a pattern.history", "monitor.record", "logger"]),
        (["{tmp}/text.history"], ["text.history", "must be a history"]),
        (["{tmp}/cut.history"], ["cut.history", "without a start"]),
        (["{tmp}/run", "--output", "{tmp}/empty"], ["`--output` must be a file", "empty"]),
        (["{tmp}/run", "--output", "{tmp}/no/x.html"], ["`--output` must be a file", "no/x.html"]),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys, arguments: list[str], says: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.history").write_text("a text")
    whole = record(tmp_path / "run" / "pattern.history").read_bytes()
    (tmp_path / "cut.history").write_bytes(whole[:60])
    assert main(["report", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in says) and "Traceback" not in error, error
    assert not list(tmp_path.rglob("*.html*"))


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    record(tmp_path / "pattern.history")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tmp_path)]) == 1
    assert "pip install 'sparse-lightning[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_names_cannot_end_an_element(tmp_path: Path) -> None:
    path = record(tmp_path / "h", name=EVIL, metric=EVIL)
    write_report(path, tmp_path / "x.html", title=EVIL)
    text = (tmp_path / "x.html").read_text()
    assert "<b>a</b>" not in text and "<!--<script>" not in text
    data = data_in(tmp_path / "x.html")
    assert data["layers"][0]["name"] == data["metrics"][0]["name"] == data["title"] == EVIL
    assert data["metrics"][0]["value"] == [None, 1.0]


def test_placeholders_in_data_are_not_expanded() -> None:
    assert '"title":"{{ library }}"' in page.render({"title": "{{ library }}"}, "var x;")


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record(tmp_path / "h")
    (tmp_path / "x.html").write_text("old")
    monkeypatch.setattr(page, "render", lambda *_: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report(path, tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h", "x.html"]


def test_the_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in text and "--open" in text
