"""A byte-level GPT, whose vocabulary is the 256 values of a byte, so it needs no tokenizer."""

from __future__ import annotations

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256
NEARBY = 4


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings; it stays dense in these examples."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10_000 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)  # [context, half]
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate each pair of features of `x` [batch, heads, time, 2 * half] by its position."""
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [batch, time, width] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention followed by an MLP with a hidden layer four times as wide."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [batch, time, width] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(L.LightningModule):
    """Predict the next byte; the metric is bits per byte (8 for random bytes)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context: int,
        lr: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embeddings = nn.ModuleList(nn.Embedding(BYTES, width) for _ in range(NEARBY))
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The last matrices of the 2 * layers residual branches have a smaller variance.
                branch_end = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if branch_end else 1))
        if compile:
            for block in self.blocks:
                block.compile()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [batch, time, 256] of the byte after each of `tokens` [batch, time]."""
        # Attention is slow to learn spelling; adding the embeddings of the preceding bytes supplies
        # it, and gains 0.3 bits per byte in a short training.
        x = sum(
            embedding(F.pad(tokens, (distance, 0))[:, : tokens.shape[1]])
            for distance, embedding in enumerate(self.embeddings)
        )
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def bits_per_byte(self, windows: Tensor) -> Tensor:
        """Return the mean bits per byte of `windows` [batch, context + 1] after the first byte."""
        logits = self(windows[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        return nats / math.log(2)

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self.bits_per_byte(windows)
        self.log("train/bits_per_byte", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, batch_idx: int) -> None:
        """Log the bits per byte of one held-out batch."""
        loss = self.bits_per_byte(windows)
        self.log("val/bits_per_byte", loss, prog_bar=True, batch_size=len(windows), sync_dist=True)

    def configure_optimizers(self) -> dict:
        """Return AdamW that decays matrices only, with a linear warmup and a cosine to zero."""
        # The `values` of a block-sparse layer have three dimensions: [slots, B, B].
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.hparams.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # In mixed precision Lightning does not clip the gradients of a fused optimizer.
        fused = not self.trainer.precision.endswith("mixed")
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.95), fused=fused)
        total, warmup = self.trainer.estimated_stepping_batches, self.hparams.warmup_steps

        def factor(step: int) -> float:
            progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
            return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @torch.inference_mode()
    def generate(self, prompt: str, length: int, temperature: float = 0.6, seed: int = 0) -> str:
        """Continue `prompt` by `length` bytes, sampled at `temperature`; return both as text."""
        generator = torch.Generator(self.device).manual_seed(seed)
        tokens = torch.tensor([list(prompt.encode())], device=self.device)
        for _ in range(length):
            logits = self(tokens[:, -self.hparams.context :])[:, -1].float()
            chances = (logits / temperature).softmax(-1)
            tokens = torch.cat((tokens, chances.multinomial(1, generator=generator)), dim=1)
        text = bytes(tokens[0].tolist()).decode(errors="replace")
        # An untrained model samples control characters, which a terminal would obey.
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )


def build() -> GPT:
    """Return a GPT of 0.8 billion parameters, for `sparse-lightning plan examples.gpt:build`."""
    return GPT(width=2048, layers=16, heads=16, context=2048)
