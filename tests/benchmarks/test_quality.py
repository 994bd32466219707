"""`benchmarks/quality.py`: the runs and their repeatability, tables, files, errors."""

from __future__ import annotations

import doctest
import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import quality
import quality_tasks
import torch
import yaml
from quality import Result, main
from quality_tasks import (
    BLOCKS_NM,
    COLD_START,
    DENSE,
    EQUAL_FLOPS,
    FINETUNE,
    FINETUNING,
    LARGE_DROPS,
    LARGEST,
    METHODS,
    RANDOM,
    RIGL_NM,
    SMALL_DENSE,
    STATIC_NM,
    TASKS,
    WEIGHTS_NM,
    Batches,
    GPTSize,
    Run,
    nearest_width,
    task_runs,
)

from sparse_lightning.config import SparsityConfig

CPU = torch.device("cpu")
PLANTED = ("planted", "--device", "cpu", "--steps", "20")


def train(run: Run, folder: Path = Path()) -> dict[str, float]:
    metrics, seconds = quality_tasks.train(run, CPU, folder)
    assert seconds > 0
    return metrics


# -- what is compared ---------------------------------------------------------------------------


def test_runs_by_hand() -> None:
    assert task_runs("planted", [4, 5], steps=7) == [
        Run("planted", method, 16, 0.1, seed, 7)
        for seed in (4, 5)
        for method in ("static", "set", "rigl", LARGE_DROPS)
    ]
    fashion = task_runs("fashion", range(3))
    # 5 sparse methods and the small dense network at 2 x 4 sizes, and one dense network.
    assert len(fashion) == len(set(fashion)) == 3 * (6 * 8 + 1)
    assert [str(run) for run in fashion[:3]] == [
        "fashion, dense, seed 0",
        "fashion, small dense, B=16, d=.02, seed 0",
        "fashion, static, B=16, d=.02, seed 0",
    ]
    assert {run.steps for run in fashion} == {2814}


def test_methods_share_all_other_options() -> None:
    config = {
        method: SparsityConfig(
            **quality_tasks.callback_keywords(Run("fashion", method, 16, 0.05, 3, 400))
        )
        for method in METHODS
    }
    assert {method: c.grow for method, c in config.items()} == {
        "static": "none",
        "set": "random",
        "rigl": "gradient",
        COLD_START: "gradient",
        LARGE_DROPS: "gradient",
        "granet": "gradient",
        STATIC_NM: "none",
        WEIGHTS_NM: "none",
        BLOCKS_NM: "gradient",
        RIGL_NM: "gradient",
    }
    assert config["granet"].density_at(0.0) == 0.5
    for method, c in config.items():
        # Methods that keep half of the weights in a block have twice the blocks.
        density = 0.05 if c.nm is None else 0.1
        assert c.density_at(1.0) == density and c.block_size == 16 and c.seed == 3
        assert c.update.every_n_steps == 26 and c.monitor is None
        exchanged = {LARGE_DROPS: 0.3, "static": 0, STATIC_NM: 0}
        assert c.drop_fraction_at(0.0) == exchanged.get(method, 0.1)
        assert method == "granet" or c.density_at(0.0) == density
        c.grow, c.density = "none", config["static"].density
        c.nm, c.regrow_inner = None, True
        c.drop_fraction = config["static"].drop_fraction
        assert c == config["static"]


def test_every_task_lists_known_methods() -> None:
    for task in TASKS.values():
        assert set(task.methods) <= {*METHODS, *FINETUNING, DENSE, SMALL_DENSE, EQUAL_FLOPS}


