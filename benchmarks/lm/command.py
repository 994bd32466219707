"""The commands `corpus`, `prepare`, `search`, `train` and `results`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lm import data
from lm.models import PATTERNS
from lm.results import append_result, plot, read_results, tables
from lm.settings import DENSE, RULES, Settings
from lm.training import Result, load_start, train
from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.plot import check_format
from sparse_lightning.cli import run_command
from sparse_lightning.files import check_writable
from sparse_lightning.tables import as_text
from sparse_lightning.topology import BLOCK_SIZES, check_density

_EXAMPLES = """examples:
  text and tokens:
    python benchmarks/lm corpus linux-source-6.1.tar.xz linux.txt.xz
    python benchmarks/lm prepare linux.txt.xz tokens
  a dense and a sparse training; the same command continues one that the time limit has stopped:
    python benchmarks/lm train tokens --tokens 60e6 --lr 1e-3 --minutes 10
    python benchmarks/lm train tokens --tokens 60e6 --lr 1e-3 --minutes 10 \\
        --rule static --block-size 128 --density .25
  tables and a plot:
    python benchmarks/lm results --plot lm.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    parser = argparse.ArgumentParser(
        prog="lm",
        description="Train language models, dense and block-sparse, and compare their losses.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (_add_corpus, _add_prepare, _add_search, _add_train, _add_results):
        add_command(commands)
    options = parser.parse_args(arguments)
    return run_command(options.run, options, parser.prog)


# -- text ---------------------------------------------------------------------------------------


def _add_corpus(commands: Any) -> None:
    parser = commands.add_parser(
        "corpus", help="write a part of a folder or archive into one compressed text file"
    )
    parser.set_defaults(run=run_corpus)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder, or a tar archive")
    add("file", type=Path, metavar="FILE", help="the file to write, .txt.xz")
    add("--megabytes", type=float, default=250, metavar="N", help="size of the text; default: 250")
    add("--largest", type=float, default=200, metavar="N",
        help="leave out documents of more kB, which are often generated; default: 200")  # fmt: skip


def run_corpus(options: argparse.Namespace) -> None:
    """Write the file, and print its size."""
    n, size = data.write_corpus(options.source, options.file, options.megabytes, options.largest)
    compressed = options.file.stat().st_size
    print(f"{n:,} documents, {size / 1e6:.1f} MB, compressed to {compressed / 1e6:.1f} MB")


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser("prepare", help="encode text into tokens")
    parser.set_defaults(run=run_prepare)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE",
        help="a folder or tar archive of text files, or a .txt or .txt.xz file")  # fmt: skip
    add("folder", type=Path, metavar="FOLDER", help="the folder to write")
    add("--vocabulary", type=int, default=16_384, metavar="N",
        help="number of different tokens; default: 16384")  # fmt: skip
    add("--held-out", type=float, default=0.02, metavar="SHARE",
        help="share of the documents that is held out; default: 0.02")  # fmt: skip
    add("--sample", type=float, default=20, metavar="N",
        help="MB of text that the encoding is learned from; default: 20")  # fmt: skip


def run_prepare(options: argparse.Namespace) -> None:
    """Write the tokens, and print their number."""
    found = data.prepare(
        options.source, options.folder, options.vocabulary, options.held_out, options.sample
    )
    print(
        f"{found.train_tokens / 1e6:.1f} M tokens to train on, "
        f"{found.held_out_tokens / 1e6:.2f} M held out, "
        f"{found.held_out_bytes / found.held_out_tokens:.2f} bytes per token"
    )


# -- training -----------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a model, and append its curve to the results")
    parser.set_defaults(run=run_train)
    _add_training_options(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, metavar="N", help="length; default: 60e6")
    length.add_argument("--seconds", type=float, metavar="N",
        help="length, at the speed of the model's first result, as of `search`")  # fmt: skip
    parser.add_argument("--lr", type=float, metavar="RATE",
        help="peak learning rate; default: the best of `search`")  # fmt: skip


