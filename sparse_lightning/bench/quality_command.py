"""The options of `sparse-lightning bench quality`, and how it goes through its runs."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from sparse_lightning.bench.environment import as_line, describe
from sparse_lightning.bench.options import check_count, check_writable, find_device
from sparse_lightning.bench.quality import TASKS, Result, Run, read, runs, tables, write

Train = Callable[[Run], tuple[dict[str, float], float]]

EXAMPLES = """examples:
  all tasks that this machine can run, three seeds each:
    sparse-lightning bench quality
  pictures, with what is finished kept in a file, so that the same command goes on from there:
    sparse-lightning bench quality fashion --json quality.json --workers 2
  a first look:
    sparse-lightning bench quality planted --seeds 0 --steps 300
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    tasks = "; ".join(f"{name}: {task.what}" for name, task in TASKS.items())
    add("tasks", nargs="*", metavar="TASK",
        help=f"default: all that this machine can run, but gpt-tiny. {tasks}")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N",
        help="of weights, blocks and data; default: 0 1 2")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help="of the optimizer in each run; default: the task's own")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=1, metavar="N", help="runs at the same time; default: 1")
    add("--fashion-mnist", type=Path, metavar="FOLDER",
        default=Path("/usr/share/datasets/fashion-mnist"))  # fmt: skip
    add("--json", type=Path, metavar="FILE",
        help="keep finished runs there; those that it holds are not made again")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Train what the options ask for and print the tables.

    Raises:
        ValueError: for options that do not fit together, before anything is trained.
    """
    from sparse_lightning.bench.quality_tasks import train  # imports Lightning

    device = find_device(options.device)
    _check(options)
    tasks = _tasks(options, device)
    done = {} if options.json is None else read(options.json)
    wanted = [one for task in tasks for one in runs(task, options.seeds, options.steps)]
    missing = [one for one in wanted if one not in done]
    if device.type == "cpu":
        torch.set_num_threads(1)  # as every run does
    environment = describe(device)
    make = partial(train, device=device, fashion_mnist=options.fashion_mnist)
    for n, (one, (metrics, seconds)) in enumerate(_train_all(missing, make, options.workers), 1):
        done[one] = Result(one, metrics, seconds, environment)
        if options.json:
            write(options.json, done.values())
        found = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        print(f"{n} of {len(missing)}: {one}: {found} ({seconds:.1f} s)",
              file=sys.stderr, flush=True)  # fmt: skip

    results = [done[one] for one in wanted]
    print(f"{tables(results)}\n\n{_command(options, tasks)}")
    for made_on in {tuple(result.environment.items()): None for result in results}:
        print(as_line(dict(made_on)))


def _train_all(
    missing: Sequence[Run], train: Train, workers: int
) -> Iterator[tuple[Run, tuple[dict[str, float], float]]]:
    """Yield every run with what came of it, as soon as it is there."""
    if workers == 1:
        yield from ((one, train(one)) for one in missing)
        return
    # Not forked: neither CUDA nor the threads of PyTorch survive that.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(train, one): one for one in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _command(options: argparse.Namespace, tasks: Sequence[str]) -> str:
    """Return the command that gives the same tables."""
    steps = [] if options.steps is None else ["--steps", options.steps]
    words = ["sparse-lightning bench quality", *tasks, "--seeds", *options.seeds, *steps]
    return " ".join(map(str, words))


def _check(options: argparse.Namespace) -> None:
    check_count("workers", options.workers)
    check_count("steps", options.steps)
    if min(options.seeds) < 0:
        raise ValueError(f"`--seeds` must be at least 0; got {min(options.seeds)}.")
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"`TASK` must be one of {', '.join(TASKS)}; got '{name}'.")
    if options.json is not None:
        check_writable(options.json)


def _tasks(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Return the tasks that were asked for, or all that can run."""
    names = options.tasks or [name for name in TASKS if name != "gpt-tiny"]
    hindrances = {name: _hindrance(name, options, device) for name in names}
    for name, reason in hindrances.items():
        if reason and options.tasks:
            raise ValueError(f"`{name}` needs {reason}")
        if reason:
            print(f"{name} is left out. It needs {reason}", file=sys.stderr)
    return [name for name, reason in hindrances.items() if not reason]


def _hindrance(task: str, options: argparse.Namespace, device: torch.device) -> str | None:
    """Return what a task needs and does not find here, and what to do; None if it can run."""
    from sparse_lightning.bench.quality_tasks import EXAMPLES_FOLDER

    if task != "planted" and not (EXAMPLES_FOLDER / "gpt.py").is_file():
        return "the repository's examples. Clone it, and install it from there: pip install -e ."
    if task == "fashion" and not options.fashion_mnist.is_dir():
        return (
            f"Fashion-MNIST in '{options.fashion_mnist}'. Install the Debian package "
            "'dataset-fashion-mnist', or give --fashion-mnist a folder with its four .gz files."
        )
    if task == "gpt" and device.type != "cuda":
        return "a GPU. To see that it works, take gpt-tiny."
    return None
