"""`sparse-lightning inspect` shows the contents of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparse_lightning import BlockSparseLinear, BlockTopology, Sparsifier, SparsityCallback
from sparse_lightning.cli import main
from tests.callbacks.helpers import Classifier, loader, trainer

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    topology = BlockTopology.from_mask(MASK, 16, capacity=5)
    layer = BlockSparseLinear(64, 48, topology=topology)
    with torch.no_grad():
        layer.values[layer.topology.slots[MASK].long()] = torch.tensor([1.0, 3, 2]).view(3, 1, 1)
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(layer, nn.ReLU()).state_dict(), path)
    return str(path)


def test_layers(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = (lines[i].strip("| ").split("|") for i in (2, 4))
    assert [cell.strip() for cell in header[4:6]] == ["dead outputs", "unread inputs"]
    expected = "0, 48x64, 3 of 16x16, 0.250, 16, 32, float32, 16, 32, 48"
    assert [cell.strip() for cell in row] == expected.split(", ")


def test_a_pattern_within_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = BlockTopology.from_mask(MASK, 16, capacity=5)
    layers = [
        BlockSparseLinear(64, 48, topology=whole),
        BlockSparseLinear(64, 48, topology=whole.with_random_positions("2:4")),
    ]
    for layer in layers:
        nn.init.constant_(layer.values, 1.0)
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(*layers).state_dict(), path)
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])
    shown = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    columns = "layer", "blocks", "density", "weight density", "max"
    assert [tuple(row[column] for column in columns) for row in shown] == [
        ("0", "3 of 16x16", "0.250", "0.250", "16"),
        ("1", "3 of 16x16 at 2:4", "0.250", "0.125", "11.3"),  # the norm of 128 ones
        ("total", f"{3 * 256 + 3 * 128:,} weights", "0.250", "0.188", ""),
    ]
    assert main(["inspect", str(path), "--layer", "1"]) == 0
    assert capsys.readouterr().out.startswith(
        "1: 48x64, 3 of 3x4 blocks of 16x16 at 2:4, density 0.250, weight density 0.125\n"
    )


@pytest.mark.parametrize("every", [False, True])
def test_repeated_layers(every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layer(columns: int, value: float) -> BlockSparseLinear:
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[:, :columns] = True
        made = BlockSparseLinear(64, 64, topology=BlockTopology.from_mask(mask, 16))
        nn.init.constant_(made.values, value)
        return made

    blocks = [nn.ModuleDict({"up": layer(n, n), "down": layer(4, 1.0)}) for n in (1, 2)]
    path = tmp_path / "model.pt"
    torch.save(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}).state_dict(), path)
    assert main(["inspect", str(path), *(["--all"] if every else [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    names = [row[0] for row in cells[2:]]
    if every:
        expected = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
        assert names == [*expected, "total"] and "number" not in cells[0]
    else:
        assert names == ["blocks.*.up", "blocks.*.down", "total"]
        # 4 blocks of norm 16 and 8 of norm 32; (3 + 2) block columns that no block reads.
        up = "2, 64x64, 12 of 16x16, 0.250-0.500, 0, 80, float32, 16, 32, 32"
        assert cells[0][1] == "number" and cells[2][1:] == up.split(", ")
        assert cells[4][1] == "4"
    assert f"{(12 + 32) * 256:,} weights" in cells[-1] and "0.688" in cells[-1]


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparsity = SparsityCallback(block_size=16, density=0.5, update={"every_n_steps": 10})
    fitting = trainer(sparsity, root=tmp_path)
    fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "| net.0 " in out and "| net.2 " in out and "| head " not in out
    assert "Step 24, 2 topology updates, none left" in out
    assert "  update.every_n_steps: 10\n" in out and "  drop: magnitude\n" in out


@pytest.mark.parametrize("files", ["one", "several"])
def test_a_folder_of_transformers(
    files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
    model = transformers.LlamaForCausalLM(config)
    sparsity = Sparsifier(model, block_size=16, density=0.25, include=["*_proj"], total_steps=10)
    sparsity.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    folder = tmp_path / "checkpoint-0"
    model.save_pretrained(folder, max_shard_size="5GB" if files == "one" else "40KB")
    assert (folder / "model.safetensors").exists() == (files == "one")
    torch.save(sparsity.state_dict(), folder / "sparsity.pt")  # as the Trainer's callback does
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    (up,) = [row for row in rows if "model.layers.*.mlp.up_proj" in row]
    assert up[2:6] == ["2", "128x64", "16 of 16x16", "0.250"]
    assert "Step 0, 0 topology updates" in out and "  block_size: 16\n" in out
    assert main(["inspect", str(folder), "--layer", "model.layers.1.mlp.up_proj"]) == 0
    assert "8 of 8x4 blocks" in capsys.readouterr().out
    # An export needs another remedy than that of a folder whose files have to be joined.
    assert main(["export", str(folder), "--to", "dense"]) == 2
    assert "from_pretrained" in capsys.readouterr().err
    next(folder.glob("*.safetensors")).write_bytes(b"")
    assert main(["inspect", str(folder)]) == 2
    assert "checkpoint-0', which cannot be read" in capsys.readouterr().err


def test_mask_as_text(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved, "--layer", "0"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "0: 48x64, 3 of 3x4 blocks of 16x16, density 0.250"
    assert lines == ["▀▀", " ▀"]


def test_mask_as_png(saved: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert main(["inspect", saved, "--layer", "0", "--png", str(tmp_path / "mask.png")]) == 0
    pixels = np.asarray(image.open(tmp_path / "mask.png"))
    assert pixels.shape == (384, 512, 3)
    dark, light = [39, 73, 109], [237, 235, 229]
    assert (pixels[64::128, 64::128] == np.where(MASK[..., None], dark, light)).all()


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--png", "mask.png"], 2, "must come with `--layer`"),
        (["--all", "--layer", "0"], 2, "must come without `--layer`"),
        (["--layer", "fc"], 2, "got 'fc'. There are 1, among them 0."),
        (["--layer", "0", "--png", "no/such/folder/mask.png"], 1, "No such file or directory"),
    ],
)
def test_wrong_options(
    options: list[str], status: int, said: str, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", saved, *options]) == status
    assert said in capsys.readouterr().err


def test_without_block_sparse_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "dense.pt")
    assert main(["inspect", str(tmp_path / "dense.pt")]) == 2
    error = capsys.readouterr().err
    assert "must hold at least one block-sparse layer" in error and "export" not in error
