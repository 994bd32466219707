"""A sparse Llama built on meta, with sharding, compilation and activation checkpoints, resumes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, SparsityCallback, sparsify
from sparse_lightning.sharding import gather_whole, is_sharded
from tests.callbacks.helpers import ACCELERATORS, loader, trainer
from tests.processes import end_rank, run_ranks

WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY, LENGTH = 64, 192, 4, 2, 50, 24
PROJECTIONS = ("*_proj",)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.compute, x, use_reentrant=False)
        return out

    def compute(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (
            projection(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: nn.ModuleList | None = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        with torch.device("meta"):
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        sparsify(self, block_size=16, density=0.4, include=PROJECTIONS)
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            block.compile(backend="inductor" if self.device.type == "cuda" else "aot_eager")
            fully_shard(block, mesh=mesh)
        for module in (self.embedding, self.norm, self.head):
            fully_shard(module, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * self.global_step + self.global_rank)
        start, step = torch.randint(VOCABULARY, (2, 8, 1), generator=generator)
        tokens = ((start + step * torch.arange(LENGTH + 1)) % VOCABULARY).to(self.device)
        x = self.embedding(tokens[:, :-1])
        assert self.blocks is not None
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_sharded_llama_resumes(accelerator: str, tmp_path: Path) -> None:
    for part in ("whole", "resumed"):
        run_ranks(__file__, tmp_path, accelerator, part)
    uninterrupted, resumed, other = (
        torch.load(tmp_path / f"{part}-{rank}.pt", weights_only=True)
        for part, rank in (("whole", 0), ("resumed", 0), ("resumed", 1))
    )
    assert uninterrupted.keys() == resumed.keys()
    for name, expected in uninterrupted.items():
        assert torch.equal(resumed[name], expected), name
        assert torch.equal(other[name], expected), name


def main(out: Path, accelerator: str, part: str) -> None:
    L.seed_everything(0)
    sparsity = SparsityCallback(
        block_size=16,
        density=0.4,
        include=PROJECTIONS,
        drop="movement",
        update={"every_n_steps": 3},
        drop_fraction=0.3,
    )
    callbacks: list[L.Callback] = [sparsity]
    if part == "whole":
        # Saved while scores are gathered for an update.
        callbacks.append(ModelCheckpoint(out, "{step}", every_n_train_steps=10, save_top_k=-1))
    fitting = trainer(
        *callbacks,
        root=out,
        accelerator=accelerator,
        devices=2,
        enable_checkpointing=part == "whole",
        deterministic=True,
        strategy=ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
        ),
    )
    model = Llama()
    before = out / "step=10.ckpt"
    fitting.fit(model, loader(100), ckpt_path=None if part == "whole" else before)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    assert len(layers) == 7 * LAYERS and all(is_sharded(m.values) for m in layers.values())
    assert sparsity.last_update is not None and sparsity.last_update.number == 6
    assert any(len(update.changed) for update in sparsity.last_update.layers.values())
    state = {
        name: gather_whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()
    }
    state |= {f"{name}.coords": layer.topology.coords.cpu() for name, layer in layers.items()}
    torch.save(state, out / f"{part}-{fitting.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    end_rank()