def test_fine_tuning_compares_the_preset_with_swaps_at_once() -> None:
    file = Path(__file__).parents[2] / "configs" / "callbacks" / "sparsity" / "finetune.yaml"
    preset = yaml.safe_load(file.read_text())
    del preset["defaults"], preset["density"]["final"]
    assert FINETUNING[FINETUNE] == preset
    config = {
        method: SparsityConfig(
            **quality_tasks.callback_keywords(Run("finetune-digits", method, 16, 0.1, 3, 230))
        )
        for method in FINETUNING
    }
    starts = {
        method: (c.init, c.density_at(0.0), c.density_at(1.0)) for method, c in config.items()
    }
    assert starts == {
        RANDOM: ("random", 0.1, 0.1),
        LARGEST: ("magnitude", 0.1, 0.1),
        FINETUNE: ("magnitude", 1.0, 0.1),
    }


def test_the_nearest_width_by_hand() -> None:
    # 785 h + h (h + 1) + 10 (h + 1): 16766 at 20, 17593 at 21.
    def mlp(h: int) -> int:
        return 785 * h + h * (h + 1) + 10 * (h + 1)

    assert [mlp(20), mlp(21)] == [16330, 17167]
    assert [nearest_width(mlp, target) for target in (16330, 16748, 16749, 1)] == [20, 20, 21, 1]


def test_steps_of_equal_flops_by_hand() -> None:
    size = GPTSize(width=2, layers=3, heads=1, context=4, batch=1, windows=1)
    # A layer: 4 * 4 + 4 * 2 = 24 for attention, 8 * 4 = 32 for a dense MLP; the head 256 * 2.
    assert size.flops(1.0) == 2 * (3 * (24 + 32) + 512)
    assert size.flops(0.25) == 2 * (3 * (24 + 8) + 512)
    assert size.dense_steps(1000, 0.25) == round(1000 * 608 / 680)
    assert size.dense_steps(1, 0.25) == 1


def test_batches_are_reordered_in_every_epoch() -> None:
    batches = Batches(torch.arange(5), torch.arange(5) * 2, size=2, seed=0)
    passes = [list(batches) for _ in range(2)]
    assert [len(x) for x, _ in passes[0]] == [2, 2, 1]
    orders = [torch.cat([x for x, _ in batch]).tolist() for batch in passes]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(5)) and orders[0] != orders[1]
    assert all((y == 2 * x).all() for batch in passes for x, y in batch)
    again = Batches(torch.arange(5), torch.arange(5), size=2, seed=0)
    assert torch.cat([x for x, _ in again]).tolist() == orders[0]


# -- trainings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", ["finetune-digits", pytest.param("finetune-gpt", marks=pytest.mark.slow)]
)
def test_fine_tuning_starts_from_what_dense_training_has_learnt(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(quality_tasks._PRETRAINED[task], steps=20)
    monkeypatch.setitem(quality_tasks._PRETRAINED, task, short)
    runs = {run.method: run for run in task_runs(task, [0], steps=15) if run.density in (1, 0.1)}
    metrics = {method: train(run) for method, run in runs.items()}
    before = {method: each["before"] for method, each in metrics.items()}
    assert before[FINETUNE] == before[DENSE] != before[LARGEST] != before[RANDOM]
    better = (lambda a, b: a > b) if task == "finetune-digits" else (lambda a, b: a < b)
    assert better(before[DENSE], before[RANDOM]) and better(before[DENSE], before[LARGEST])
    assert metrics[DENSE]["parameters"] > metrics[FINETUNE]["parameters"]
    assert metrics[FINETUNE]["parameters"] == metrics[RANDOM]["parameters"]
    assert all(better(each["after"], each["before"]) for m, each in metrics.items() if m == DENSE)


def test_a_run_is_reproducible_and_growth_finds_blocks() -> None:
    static, _, _, rigl = task_runs("planted", [0], steps=120)
    first, again, other_seed = train(rigl), train(rigl), train(replace(rigl, seed=1))
    assert first == again != other_seed
    without = train(static)
    assert without["parameters"] == first["parameters"] == 102 * 256
    assert without["found"] < 30 and 30 < first["found"] <= 100
    assert 1 < first["loss"] < 0.85 * without["loss"]


def test_a_cold_start_changes_the_training() -> None:
    rigl = Run("planted", "rigl", 16, 0.1, seed=0, steps=40)
    assert train(rigl)["loss"] != train(replace(rigl, method=COLD_START))["loss"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files with noise images, in which a bright row encodes the class."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, n in (("train", 1280), ("t10k", 200)):
        labels = random.integers(0, 10, n, dtype=np.uint8)
        images = random.integers(0, 50, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), labels] = 255
        for name, header, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            content = bytes(header) + data.tobytes()
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content, 1))
    return folder


