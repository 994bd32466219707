"""`benchmarks/lm`: tokens, trainings in pieces, tables and errors."""

from __future__ import annotations

import doctest
import json
import random
import shlex
import subprocess
import sys
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm import command, data, results, settings, training
from lm.data import Batches
from lm.settings import DENSE, RULES, Settings, callback_keywords
from lm.training import Point, Result, StepTimer, without_warmup
from tokenizers import Tokenizer

from sparse_lightning.config import SparsityConfig

ROOT = Path(__file__).parents[2]
TINY = (
    "--device cpu --eager --width 64 --layers 2 --heads 2 --context 32 --batch 4 --log-every 5 "
    "--held-out 8 --block-size 16 --tokens 2560 --lr 1e-3"
)
STEPS = 20  # of TINY


def documents() -> dict[str, str]:
    """Return 60 texts of words by name; two of them are equal."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(100)]
    texts = {f"{i % 4}/{i}.txt": " ".join(generator.choices(words, k=150)) for i in range(60)}
    return {**texts, "copy.md": texts["0/0.txt"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, content in documents().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "image.png").write_bytes(b"no text")
    (folder / "binary.c").write_bytes(b"no\0text")
    return folder


@pytest.fixture(scope="module")
def tokens(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "a"
    assert run("prepare", text, folder, "--vocabulary 300 --held-out .3") == 0
    return folder


def run(name: str, *arguments: object) -> int:
    return command.main([name, *shlex.split(" ".join(map(str, arguments)))])


def train(tokens: Path, folder: Path, options: str = "") -> Result:
    """Train a tiny model, and return its result."""
    file = folder / "lm.jsonl"
    assert run("train", tokens, TINY, f"--results {file} --runs {folder / 'runs'}", options) == 0
    return results.read_results(file)[-1]


def weights(folder: Path, result: Result) -> dict[str, Any]:
    saved = torch.load(folder / "runs" / f"{result.settings.name}.pt", weights_only=True)
    return saved["weights"]


# -- text and tokens ----------------------------------------------------------------------------


def decode(folder: Path, file: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.fromfile(folder / file, np.uint16)
    *texts, end = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert end == ""
    return texts


def test_every_document_is_encoded_on_one_side(tokens: Path) -> None:
    train, held_out = decode(tokens, "train.bin"), decode(tokens, "held_out.bin")
    assert sorted(train + held_out) == sorted(documents().values())
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / len(documents()) < 0.5
    summary = data.read_summary(tokens)
    assert summary.held_out_bytes == sum(map(len, held_out))
    assert summary.held_out_tokens == (tokens / "held_out.bin").stat().st_size // 2


def test_tokens_are_reproducible(
    text: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert run("prepare", text, again, "--vocabulary 300 --held-out .3") == 0
    for file in ("train.bin", "held_out.bin", "tokenizer.json", "summary.json"):
        assert (again / file).read_bytes() == (tokens / file).read_bytes()
    (again / "train.bin").unlink()  # is not made again
    assert run("prepare", text, again, "--vocabulary 300 --held-out .3") == 0
    assert not (again / "train.bin").exists()
    assert run("prepare", text, again, "--vocabulary 310 --held-out .3") == 2
    assert "`FOLDER` must be new, or hold tokens of the same source" in capsys.readouterr().err


def test_a_corpus_is_the_same_from_a_folder_and_an_archive(text: Path, tmp_path: Path) -> None:
    archive = tmp_path / "text.tar.xz"
    with tarfile.open(archive, "w:xz") as members:
        for path in sorted(text.rglob("*"), reverse=True):
            members.add(path, path.relative_to(text).as_posix(), recursive=False)
    for source, file in ((text, "a.txt.xz"), (archive, "b.txt.xz")):
        assert run("corpus", source, tmp_path / file, "--megabytes .02") == 0
    chosen = [content.decode() for _, content in data.read_documents(tmp_path / "a.txt.xz")]
    assert (tmp_path / "a.txt.xz").read_bytes() == (tmp_path / "b.txt.xz").read_bytes()
    assert set(chosen) < set(documents().values())
    assert 20_000 <= sum(map(len, chosen)) < 21_000
    given = "--vocabulary 280 --held-out .3"
    assert run("prepare", tmp_path / "a.txt.xz", tmp_path / "a", given) == 0


def test_a_batch_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    np.arange(10 * 8 + 5, dtype=np.uint16).tofile(file)  # 10 windows, 3 batches of 3 an epoch
    batches = Batches(file, context=8, batch=3, seed=1)
    epoch = [batches[step] for step in range(3)]
    assert epoch[0].shape == (3, 9)
    starts = torch.cat(epoch)[:, 0]
    assert len(starts.unique()) == 9 and (starts % 8 == 0).all()
    assert torch.equal(torch.cat(epoch), starts[:, None] + torch.arange(9))
    later = batches[7]
    assert not torch.equal(batches[3], epoch[0])
    again = Batches(file, context=8, batch=3, seed=1)
    assert torch.equal(again[7], later) and torch.equal(again[0], epoch[0])
    assert not torch.equal(Batches(file, context=8, batch=3, seed=2)[0], epoch[0])
    assert [len(windows) for windows in batches.evenly(8)] == [3, 3]


# -- training -----------------------------------------------------------------------------------


def test_a_training_leaves_a_curve_and_weights(tokens: Path, tmp_path: Path) -> None:
    result = train(tokens, tmp_path, "--mlp-width .5")
    assert [point.step for point in result.curve] == [0, 5, 10, 15, 20]
    assert [point.tokens for point in result.curve] == [0, 640, 1280, 1920, 2560]
    seconds = [point.seconds for point in result.curve]
    assert seconds == sorted(set(seconds)) and seconds[-1] < result.wall_seconds
    assert result.curve[0].train_loss is None
    assert result.curve[0].held_out_loss == pytest.approx(np.log(300), abs=0.2)
    assert result.curve[-1].held_out_loss < result.curve[0].held_out_loss - 0.3
    # Two layers with an attention of 4 * 64 * 64 and MLPs of 128 hidden features; and the head.
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 300
    assert result.curve[-1].flops == 6 * 2560 * (linear + 2 * 32 * 64)
    saved = weights(tmp_path, result)
    assert result.parameters == sum(tensor.numel() for tensor in saved.values())
    assert saved["blocks.0.mlp.0.weight"].shape == (128, 64)
    assert result.settings.label == "dense, MLPs 0.5 as wide"
    assert "commit" in result.environment
    before = (tmp_path / "lm.jsonl").read_text()
    assert train(tokens, tmp_path, "--mlp-width .5") == result
    assert (tmp_path / "lm.jsonl").read_text() == before


@pytest.mark.parametrize("options", ["--rule rigl --updates 20", "--rule cubic-regrow --seed 3"])
def test_pieces_equal_the_whole(
    options: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    whole = train(tokens, tmp_path / "whole", options)
    folder = tmp_path / "pieces"
    where = f"--results {folder / 'lm.jsonl'} --runs {folder / 'runs'}"
    for _ in range(3):
        capsys.readouterr()
        assert run("train", tokens, TINY, where, options, "--minutes 0") == 0
        assert "Time is up; the same command continues" in capsys.readouterr().out
        assert not (folder / "lm.jsonl").exists()
    pieces = train(tokens, folder, f"{options} --minutes 0")
    assert [replace(point, seconds=0.0) for point in pieces.curve] == [
        replace(point, seconds=0.0) for point in whole.curve
    ]
    assert pieces.settings == whole.settings and pieces.density == whole.density
    expected, found = weights(tmp_path / "whole", whole), weights(folder, pieces)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not list((folder / "runs").glob("*.ckpt"))


@pytest.mark.parametrize("sparse", ["mlps", "all"])
def test_llama(sparse: str, tokens: Path, tmp_path: Path) -> None:
    options = f"--model llama --rule set --density .5 --sparse {sparse} --updates 5"
    result = train(tokens, tmp_path, options)
    assert result.density == pytest.approx(0.5, abs=0.01)
    layers = {name.split(".")[-2] for name in weights(tmp_path, result) if name.endswith("values")}
    mlps = {"gate_proj", "up_proj", "down_proj"}
    assert layers == mlps | ({"q_proj", "k_proj", "v_proj", "o_proj"} if sparse == "all" else set())


def test_a_training_starts_from_a_dense_one(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = train(tokens, tmp_path)
    start = tmp_path / "runs" / f"{dense.settings.name}.pt"
    before = weights(tmp_path, dense)
    options = f"--rule movement --updates 10 --start {start}"
    for distill in (0, 0.5):
        result = train(tokens, tmp_path, f"{options} --distill {distill}")
        first = result.curve[0].held_out_loss
        assert first == pytest.approx(dense.curve[-1].held_out_loss, abs=1e-5)
        assert result.density == pytest.approx(0.25, abs=0.01)
        assert result.settings.start == dense.settings.name
    assert result.settings.label == "movement, B=16, d=.25, from dense, distilled 0.5"
    assert all(torch.equal(weights(tmp_path, dense)[name], before[name]) for name in before)
    where = f"--results {tmp_path / 'lm.jsonl'} --runs {tmp_path / 'runs'}"
    assert run("train", tokens, TINY, where, options, "--layers 1") == 2
    assert "`--start` must be weights of the same model" in capsys.readouterr().err
    sparse = tmp_path / "runs" / f"{result.settings.name}.pt"
    assert run("train", tokens, TINY, where, f"--start {sparse}") == 2
    assert "`--start` must be weights of a dense model" in capsys.readouterr().err


def test_the_distilled_loss_is_least_at_the_teacher() -> None:
    logits = torch.randn(2, 3, 5)
    assert training.divergence(logits, logits + 1).item() == pytest.approx(0, abs=1e-6)
    p, q = logits.softmax(-1), torch.full((5,), 0.2)
    expected = (q * (q / p).log()).sum(-1).mean()
    found = training.divergence(logits, torch.zeros(2, 3, 5))
    torch.testing.assert_close(found, expected)


def test_a_search_gives_the_rate_and_the_speed(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = TINY.replace("--lr 1e-3", "") + " --seed 1"
    where = f"--results {tmp_path / 'lm.jsonl'} --runs {tmp_path / 'runs'}"
    assert run("train", tokens, base, where) == 2
    assert "Run `search` with the same options, or give --lr." in capsys.readouterr().err
    searched = base.replace("--seed 1", "--tokens 1280 --lrs 1e-5 3e-3")
    assert run("search", tokens, searched, where) == 0
    assert "The best of them is 0.003." in capsys.readouterr().out
    assert run("train", tokens, base, where) == 0
    first, *_, last = results.read_results(tmp_path / "lm.jsonl")
    assert last.settings.lr == 3e-3 and last.settings.steps == STEPS
    timed = base.replace("--tokens 2560", f"--seconds {1280 / first.tokens_per_second * 1.01}")
    assert run("train", tokens, timed, where) == 0
    assert results.read_results(tmp_path / "lm.jsonl")[-1].settings.steps == 10


@pytest.mark.parametrize("rule", RULES)
def test_rules_end_at_the_density(rule: str) -> None:
    given = replace(BY_HAND, rule=rule, block_size=64, density=0.1, sparse="mlps", updates=30,
                    drop_fraction=0.1, steps=1200)  # fmt: skip
    config = SparsityConfig(**callback_keywords(given))
    assert config.density_at(1.0) == 0.1
    assert config.update.every_n_steps == 40
    assert (config.init, config.monitor) == ("random", None)
    assert SparsityConfig(**callback_keywords(replace(given, start="a"))).init == "magnitude"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--width 60 --heads 4", "`--width` must be a multiple of 2 * `--heads`; got 60 and 4."),
        ("--density 2", "density"),
        ("--mlp-width 0", "`--mlp-width` must be positive; got 0."),
        ("--distill .5", "`--distill` needs a dense model; got 0.5 without `--start`."),
        ("--warmup 2", "`--warmup` must be a share in [0, 1]; got 2."),
        ("--start nowhere.pt", "`--start` must be weights; got 'nowhere.pt'."),
        ("--tokens 100", "must be as long as a step of 128 tokens; got 100 tokens."),
        ("--batch 400 --tokens 1e6", "`--batch` must not exceed the"),
        ("--layers 0", "`--layers` must be at least 1; got 0."),
    ],
)
def test_errors(
    options: str, says: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"--results {tmp_path / 'lm.jsonl'} --runs {tmp_path / 'runs'}"
    assert run("train", tokens, TINY, where, options) == 2
    assert says in capsys.readouterr().err


def test_errors_of_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in [
        (("prepare", tmp_path / "nothing", tmp_path / "a"), "must be a folder or a file that"),
        (("prepare", text / "image.png", tmp_path / "a"), "a tar archive, or a .txt or .txt.xz"),
        (("prepare", text, tmp_path / "a", "--vocabulary 10"), "from 257 to 65536; got 10."),
        (("prepare", text, tmp_path / "a", "--vocabulary 60000"), "that the sample of the text"),
        (("prepare", text, tmp_path / "a", "--held-out 1"), "must be a share in (0, 1); got 1.0"),
        (("corpus", text, tmp_path / "a.txt"), "`FILE` must end in .txt.xz"),
        (("corpus", tmp_path, tmp_path / "a.txt.xz"), "must have documents"),
        (("train", text, TINY), "must be a folder that `prepare` has written"),
        (("results", tmp_path / "none.jsonl"), "must have results of `train`"),
    ]:
        assert run(*arguments) == 2
        assert says in capsys.readouterr().err


# -- time ---------------------------------------------------------------------------------------


def test_warmup_is_counted_as_other_steps() -> None:
    assert without_warmup([1.0, 2.0, 3.0], first=3) == (6.0, 0)
    assert without_warmup([9.0, 9.0, 9.0, 1.0, 2.0, 3.0], first=0) == (6.0 + 3 * 2.0, 3)
    assert without_warmup([9.0, 1.0, 2.0, 3.0], first=2) == (6.0 + 2.0, 1)
    assert without_warmup([1.0, 1.0, 9.0, 1.0, 100.0], first=3) == (12.0 + 1.0, 1)
    assert without_warmup([4.0, 4.0], first=0) == (8.0, 0)  # there are no others


def test_the_timer_measures_each_step() -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        timer.start()
        for _ in range(3):
            timer.mark()
        assert len(timer.read()) == 3 and min(timer.read()) >= 0


# -- results ------------------------------------------------------------------------------------

BY_HAND = Settings(
    data="d1", vocabulary=16_384, model="gpt", width=1024, layers=12, heads=16, mlp_width=1.0,
    context=1024, batch=48, steps=100, rule=DENSE, block_size=None, density=None, sparse=None,
    updates=None, drop_fraction=None, start=None, distill=0.0, lr=1e-3, warmup=0.05, seed=0,
    precision="bf16-mixed", compile=True, log_every=50, held_out=480, is_search=False,
)  # fmt: skip


def by_hand(losses: list[float], seconds: float, **changes: Any) -> Result:
    """Return a result with points after each million tokens, `seconds` apart."""
    curve = [
        Point(i, i * 10**6, i * seconds, i * 1e15, None if i == 0 else loss, loss)
        for i, loss in enumerate(losses)
    ]
    environment = {"device": "GPU", "commit": "abc"}
    return Result(replace(BY_HAND, **changes), environment, curve, 10**8, 1.0, 2**31, 99.0, 3)


SPARSE = {"rule": "static", "block_size": 128, "density": 0.25, "sparse": "mlps"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two seeds of a dense model; a faster one that ends early, and one that is not as good."""
    path = tmp_path / "lm.jsonl"
    # The tables leave out the search.
    for result in [
        by_hand([9.0, 5.0, 4.0, 3.0], seconds=10),
        by_hand([9.0, 5.0, 4.0, 3.5], seconds=10, seed=1),
        by_hand([9.0, 6.0, 4.0, 2.0, 1.0], seconds=4, **SPARSE),
        by_hand([9.0, 6.0, 4.0], seconds=4, seed=1, **SPARSE),
        by_hand([9.0, 8.0], seconds=1, mlp_width=0.25, steps=7),
        by_hand([9.0, 1.0], seconds=1, is_search=True),
        by_hand([9.0, 7.0], seconds=1, model="llama", **SPARSE),
    ]:
        results.append_result(path, result)
    return path


