"""The examples as a user runs them: small, each in its own process."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import sparse_lightning
from sparse_lightning import BlockSparseLinear
from sparse_lightning.history import read_history
from tests import processes

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ("model=tiny", "trainer.max_steps=20", "trainer.val_check_interval=10")


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run an example and return its output; fail with the output if it fails."""
    environment = {"COLUMNS": "200"}
    return processes.run(EXAMPLES / script, *arguments, cwd=cwd, environment=environment).stdout


def value(name: str, output: str) -> float:
    """Return the number printed after `name`."""
    found = re.search(rf"^{name} +([\d.]+)", output, re.MULTILINE)
    assert found, output
    return float(found[1])


def load(name: str) -> ModuleType:
    """Import one of the examples' modules from its file."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train the tiny GPT; return its directory and output."""
    directory = tmp_path_factory.mktemp("tiny")
    return directory, run("train.py", *TINY, f"hydra.run.dir={directory}", cwd=directory)


def test_quickstart(tmp_path: Path) -> None:
    output = run("quickstart.py", cwd=tmp_path)
    accuracy, density = re.search(r"accuracy ([\d.]+), density ([\d.]+)", output).groups()
    assert float(accuracy) > 0.9
    assert float(density) == pytest.approx(0.25, abs=0.01)


def test_gpt_learns_and_writes_only_to_the_run_directory(
    first_run: tuple[Path, str],
) -> None:
    directory, output = first_run
    bits = value("bits per byte", output)
    assert math.isfinite(bits) and 0 < bits < 8
    assert value("density", output) == pytest.approx(0.25, abs=0.02)
    assert "class Parser" in output.split("Generated text")[1]
    assert (directory / "checkpoints" / "last.ckpt").stat().st_size > 100_000
    assert list(directory.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in directory.iterdir()} <= {
        *(".hydra", "checkpoints", "sparse-lightning", "train.log", "wandb")
    }
    (history,) = directory.glob("sparse-lightning/*/pattern.history")  # W&B's project and run
    assert read_history(history).frames[-1].number > 0