def test_fashion_networks_learn_and_have_equal_sizes(pictures: Path) -> None:
    methods = (DENSE, SMALL_DENSE, "static", "granet")
    dense, small, static, granet = (
        train(
            Run("fashion", method, *((1, 1.0) if method == DENSE else (32, 0.1)), 0, 60), pictures
        )
        for method in methods
    )
    assert dense["accuracy"] > 95 and small["accuracy"] > 50 and granet["accuracy"] > 50
    assert dense["parameters"] == 784 * 512 + 512 * 512 + 10 * 512 + 2 * 512 + 10
    # 800 inputs: 400 and 256 blocks; one unit more or less is 2 h + 796 parameters.
    assert static["parameters"] == granet["parameters"] == 66 * 1024 + 10 * 512 + 2 * 512 + 10
    assert abs(small["parameters"] - static["parameters"]) < 1000 / 2


def test_the_tiny_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fit = quality_tasks.fit
    monkeypatch.setattr(
        quality_tasks,
        "fit",
        lambda model, data, run, *a, **k: steps.append(run.steps) or fit(model, data, run, *a, **k),
    )
    run = Run("gpt-tiny", "static", 32, 0.1, seed=0, steps=6)
    sparse, small, dense = (
        train(replace(run, method=method)) for method in ("static", SMALL_DENSE, EQUAL_FLOPS)
    )
    assert all(math.isfinite(m["bits_per_byte"]) and m["bits_per_byte"] < 8.5
               for m in (sparse, small, dense))  # fmt: skip
    assert steps == [6, 6, quality_tasks.GPT_SIZES["gpt-tiny"].dense_steps(6, 0.1)] and steps[2] < 6
    assert dense["parameters"] - sparse["parameters"] == 2 * 2 * (64 - 6) * 32**2
    assert abs(small["parameters"] - sparse["parameters"]) <= 257  # half a unit of each MLP


# -- the command --------------------------------------------------------------------------------


def result(run: Run, **metrics: float) -> Result:
    return Result(run, metrics, 1.0, {"device": "abacus"})


def test_a_table_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TASKS["fashion"], methods=(DENSE, "set"), sizes=((16, 0.1), (32, 0.25)))
    monkeypatch.setitem(TASKS, "fashion", task)
    accuracies = iter([90, 80, 70, 92, 83, 70])
    results = [
        result(run, accuracy=next(accuracies)) for run in task_runs("fashion", [0, 5], steps=9)
    ]
    assert quality.tables(results).splitlines() == [
        "fashion: test accuracy, %; mean ± sample sd of seeds 0 5; 9 steps",
        "",
        "| method | B=16, d=.1 | B=32, d=.25 |",
        "|---|---|---|",
        "| dense | 91.00 ± 1.41 | 91.00 ± 1.41 |",
        "| set | 81.50 ± 2.12 | 70.00 ± 0.00 |",
    ]


def test_each_metric_has_a_table() -> None:
    results = [result(run, found=50.0, loss=3.0) for run in task_runs("planted", [0])]
    first, second = quality.tables(results).split("\n\nplanted: ")
    assert "blocks found" in first and first.endswith("| rigl, drop .3 | 50.0 |")
    assert second.startswith("held-out loss") and second.endswith("| rigl, drop .3 | 3.00 |")