def test_tables_by_hand(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("results", file) == 0
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
        for part in capsys.readouterr().out.split("\n\n")
        if part.startswith("|")
    ]
    head, _, *rows = tables[0]
    assert head == ["model", "at its end", "at 3 M tokens", "at 30 s", "seconds to dense's loss"]
    assert rows == [
        ["dense", "3.250 ± 0.354", "3.250 ± 0.354", "3.250 ± 0.354", "30 ± 0"],
        # The first seed falls from 4 to 3 in half of the third interval; the second never does.
        ["static, B=128, d=.25", "2.500 ± 2.121", "2.000 (1 of 2 seeds)", "–", "10 (1 of 2 seeds)"],
        ["dense, MLPs 0.25 as wide", "8.000", "–", "–", "–"],
    ]
    head, _, *rows = tables[1]
    assert rows[1] == ["static, B=128, d=.25", "0 1", "0.001", "4", "250000 ± 0", "3.0 ± 1.4",
                       "100.0", "1", "2.0 ± 0.0"]  # fmt: skip
    # The Llama has no dense training.
    assert tables[2][2:] == [["static, B=128, d=.25", "7.000"]]


def test_places_of_the_tables_are_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("results", file, "--tokens 1.5e6 --seconds 6") == 0
    out = capsys.readouterr().out
    assert "There is no dense training to compare with." in out
    row = next(line for line in out.splitlines() if line.startswith("| static"))
    # Halfway between the points at 1 and 2 M tokens, and at 4 and 8 s.
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["5.000 ± 0.000", "5.000 ± 0.000"]