def test_gpt_resumes(first_run: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = first_run[0] / "checkpoints" / "last.ckpt"
    output = run(
        *("train.py", *TINY, "trainer.max_steps=30", "logger=csv"),
        *(f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}"),
        cwd=tmp_path,
    )
    assert value("density", output) == pytest.approx(0.25, abs=0.02)
    (log,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    steps = [int(row["step"]) for row in csv.DictReader(log.open())]
    assert steps and min(steps) >= 20 and max(steps) <= 30


def test_presets_run_in_a_sweep(tmp_path: Path) -> None:
    overrides = ["callbacks/sparsity=rigl,set", "logger=csv", f"hydra.sweep.dir={tmp_path}"]
    output = run("train.py", "--multirun", *TINY, *overrides, cwd=tmp_path)
    assert output.count("bits per byte") == 2
    for job in "01":
        assert (tmp_path / job / "checkpoints" / "last.ckpt").exists()


def test_digits(tmp_path: Path) -> None:
    short = ("trainer.max_steps=200", "logger=csv", f"hydra.run.dir={tmp_path}")
    output = run("train.py", "task=digits", *short, cwd=tmp_path)
    assert value("accuracy", output) > 0.9
    assert value("density", output) == pytest.approx(0.25, abs=0.02)


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Debian package 'dataset-fashion-mnist'"):
        load("data").FashionMNIST(8, root=str(tmp_path / "nowhere")).load()


def test_held_out_text_is_not_trained_on() -> None:
    text = load("data").StdlibBytes(context=64, batch_size=4, train_windows=10, val_windows=10)
    text.setup("fit")
    train, held_out = bytes(text.train.text.tolist()), bytes(text.val.text.tolist())
    files = [file for file in held_out.split(b"\0") if len(file) > 10_000]
    assert len(files) > 10
    assert not any(file in train for file in files)
    assert len(train) > 10 * len(held_out)


def test_throughput(tmp_path: Path) -> None:
    size = "--width 64 --layers 1 --heads 2 --context 64 --batch 2 --block-size 16"
    turns = "--steps 1 --rounds 1 --densities 0.5 --device cpu"
    rows = run("throughput.py", *size.split(), *turns.split(), cwd=tmp_path).splitlines()
    names = ["dense", "block-sparse, density 0.5", "dense, MLPs 0.5 as wide"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows[-3:]] == names
    assert rows[-3].endswith(" | 1.00 |")


def test_throughput_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than all else
    size = "--width 64 --layers 1 --heads 2 --context 64 --batch 2 --block-size 16"
    turns = "--steps 1 --rounds 1 --densities 0.5 --device cpu"
    done = processes.run_ranks(EXAMPLES / "throughput.py", *size.split(), *turns.split())
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and rows[-3].endswith(" | 1.00 |"), "printed once"


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ON_GPU = [
    pytest.param(mode, "cuda", marks=[pytest.mark.gpu, NO_GPU]) for mode in ("graph", "compile")
]


@pytest.mark.parametrize(("mode", "device"), [("eager", "cpu"), ("compile", "cpu"), *ON_GPU])
def test_generate(mode: str, device: str, tmp_path: Path) -> None:
    """The script compares block-sparse with dense logits, and each mode's steps with eager ones."""
    size = "--width 64 --hidden 128 --layers 1 --heads 4 --kv-heads 2 --vocabulary 96"
    runs = "--prompt 4 --new 3 --batches 2 --prefill 2 8 --rounds 1 --block-sizes 16 --host"
    given = f"{size} {runs} --densities 0.1 --mode {mode} --device {device}"
    output = run("generate.py", *given.split(), cwd=tmp_path)
    for title in ("Decoding, batch 2, 3 tokens after 4:", "Prefill, 2 x 8 tokens:"):
        rows = output.split(title)[1].split("\n\n")[0].splitlines()[3:]
        cells = [row.strip("| ").split(" | ") for row in rows]
        sparse = ["MLPs at 0.25, blocks of 16", "all layers at 0.1, blocks of 16"]
        assert [name for name, *_ in cells] == ["dense", *sparse]
        assert cells[0][2] == "1.00" and all(int(rate.replace(",", "")) for _, rate, *_ in cells)
    assert re.search(r"^\| density 0.1, blocks of 16 \| [\d.]+ \|$", output, re.MULTILINE)


@pytest.fixture
def llama() -> nn.Module:
    """A small model whose greedy tokens vary."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes, **heads, vocab_size=96, initializer_range=0.2, eos_token_id=None
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_generate_decodes_as_transformers_does(llama: nn.Module) -> None:
    prompt = torch.randint(96, (3, 5))
    decoder = load("generate").Decoder(llama, prompt, new=8)
    expected = llama.generate(prompt, max_new_tokens=9, do_sample=False)
    assert len(expected[0, 5:].unique()) > 3
    for _ in range(2):  # a second run starts anew
        decoder.start()
        decoder.run()
        assert torch.equal(decoder.tokens, expected)


@torch.no_grad()
def test_generate_refuses_wrong_logits(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = load("generate")
    options = argparse.Namespace(batches=[1], prefill=[2, 8], vocabulary=96, device="cpu")
    sparse_lightning.sparsify(llama, block_size=16, density=0.25)
    generate.check_sparse(llama, "sparse", options)
    forward = BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: 1.001 * forward(self, x))
    with pytest.raises(RuntimeError, match=r"error must be below .* \(sparse, input \(1, 1\)\)"):
        generate.check_sparse(llama, "sparse", options)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [("gpt", 64, 808_159_232), ("mlp", 2, 335_740_938), ("encoder", 48, 304_324_584)],
)
def test_models_to_plan(name: str, layers: int, parameters: int) -> None:
    """Build the large models on the meta device."""
    found = sparse_lightning.plan(load(name).build)
    assert len(found.layers) == layers and found.dense.parameters == parameters


def test_the_encoder() -> None:
    model = load("encoder").Encoder(width=32, layers=2, heads=2, image=8, patch=4, classes=5)
    found = sparse_lightning.plan(model, "2,3,8,8", block_sizes=[16], densities=[0.5], device="cpu")
    assert [layer.tokens for layer in found.layers.values()] == [8, 8, 8, 8]
