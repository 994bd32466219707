"""Train sparse and dense networks, and print tables of what they learn.

examples:
  all tasks that this machine can run, with three seeds each:
    python benchmarks/quality.py
  images; finished runs are kept in a file, and the same command resumes from it:
    python benchmarks/quality.py fashion --json quality.json --workers 2
  a short run:
    python benchmarks/quality.py planted --seeds 0 --steps 300
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import quality_tasks
import torch
from quality_tasks import DENSE, TASKS, Metrics, Run, size_label, task_runs

from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import describe_environment, environment_line
from sparse_lightning.cli import run_command
from sparse_lightning.files import check_writable, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    description, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="quality.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    tasks = "; ".join(f"{name}: {task.description}" for name, task in TASKS.items())
    add("tasks", nargs="*", metavar="TASK",
        help=f"default: all that this machine can run except gpt-tiny. {tasks}")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N",
        help="seeds of weights, blocks and data; default: 0 1 2")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help="optimizer steps of each run; default: the task's own")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=1, metavar="N", help="concurrent runs; default: 1")
    add("--fashion-mnist", type=Path, metavar="FOLDER",
        default=Path("/usr/share/datasets/fashion-mnist"))  # fmt: skip
    add("--json", type=Path, metavar="FILE",
        help="keep finished runs in this file; runs that it holds are not repeated")  # fmt: skip
    return run_command(run_tasks, parser.parse_args(arguments), parser.prog)


def run_tasks(options: argparse.Namespace) -> None:
    """Train the selected tasks and print the tables.

    Raises:
        ValueError: for invalid options, before anything is trained.
    """
    device = find_device(options.device)
    _check(options)
    tasks = _select_tasks(options, device)
    done = {} if options.json is None else read_results(options.json)
    wanted = [run for task in tasks for run in task_runs(task, options.seeds, options.steps)]
    missing = [run for run in wanted if run not in done]
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in every run
    environment = describe_environment(device)
    train = partial(quality_tasks.train, device=device, fashion_mnist=options.fashion_mnist)
    for n, (run, (metrics, seconds)) in enumerate(_train_all(missing, train, options.workers), 1):
        done[run] = Result(run, metrics, seconds, environment)
        if options.json:
            write_results(options.json, done.values())
        values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        print(f"{n} of {len(missing)}: {run}: {values} ({seconds:.1f} s)",
              file=sys.stderr, flush=True)  # fmt: skip

    results = [done[run] for run in wanted]
    steps = [] if options.steps is None else ["--steps", options.steps]
    command = ["python benchmarks/quality.py", *tasks, "--seeds", *options.seeds, *steps]
    print(f"{tables(results)}\n\n{' '.join(map(str, command))}")
    for environment in {tuple(result.environment.items()): None for result in results}:
        print(environment_line(dict(environment)))


def _train_all(
    runs: Sequence[Run], train: Callable[[Run], tuple[Metrics, float]], workers: int
) -> Iterator[tuple[Run, tuple[Metrics, float]]]:
    """Yield every run with its metrics and seconds as soon as it is finished."""
    if workers == 1:
        yield from ((run, train(run)) for run in runs)
        return
    # Workers are spawned, because neither CUDA nor PyTorch's threads survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(train, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check(options: argparse.Namespace) -> None:
    check_count("workers", options.workers)
    check_count("steps", options.steps)
    if min(options.seeds) < 0:
        raise ValueError(f"`--seeds` must be at least 0; got {min(options.seeds)}.")
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"`TASK` must be one of {', '.join(TASKS)}; got '{name}'.")
    if options.json is not None:
        check_writable(options.json, "--json")


def _select_tasks(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Return the requested tasks, or all that can run."""
    names = options.tasks or [name for name in TASKS if name != "gpt-tiny"]
    missing = {name: _missing_requirement(name, options, device) for name in names}
    for name, requirement in missing.items():
        if requirement and options.tasks:
            raise ValueError(f"`{name}` needs {requirement}")
        if requirement:
            print(f"{name} is skipped: it needs {requirement}", file=sys.stderr)
    return [name for name, requirement in missing.items() if not requirement]


def _missing_requirement(
    task: str, options: argparse.Namespace, device: torch.device
) -> str | None:
    """Return what a task lacks, with the remedy; None if it can run."""
    if task.startswith("fashion") and not options.fashion_mnist.is_dir():
        return (
            f"Fashion-MNIST in '{options.fashion_mnist}'. Install the Debian package "
            "'dataset-fashion-mnist', or give --fashion-mnist a folder with its four .gz files."
        )
    if task in ("gpt", "gpt-nm") and device.type != "cuda":
        return "a GPU. On a CPU, use gpt-tiny to test it."
    return None


# -- results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        run: the run.
        metrics: metrics of its task by name, and the number of `parameters`.
        seconds: duration of the run.
        environment: device, versions, commit.
    """

    run: Run
    metrics: Metrics
    seconds: float
    environment: dict[str, str]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results as JSON, one per line."""
    lines = ",\n".join(f"  {json.dumps(asdict(result))}" for result in results)
    write_text(path, f'{{"results": [\n{lines}\n]}}\n')


def read_results(path: Path) -> dict[Run, Result]:
    """Return the results in a file by run; none if the file does not exist.

    Raises:
        ValueError: if the file was not written by `write_results`.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["results"]
        results = [Result(**{**row, "run": Run(**row["run"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`--json` must be a new file, or one written by this command; got '{path}', "
            "which is another. Give another name."
        ) from error
    return {result.run: result for result in results}


def tables(results: Sequence[Result]) -> str:
    """Return a Markdown table for each metric of each task: methods by block size and density.

    Args:
        results: results of complete tasks, in the order of `task_runs`.
    """
    return "\n\n".join(
        _table(task, metric, [result for result in results if result.run.task == task])
        for task in dict.fromkeys(result.run.task for result in results)
        for metric in TASKS[task].metrics
    )


def _table(name: str, metric: str, results: Sequence[Result]) -> str:
    task, (title, decimals) = TASKS[name], TASKS[name].metrics[metric]
    seeds = sorted({result.run.seed for result in results})
    rows = [["method", *(size_label(*size) for size in task.sizes)]]
    for method in task.methods:
        row = [method]
        for size in task.sizes:
            values = [
                result.metrics[metric]
                for result in results
                if result.run.method == method
                and (method == DENSE or (result.run.block_size, result.run.density) == size)
            ]
            row.append(spread(values, decimals))
        rows.append(row)
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    lines = [
        f"{name}: {title}; mean ± sample sd of seeds {' '.join(map(str, seeds))}; "
        f"{results[0].run.steps} steps",
        "",
        head,
        f"|{'---|' * len(rows[0])}",
        *body,
    ]
    return "\n".join(lines)


def spread(values: Sequence[float], decimals: int) -> str:
    """Return the mean and the sample standard deviation, or a single value alone.

    >>> spread([1.0, 2.0, 3.0], 1), spread([2.0], 1)
    ('2.0 ± 1.0', '2.0')
    """
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    raise SystemExit(main())
