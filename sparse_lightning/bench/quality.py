"""What `sparse-lightning bench quality` compares: runs, and tables of what came of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_lightning.bench.options import write_text

DENSE, SMALL_DENSE, EQUAL_FLOPS = "dense", "small dense", "dense, equal FLOPs"
COLD_START, LARGE_DROPS = "rigl, cold start", "rigl, drop .3"

# What a method's name means: keywords of `SparsityCallback`, to which `keywords` adds the rest.
METHODS: dict[str, dict[str, Any]] = {
    "static": {"density": {"schedule": "constant"}, "grow": "none"},
    "set": {"density": {"schedule": "constant"}, "grow": "random"},
    "rigl": {"density": {"schedule": "constant"}, "grow": "gradient"},
    COLD_START: {"density": {"schedule": "constant"}, "grow": "gradient"},
    LARGE_DROPS: {
        "density": {"schedule": "constant"},
        "grow": "gradient",
        "drop_fraction": {"schedule": "cosine", "initial": 0.3, "final": 0.0},
    },
    "granet": {"density": {"schedule": "cubic", "initial": 0.5}, "grow": "gradient"},
}
_UPDATES = 15  # in a whole training; they end at three quarters of it


@dataclass(frozen=True)
class Task:
    """What is trained, in which variants.

    Attributes:
        what: one line for the help.
        methods: keys of `METHODS`, and baselines; the rows of a table.
        sizes: (block size, density) of the sparse networks; the columns.
        steps: of the optimizer.
        metrics: by key, what a metric is and its decimals; each has a table.
    """

    what: str
    methods: tuple[str, ...]
    sizes: tuple[tuple[int, float], ...]
    steps: int
    metrics: dict[str, tuple[str, int]]


_GPT = Task(
    what="a byte-level GPT, 512 wide, 8 layers, with sparse MLPs, reads Python's library; on a GPU",
    methods=(DENSE, SMALL_DENSE, EQUAL_FLOPS, "static", "set", "rigl", COLD_START, LARGE_DROPS),
    sizes=((32, 0.1), (64, 0.25)),
    steps=750,
    metrics={"bits_per_byte": ("held-out bits per byte", 3)},
)
TASKS = {
    "planted": Task(
        what="one layer is to find the blocks of a block-sparse teacher",
        methods=("static", "set", "rigl", LARGE_DROPS),
        sizes=((16, 0.1),),
        steps=1000,
        metrics={
            "found": ("planted blocks found, %", 1),
            "loss": ("held-out loss / that of the teacher", 2),
        },
    ),
    "fashion": Task(
        what="an MLP, 784-512-512-10, tells the pictures of Fashion-MNIST apart",
        methods=(DENSE, SMALL_DENSE, "static", "set", "rigl", "granet", LARGE_DROPS),
        sizes=tuple((b, d) for b in (16, 32) for d in (0.02, 0.05, 0.1, 0.25)),
        steps=6 * 469,  # epochs x batches of 128
        metrics={"accuracy": ("test accuracy, %", 2)},
    ),
    "gpt": _GPT,
    "gpt-tiny": Task(
        what="the same, 128 wide, 2 layers, to see that it works; seconds on a CPU",
        methods=_GPT.methods,
        sizes=_GPT.sizes,
        steps=100,
        metrics=_GPT.metrics,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: the same run on the same device gives the same metrics.

    Attributes:
        task: a key of `TASKS`.
        method: one of the task's.
        block_size, density: of the sparse network, or of the one that a baseline shall equal; both
            1 for `DENSE`, which equals none.
        seed: of weights, blocks, and the order of data.
        steps: of the optimizer.
    """

    task: str
    method: str
    block_size: int
    density: float
    seed: int
    steps: int

    def __str__(self) -> str:
        size = "" if self.method == DENSE else f", {_column(self.block_size, self.density)}"
        return f"{self.task}, {self.method}{size}, seed {self.seed}"


def runs(task: str, seeds: Iterable[int], steps: int | None = None) -> list[Run]:
    """Return every run of a task, one seed after the other.

    Args:
        task: a key of `TASKS`.
        seeds: each gives a run of every method and size.
        steps: the task's own if None.
    """
    of = TASKS[task]
    found = [
        Run(task, method, *((1, 1.0) if method == DENSE else size), seed, steps or of.steps)
        for seed in seeds
        for size in of.sizes
        for method in of.methods
    ]
    return list(dict.fromkeys(found))


def keywords(run: Run) -> dict[str, Any]:
    """Return what `SparsityCallback` is given in a run of a sparse method.

    All methods share the updates, drop by magnitude, and give every layer the same density; but
    for one, they exchange a tenth of the blocks at first.
    """
    method = METHODS[run.method]
    return {
        "drop_fraction": {"schedule": "cosine", "initial": 0.1, "final": 0.0},
        **method,
        "density": {**method["density"], "final": run.density},
        "block_size": run.block_size,
        "distribution": "uniform",
        "update": {"every_n_steps": max(1, run.steps // _UPDATES), "until": 0.75},
        "drop": "magnitude",
        "seed": run.seed,
        "monitor": None,
    }


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        run: that was made.
        metrics: by name, those of its task and the number of `parameters`.
        seconds: that it took.
        environment: device, versions, commit.
    """

    run: Run
    metrics: dict[str, float]
    seconds: float
    environment: dict[str, str]


def write(path: Path, results: Iterable[Result]) -> None:
    """Write results for `read`, a line each."""
    lines = ",\n".join(f"  {json.dumps(asdict(result))}" for result in results)
    write_text(path, f'{{"results": [\n{lines}\n]}}\n')


def read(path: Path) -> dict[Run, Result]:
    """Return the results that `write` has left in a file; none if there is no file.

    Raises:
        ValueError: for a file of something else.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["results"]
        results = [Result(**{**row, "run": Run(**row["run"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`--json` must be a new file, or one that this command has written; got '{path}', "
            "which is another. Give another name."
        ) from error
    return {result.run: result for result in results}


def tables(results: Sequence[Result]) -> str:
    """Return Markdown tables, one for each metric of each task: methods by block size and density.

    Args:
        results: of whole tasks, as `runs` lists them.
    """
    return "\n\n".join(
        _table(task, key, of_task)
        for task in dict.fromkeys(result.run.task for result in results)
        for of_task in [[result for result in results if result.run.task == task]]
        for key in TASKS[task].metrics
    )


def _table(task: str, key: str, results: Sequence[Result]) -> str:
    of, (what, decimals) = TASKS[task], TASKS[task].metrics[key]
    seeds = sorted({result.run.seed for result in results})
    rows = [["method", *(_column(*size) for size in of.sizes)]]
    for method in of.methods:
        chosen = [result for result in results if result.run.method == method]
        row = [method]
        for size in of.sizes:
            values = [
                result.metrics[key]
                for result in chosen
                if method == DENSE or (result.run.block_size, result.run.density) == size
            ]
            row.append(spread(values, decimals))
        rows.append(row)
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    lines = [
        f"{task}: {what}; mean ± sample sd of seeds {' '.join(map(str, seeds))}; "
        f"{results[0].run.steps} steps",
        "",
        head,
        f"|{'---|' * len(rows[0])}",
        *body,
    ]
    return "\n".join(lines)


def spread(values: Sequence[float], decimals: int) -> str:
    """Return mean and sample standard deviation; of one value only itself.

    >>> spread([1.0, 2.0, 3.0], 1), spread([2.0], 1)
    ('2.0 ± 1.0', '2.0')
    """
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def _column(block_size: int, density: float) -> str:
    return f"B={block_size}, d={f'{density:g}'.removeprefix('0')}"