def test_finished_runs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quality.json"
    assert main([*PLANTED, "--seeds", "0", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("planted: planted blocks found") and "Block-sparse" not in (
        printed.out + printed.err
    )
    command, environment = printed.out.splitlines()[-2:]
    assert command == "python benchmarks/quality.py planted --seeds 0 --steps 20"
    assert f"torch {torch.__version__}" in environment
    first = r"1 of 4: planted, static, B=16, d=.1, seed 0: found [\d.]+, loss .* \([\d.]+ s\)\n"
    assert re.match(first, printed.err) and printed.err.count("\n") == 4
    kept = json.loads(file.read_text())["results"]
    assert [row["run"]["method"] for row in kept] == ["static", "set", "rigl", LARGE_DROPS]
    assert {"device", "torch"} <= kept[0]["environment"].keys()

    assert main([*PLANTED, "--seeds", "0", "1", "--json", str(file)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": found")[0] for line in lines] == [
        f"{n} of 4: planted, {method}, B=16, d=.1, seed 1"
        for n, method in enumerate(("static", "set", "rigl", LARGE_DROPS), 1)
    ]
    assert json.loads(file.read_text())["results"][:4] == kept


def test_an_interrupted_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def fails_once(run: Run, **_: object) -> tuple[dict[str, float], float]:
        made.append(run.method)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        return {"found": 1.0, "loss": float(len(made))}, 0.5

    monkeypatch.setattr(quality_tasks, "train", fails_once)
    command = [*PLANTED, "--seeds", "0", "--json", str(tmp_path / "x.json")]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err.endswith("quality.py: out of memory\n")
    assert main(command) == 0
    assert made == ["static", "set", "set", "rigl", LARGE_DROPS]
    assert "| static | 1.00 |\n| set | 3.00 |\n| rigl | 4.00 |\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("spawned_from_server")
def test_workers_give_the_same_results(tmp_path: Path) -> None:
    def metrics(name: str, *options: str) -> dict[Run, dict[str, float]]:
        file = tmp_path / name
        assert main([*PLANTED, "--seeds", "0", "--json", str(file), *options]) == 0
        return {run: result.metrics for run, result in quality.read_results(file).items()}

    assert metrics("one.json") == metrics("two.json", "--workers", "2")


def test_only_runnable_tasks_run_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Sequence[Run]] = []
    monkeypatch.setattr(quality, "_train_all", lambda missing, *_: made.append(missing))
    options = ("--device", "cpu", "--fashion-mnist", str(tmp_path))
    with pytest.raises(TypeError):  # there are no results
        main(options)
    on_a_cpu = {"planted", "fashion", "fashion-nm", "finetune-digits", "finetune-gpt"}
    assert {run.task for run in made[0]} == on_a_cpu
    assert "gpt is skipped: it needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("digits",), "`TASK` must be one of planted, fashion, fashion-nm, gpt, .*; got 'digits'"),
        (("planted", "--seeds", "-1"), "`--seeds` must be at least 0; got -1"),
        (("planted", "--steps", "0"), "`--steps` must be at least 1; got 0"),
        (("planted", "--workers", "0"), "`--workers` must be at least 1; got 0"),
        (("planted", "--device", "nonsense"), "cuda or cpu; got 'nonsense'"),
        (("planted", "--json", "/nowhere/x.json"), "--json.*written to; got '/nowhere/x.json'"),
        (
            ("planted", "--json", __file__),
            "`--json` must be a new file, or one written by .*test_quality",
        ),
        (("fashion", "--fashion-mnist", "/nowhere"), "'/nowhere'.*'dataset-fashion-mnist'.*give"),
        (("gpt", "--device", "cpu"), "`gpt` needs a GPU.*gpt-tiny"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    printed = capsys.readouterr()
    assert not printed.out and re.search(says, printed.err), printed.err


@pytest.mark.parametrize("module", [quality, quality_tasks])
def test_doctests(module: ModuleType) -> None:
    assert doctest.testmod(module, raise_on_error=True).attempted > 0
