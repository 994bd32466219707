"""`sparse-lightning report`: selection of the history, output, and error messages."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import webbrowser
from pathlib import Path

import numpy as np
import pytest

from sparse_lightning.cli import main
from sparse_lightning.history import HistoryWriter
from sparse_lightning.report import page, write_report

EVIL = "</script><b>a</b><!--<script>"


def record(
    path: Path,
    name: str = "fc",
    updates: int = 2,
    metric: str = "loss",
    config: dict | None = None,
) -> Path:
    generator = np.random.default_rng(0)
    writer = HistoryWriter(path)
    writer.start(
        0,
        {name: generator.random((4, 6)) < 0.5},
        {name: 16},
        {"device": EVIL, "config": config or {}},
    )
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
    assert f"Wrote {tmp_path / 'report.html'}: 1 layer, 2 updates, steps 0 to 20," in out
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


def test_the_newest_history_of_a_folder_is_used(tmp_path: Path, capsys) -> None:
    for age, name in enumerate(("pattern-2", "pattern-1", "pattern.1")):
        path = record(tmp_path / "run" / f"{name}.history", name=name)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert main(["report", str(tmp_path)]) == 0
    assert data_in(tmp_path / "report.html")["layers"][0]["name"] == "pattern-2"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("Older histories")
    assert lines[-2:] == [
        f"  {tmp_path / 'run' / name}.history" for name in ("pattern-1", "pattern.1")
    ]


def test_the_histories_of_one_runs_callbacks_are_not_called_older(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    moved_aside = [record(folder / f"pattern-{i}.1.history") for i in (1, 2)]
    record_together(folder / "pattern-1.history", folder / "pattern-2.history")
    os.utime(folder / "pattern-2.history", (2e9, 2e9))
    assert main(["report", str(tmp_path)]) == 0
    _, title, other, older_title, *older = capsys.readouterr().out.splitlines()
    assert "other callbacks" in title and other == f"  {folder / 'pattern-1.history'}"
    assert older_title.startswith("Older histories")
    assert set(older) == {f"  {path}" for path in moved_aside}


def record_together(*paths: Path) -> None:
    """Write histories as the callbacks of one training do."""
    writers = [HistoryWriter(path) for path in paths]
    mask = np.ones((4, 6), bool)
    for writer in writers:
        writer.start(0, {"fc": mask}, {"fc": 16}, {})
    for number in (1, 2):
        time.sleep(0.01)  # records have their time in milliseconds
        for writer in writers:
            writer.update(10 * number, number, {"fc": mask})


def sweep(folder: Path) -> Path:
    """Three runs as Hydra lays them out, of which one is not the newest in its folder."""
    for number, drop in ((2, "magnitude"), (10, "movement")):
        record(
            folder / str(number) / "logs" / "version_0" / "pattern.history",
            updates=number,
            config={"drop": drop, "density": {"final": number / 100}, "seed": 0},
        )
    aside = record(folder / "2" / "logs" / "version_0" / "pattern.1.history")
    os.utime(aside, (1e9, 1e9))
    return folder


def test_a_folder_with_several_runs_is_compared(tmp_path: Path, capsys) -> None:
    sweep(tmp_path / "sweep")
    assert main(["report", str(tmp_path / "sweep")]) == 0
    page_file = tmp_path / "sweep" / "report.html"
    data = data_in(page_file)
    assert [run["name"] for run in data["runs"]] == ["2", "10"]
    assert data["title"] == f"{tmp_path.name}/sweep"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Wrote {page_file}: 2 runs,")
    assert lines[1].split() == ["run", "drop", "density.final", "density", "last", "loss"]
    densities = [f"{run['density']:.4g}" for run in data["runs"]]
    assert lines[3].split() == ["2", "magnitude", "0.02", densities[0], "1"]
    assert lines[4].split() == ["10", "movement", "0.1", densities[1], "1"]
    assert lines[5:] == [
        "Older histories; name a file to show it instead:",
        f"  {tmp_path / 'sweep/2/logs/version_0/pattern.1.history'}",
    ]


def test_runs_named_one_by_one_are_compared_in_their_common_folder(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "a" / "x" / "pattern.history")
    record(tmp_path / "b" / "x" / "pattern.history")
    other = record(tmp_path / "b" / "x" / "pattern.1.history")
    os.utime(other, (1e9, 1e9))
    monkeypatch.chdir(tmp_path / "a")
    assert main(["report", "x", "../b"]) == 0
    assert [run["name"] for run in data_in(tmp_path / "report.html")["runs"]] == ["a", "b"]
    out = capsys.readouterr().out
    assert f"Wrote {Path('../report.html')}:" in out and "pattern.1.history" in out
    assert str(tmp_path) not in out, "relative paths stay relative"
    # A file that is named is a run, next to the newest one.
    assert main(["report", "../b", str(other), "--output", "y.html"]) == 0
    assert [run["name"] for run in data_in(tmp_path / "a" / "y.html")["runs"]] == [
        "pattern.1.history",
        "pattern.history",
    ]
    assert "Older" not in capsys.readouterr().out
    # The same run twice is one.
    assert main(["report", "x", "../a", "--output", "z.html"]) == 0
    assert data_in(tmp_path / "a" / "z.html")["updates"] == 2


def test_names_of_runs_keep_what_tells_them_apart(tmp_path: Path) -> None:
    for folder in (".", "v1", "deep/v1"):
        record(tmp_path / folder / "pattern.history")
    assert main(["report", str(tmp_path)]) == 0
    names = [run["name"] for run in data_in(tmp_path / "report.html")["runs"]]
    assert names == [".", "deep/v1", "v1"]


def test_a_run_that_was_resumed_in_another_folder_is_one_run(tmp_path: Path, capsys) -> None:
    first = record(tmp_path / "logs" / "version_0" / "pattern.history")
    writer = HistoryWriter(tmp_path / "logs" / "version_1" / "pattern.history", first)
    writer.start(20, {"fc": np.ones((4, 6), dtype=bool)}, {"fc": 16}, {})
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"from {writer.path}" in out
    assert out.splitlines()[-2:] == [
        "Older histories; name a file to show it instead:",
        f"  {first}",
    ]
    record(tmp_path / "logs" / "version_2" / "pattern.history")
    assert main(["report", str(tmp_path)]) == 0
    names = [run["name"] for run in data_in(tmp_path / "report.html")["runs"]]
    assert names == ["version_1", "version_2"]


def test_what_runs_lack_is_printed_once(tmp_path: Path, capsys) -> None:
    runs = sweep(tmp_path / "sweep")
    record(runs / "3" / "logs" / "version_0" / "pattern.history", updates=0)
    damaged = runs / "10" / "logs" / "version_0" / "pattern.history"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    empty = runs / "4" / "logs" / "version_0" / "pattern.history"
    empty.parent.mkdir(parents=True)
    empty.write_bytes(damaged.read_bytes()[:60])
    assert main(["report", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "Values that a history lacks:\n  drop, density.final, last loss, time: not in 3\n" in out
    assert "Incomplete histories:\n  10: Records are damaged or missing after step" in out
    assert "cannot be read:\n" in out and out.count(str(empty)) == 1 and "without a start" in out
    assert [run["name"] for run in data_in(runs / "report.html")["runs"]] == ["2", "3", "10"]


def test_runs_without_metrics_are_compared(tmp_path: Path, capsys) -> None:
    for name in "ab":
        record(tmp_path / name / "pattern.history", updates=0)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No run logged a metric." in out and "run  density\n" in out


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
        (["{tmp}/run", "{tmp}/empty"], ["`RUN_DIR` must hold a pattern.history", "empty"]),
        (["{tmp}/run", "{tmp}/cut.history"], ["cut.history", "without a start"]),
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