def _add_search(commands: Any) -> None:
    parser = commands.add_parser(
        "search", help="find the learning rate of a model by short trainings"
    )
    parser.set_defaults(run=run_search)
    _add_training_options(parser)
    add = parser.add_argument
    add("--tokens", type=float, default=10e6, metavar="N",
        help="length of each training; default: 10e6")  # fmt: skip
    add("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], metavar="RATE",
        help="peak learning rates; default: 5e-4 1e-3 2e-3")  # fmt: skip


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="a folder that `prepare` has written")
    add("--results", type=Path, default=Path("lm.jsonl"), metavar="FILE",
        help="file of the results; default: lm.jsonl")  # fmt: skip
    add("--runs", type=Path, default=Path("runs"), metavar="FOLDER",
        help="folder of checkpoints and weights; default: runs")  # fmt: skip
    add("--minutes", type=float, metavar="N",
        help="end with a checkpoint at about this time; the same command continues")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    model = parser.add_argument_group("model").add_argument
    model("--model", choices=("gpt", "llama"), default="gpt")
    for name, default in {"width": 1024, "layers": 12, "heads": 16}.items():
        model(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    model("--mlp-width", type=float, default=1.0, metavar="FACTOR",
        help="width of the MLPs relative to the usual one, such as .25 to compare a dense model "
        "with a sparse one of density .25, or 2 for wider sparse ones; default: 1")  # fmt: skip

    sparse = parser.add_argument_group("sparsity").add_argument
    sparse("--rule", choices=(DENSE, *RULES), default=DENSE, help="default: dense")
    sparse("--block-size", type=int, choices=BLOCK_SIZES, default=64, help="default: 64")
    sparse("--density", type=float, default=0.25, metavar="D", help="default: .25")
    sparse("--nm", choices=("2:4",), help="pattern within blocks; default: none")
    sparse("--sparse", choices=tuple(PATTERNS), default="mlps",
        help="which layers are sparse; default: mlps")  # fmt: skip
    sparse("--updates", type=int, default=30, metavar="N",
        help="a topology update is due after each N-th part of the training, until three quarters "
        "of it; default: 30")  # fmt: skip
    sparse("--drop-fraction", type=float, default=0.1, metavar="SHARE",
        help="share of the blocks that the first update exchanges; default: .1")  # fmt: skip
    sparse("--start", type=Path, metavar="FILE",
        help="initial weights: a .pt file of a finished dense training in --runs")  # fmt: skip
    sparse("--distill", type=float, default=0.0, metavar="WEIGHT",
        help="weight of the divergence from the dense model in the loss; default: 0")  # fmt: skip

    training = parser.add_argument_group("training").add_argument
    training("--context", type=int, default=1024, metavar="N", help="default: 1024")
    training("--batch", type=int, default=48, metavar="N",
        help="windows of a step; default: 48")  # fmt: skip
    training("--warmup", type=float, default=0.05, metavar="SHARE",
        help="share of the steps in which the learning rate rises; default: .05")  # fmt: skip
    training("--seed", type=int, default=0, metavar="N")
    training("--precision", help="of Lightning; default: bf16-mixed on a GPU, else 32-true")
    training("--eager", action="store_true", help="do not compile the layers")
    training("--log-every", type=int, default=50, metavar="N",
        help="steps between two points of the curve; default: 50")  # fmt: skip
    training("--held-out", type=int, default=480, metavar="N",
        help="held-out windows that each point evaluates; default: 480")  # fmt: skip


def run_train(options: argparse.Namespace) -> None:
    """Train one model, unless the results have it already."""
    training = Training(options)
    results = read_results(options.results)
    settings = training.settings
    same = [r for r in results if r.settings.variant == settings.variant]
    if options.seconds is not None:
        steps = options.seconds * speed(same) / settings.tokens_per_step
    else:
        steps = (60e6 if options.tokens is None else options.tokens) / settings.tokens_per_step
    lr = best_lr(same) if options.lr is None else options.lr
    training.run(replace(settings, steps=count_steps(steps, settings), lr=lr))


def run_search(options: argparse.Namespace) -> None:
    """Train with each learning rate, and print their losses."""
    training = Training(options)
    steps = count_steps(options.tokens / training.settings.tokens_per_step, training.settings)
    settings = replace(training.settings, steps=steps, is_search=True)
    found: dict[float, float] = {}
    for lr in options.lrs:
        result = training.run(replace(settings, lr=lr))
        if result is None:
            return
        found[lr] = result.curve[-1].held_out_loss
    print("| lr | held-out loss |\n|---|---|")
    for lr, loss in found.items():
        print(f"| {lr:g} | {loss:.4f} |")
    best = min(found, key=lambda lr: found[lr])
    print(f"The best of them is {best:g}.")
    if best in (min(found), max(found)):
        print("It is at the end of the grid; a rate beyond it may be better.")


class Training:
    """What the trainings of a command share.

    Args:
        options: the options of the command.

    Raises:
        ValueError: for invalid options, before anything is trained.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = find_device(options.device)
        for name in ("width", "layers", "heads", "updates", "context", "batch", "log-every",
                     "held-out"):  # fmt: skip
            check_count(name, getattr(options, name.replace("-", "_")))
        check_density(options.density)
        if options.width % (2 * options.heads):
            raise ValueError(
                "`--width` must be a multiple of 2 * `--heads`; got "
                f"{options.width} and {options.heads}."
            )
        if options.mlp_width <= 0:
            raise ValueError(f"`--mlp-width` must be positive; got {options.mlp_width:g}.")
        for name in ("warmup", "distill", "drop_fraction"):
            if not 0 <= getattr(options, name) <= 1:
                raise ValueError(
                    f"`--{name.replace('_', '-')}` must be a share in [0, 1]; "
                    f"got {getattr(options, name):g}."
                )
        if options.distill and options.start is None:
            raise ValueError(
                f"`--distill` needs a dense model; got {options.distill:g} without `--start`. "
                "Give --start the .pt file of a finished dense training."
            )
        check_writable(options.results, "--results")
        check_writable(options.runs, "--runs", kind="folder")
        options.runs.mkdir(exist_ok=True)
        self.deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        start, self.weights = (None, None) if options.start is None else load_start(options.start)
        self.settings = make_settings(options, data.read_summary(options.data), start, self.device)

    def run(self, settings: Settings) -> Result | None:
        """Return the result of a training, which may be an earlier one; None if time is up."""
        for result in read_results(self.options.results):
            if result.settings == settings:
                print(f"'{self.options.results}' has the result of {settings.name}.")
                return result
        say(f"{settings.name}: {settings.label}, {settings.steps} steps, lr {settings.lr:g}")
        result = train(
            settings,
            self.options.data,
            self.options.runs,
            self.device,
            start=self.weights,
            deadline=self.deadline,
            report=say,
        )
        if result is None:
            print(f"Time is up; the same command continues {settings.name}.")
            return None
        append_result(self.options.results, result)
        # Only now, because until then it is the way to the result.
        (self.options.runs / f"{settings.name}.ckpt").unlink(missing_ok=True)
        end = result.curve[-1]
        print(
            f"{settings.name}: held-out loss {end.held_out_loss:.4f} after {end.seconds:.1f} s, "
            f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_memory / 2**30:.1f} GiB"
        )
        return result


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def make_settings(
    options: argparse.Namespace, summary: data.Summary, start: str | None, device: torch.device
) -> Settings:
    """Return the settings of a training, without the number of steps and the learning rate."""
    is_sparse = options.rule != DENSE
    default = "bf16-mixed" if device.type == "cuda" else "32-true"
    return Settings(
        data=summary.digest,
        vocabulary=summary.vocabulary,
        model=options.model,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        mlp_width=options.mlp_width,
        context=options.context,
        batch=options.batch,
        steps=0,
        rule=options.rule,
        block_size=options.block_size if is_sparse else None,
        density=options.density if is_sparse else None,
        nm=options.nm if is_sparse else None,
        sparse=options.sparse if is_sparse else None,
        updates=options.updates if is_sparse else None,
        drop_fraction=options.drop_fraction if is_sparse else None,
        start=start,
        distill=options.distill,
        lr=0.0,
        warmup=options.warmup,
        seed=options.seed,
        precision=options.precision or default,
        compile=not options.eager,
        log_every=options.log_every,
        held_out=options.held_out,
        is_search=False,
    )


def count_steps(steps: float, settings: Settings) -> int:
    """Return a number of steps rounded down, which must be at least 1."""
    if steps < 1:
        raise ValueError(
            f"The training must be as long as a step of {settings.tokens_per_step:,} tokens; got "
            f"{steps * settings.tokens_per_step:,.0f} tokens. Give more, or a smaller batch."
        )
    return int(steps)


def speed(same: Sequence[Result]) -> float:
    """Return the tokens per second of the first result of a model.

    It is the first, so that later results do not change the length of a training that is continued.
    """
    if not same:
        raise ValueError(
            "`--seconds` needs an earlier result of the same model, which gives its speed; the "
            "results have none. Run `search` with the same options, or give --tokens."
        )
    return same[0].tokens_per_second


def best_lr(same: Sequence[Result]) -> float:
    """Return the learning rate of the search with the smallest loss."""
    searches = [result for result in same if result.settings.is_search]
    if not searches:
        raise ValueError(
            "`--lr` must be given unless the results have a search of the same model; they have "
            "none. Run `search` with the same options, or give --lr."
        )
    return min(searches, key=lambda result: result.curve[-1].held_out_loss).settings.lr


# -- results ------------------------------------------------------------------------------------


def _add_results(commands: Any) -> None:
    parser = commands.add_parser("results", help="print tables of the results, and plot them")
    parser.set_defaults(run=run_results)
    add = parser.add_argument
    add("file", type=Path, nargs="?", default=Path("lm.jsonl"), metavar="FILE",
        help="default: lm.jsonl")  # fmt: skip
    add("--tokens", type=float, metavar="N",
        help="compare losses after so many tokens; default: those of the dense model")  # fmt: skip
    add("--seconds", type=float, metavar="N",
        help="compare losses after so much training; default: that of the dense model")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="write the curves into an image file")


def run_results(options: argparse.Namespace) -> None:
    """Print the tables, and write the plot."""
    if options.plot is not None:
        check_writable(options.plot, "--plot")
        check_format(options.plot)
    results = read_results(options.file)
    if not any(not result.settings.is_search for result in results):
        raise ValueError(
            f"`FILE` must have results of `train`; got '{options.file}', which has none. Run "
            "python benchmarks/lm train DATA first."
        )
    print(as_text(tables(results, options.tokens, options.seconds)))
    if options.plot is not None:
        plot(results, options.plot)