def test_lengths_of_one_variant_are_told_apart() -> None:
    long = by_hand([9.0, 5.0, 4.0, 3.0], seconds=10, steps=150, **SPARSE)
    (variants,) = results.group([by_hand([9.0, 5.0], seconds=10, **SPARSE), long]).values()
    assert list(variants) == [f"static, B=128, d=.25, {n} M tokens" for n in (1, 3)]


def test_variants_belong_to_the_budget_of_the_nearest_dense_training() -> None:
    found = results.group(
        [
            by_hand([9.0, 5.0], seconds=10),
            by_hand([9.0] * 9, seconds=10, steps=400),
            by_hand([9.0] * 7, seconds=10, steps=300, **SPARSE),
            by_hand([9.0] * 3, seconds=10, steps=100, **SPARSE),
        ]
    )
    assert [title.rpartition(", ")[2] for title in found] == [
        "budget of 1 M tokens",
        "budget of 8 M tokens",
    ]
    for (label, variant), steps in zip(
        (item for variants in found.values() for item in variants.items()),
        (100, 100, 400, 300),
        strict=True,
    ):
        assert variant[0].settings.steps == steps and "M tokens" not in label


def test_of_several_learning_rates_the_best_one_counts() -> None:
    trainings = [
        by_hand([9.0, loss], seconds=10, lr=lr, seed=seed)
        for lr, seed, loss in ((1e-3, 0, 4.0), (2e-3, 0, 3.0), (2e-3, 1, 5.0), (1e-3, 1, 2.0))
    ]
    (variants,) = results.group(trainings).values()
    assert [r.settings.lr for r in variants["dense"]] == [2e-3, 2e-3], "chosen at the first seed"


def test_the_plot_is_drawn(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = file.with_name("lm.png")
    assert run("results", file, f"--plot {image}") == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert run("results", file, f"--plot {file.with_name('lm.xyz')}") == 2
    assert "`--plot` must end in one of" in capsys.readouterr().err


def test_results_survive_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results.read_results(file)
    assert found[2] == by_hand([9.0, 6.0, 4.0, 2.0, 1.0], seconds=4, **SPARSE)
    assert json.loads(file.read_text().splitlines()[2]) == json.loads(json.dumps(asdict(found[2])))
    file.write_text('{"settings": 1}\n')
    assert run("results", file) == 2
    assert "whose line 1 is another" in capsys.readouterr().err


def test_doctests_and_the_command() -> None:
    for module in (data, results, settings, training):
        failed, _ = doctest.testmod(module)
        assert not failed
    # The folder itself is a program.
    program = [sys.executable, "benchmarks/lm", "train", "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--mlp-width" in done.stdout, done.stderr
