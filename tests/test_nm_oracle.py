"""2:4 training equals the same training of masked dense weights, written down a second time.

The reference knows nothing of slots, positions or the library's functions: it holds dense weights
with a mask, decides every exchange from dense gradients, and steps an AdamW of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, Sparsifier
from sparse_lightning.policy.updates import ModelUpdate

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.99), 1e-8, 0.01
FRACTION = 0.3
STEPS = 50
FALLING = {"schedule": "linear", "initial": 0.75, "final": 0.25, "until": 0.7}


class Dense:
    """A dense weight, which is zero outside of its mask, and the state of AdamW.

    Attributes:
        weight: `[out, in]`, a leaf.
        kept: bool of the same shape, the weights that exist.
        pending: bool of the same shape, the weights that have had no gradient yet.
    """

    def __init__(self, weight: Tensor, kept: Tensor, block_size: int = 1) -> None:
        self.weight = weight.clone().requires_grad_()
        self.kept, self.block_size = kept, block_size
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)
        self.pending = torch.zeros_like(kept)

    def by_block(self, tensor: Tensor) -> Tensor:
        """View `[out, in]` as `[rows, cols, B * B]`."""
        size = self.block_size
        blocks = tensor.unflatten(0, (-1, size)).unflatten(2, (-1, size))
        return blocks.transpose(1, 2).flatten(2)

    def whole(self, mask: Tensor) -> Tensor:
        """Repeat one element per block, `[rows, cols]`, to `[out, in]`."""
        size = self.block_size
        return mask.repeat_interleave(size, 0).repeat_interleave(size, 1)

    def step(self, taken: int) -> None:
        """Take a step of AdamW after `taken` earlier ones."""
        assert self.weight.grad is not None
        gradient = self.weight.grad * self.kept
        squared, corrections = gradient.square(), [1 - beta ** (taken + 1) for beta in BETAS]
        if self.pending.any():
            mean = self.by_block(squared).sum(-1) / self.by_block(self.kept).sum(-1).clamp(min=1)
            ready = self.pending & self.whole(mean > 0)
            start = torch.maximum(squared, self.whole(mean)) * (1 - BETAS[1] ** taken)
            self.v = torch.where(ready, start, self.v)
            self.pending &= ~ready
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * squared
        size = (self.v / corrections[1]).sqrt() + EPS
        with torch.no_grad():
            self.weight *= 1 - LR * DECAY
            self.weight -= LR / corrections[0] * self.m / size
        assert not self.weight[~self.kept].any()

    def update(
        self, gradient: Tensor, n_blocks: int, inner: bool, given: Tensor | None, drawn: Tensor
    ) -> None:
        """Exchange blocks, and weights within those that stay.

        Args:
            gradient: the dense gradient of this step.
            n_blocks: number of blocks afterwards.
            inner: whether to exchange weights.
            given: the blocks afterwards, `[rows, cols]`; None to decide them by the gradient.
            drawn: bool `[out, in]`, the weights that grown blocks keep, which are random.
        """
        weight = self.weight.detach()
        before = self.by_block(self.kept).any(-1)
        after = given
        if after is None:
            norms = self.by_block(weight).norm(dim=-1).masked_fill(~before, -torch.inf)
            n_grown = min(round(FRACTION * n_blocks), before.numel() - n_blocks)
            after = largest(norms, n_blocks - n_grown)
            rest = self.by_block(gradient).norm(dim=-1).masked_fill(after, -torch.inf)
            after = after | largest(rest, n_grown)
        stays, grown = self.whole(before & after), self.whole(after & ~before)
        exchanged = self.kept & stays
        if inner:
            n = round(FRACTION * int(exchanged.sum()))
            exchanged = exchange(weight, gradient, exchanged, n)
        kept = exchanged | (grown & drawn)
        new = kept & ~(self.kept & stays)
        with torch.no_grad():
            self.weight[new | ~kept] = 0
        self.m[new | ~kept] = 0
        self.v[new | ~kept] = 0
        self.pending = (self.pending & kept) | new
        self.kept = kept


def largest(scores: Tensor, n: int) -> Tensor:
    """Return a mask of the `n` largest elements, none of which is as large as the next."""
    order = scores.flatten().argsort(descending=True)
    assert n in (0, len(order)) or scores.flatten()[order[n - 1]] > scores.flatten()[order[n]]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view(scores.shape)


def exchange(weight: Tensor, gradient: Tensor, kept: Tensor, n: int) -> Tensor:
    """Return the mask in which up to `n` weights gave way to steeper ones of their four."""
    fours = weight.abs().view(-1, 4).masked_fill(~kept.view(-1, 4), torch.inf).tolist()
    steep, result = gradient.abs().view(-1, 4).tolist(), kept.view(-1, 4).clone()
    for four in sorted(range(len(fours)), key=lambda four: min(fours[four]))[:n]:
        columns = sorted(range(4), key=fours[four].__getitem__)
        small, large = columns[:2]
        best = max((c for c in columns if c != large), key=steep[four].__getitem__)
        result[four, small], result[four, best] = False, True
    return result.view(kept.shape)


class Reference:
    """Trains dense copies of a model's layers, `[tanh(layer), ..., layer]`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.weights: list[Dense] = []
        self.biases: list[Dense] = []
        for layer in layers:
            if isinstance(layer, BlockSparseLinear):
                kept = layer.topology.unpack(
                    torch.ones_like(layer.values.detach(), dtype=torch.bool)
                )
                self.weights.append(Dense(layer.dense_weight(), kept, layer.block_size))
            else:
                weight = layer.weight.detach()
                self.weights.append(Dense(weight, torch.ones_like(weight, dtype=torch.bool)))
            bias = layer.bias.detach()
            self.biases.append(Dense(bias, torch.ones_like(bias, dtype=torch.bool)))
        self.taken = 0

    def step(self, x: Tensor, y: Tensor) -> float:
        for part in (*self.weights, *self.biases):
            part.weight.grad = None
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(x.tanh() if i else x, weight.weight, bias.weight)
        loss = (x - y).square().mean()
        loss.backward()
        for part in (*self.weights, *self.biases):
            part.step(self.taken)
        self.taken += 1
        return loss.item()


CASES: dict[str, dict[str, Any]] = {
    "gradient-16": {},
    "gradient-32": {"block_size": 32},
    "gradient-64-falling": {"block_size": 64, "density": FALLING},
    "random-16": {"grow": "random"},
    "gradient-16-falling": {"density": FALLING},
    "inner-fixed": {"regrow_inner": False},
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_masked_dense_weights(case: str) -> None:
    """Fifty steps of AdamW in fp64, with an update every five."""
    options: dict[str, Any] = {"block_size": 16, "density": 0.4, "grow": "gradient", **CASES[case]}
    size, inner = options["block_size"], options.get("regrow_inner", True)
    torch.manual_seed(0)
    sizes = (4 * size, 3 * size, 5 * size) if size < 64 else (3 * size, 3 * size, 2 * size)
    model = nn.Sequential(
        nn.Linear(sizes[0], sizes[1]),
        nn.Tanh(),
        nn.Linear(sizes[1], sizes[2]),
        nn.Tanh(),
        nn.Linear(sizes[2], 8),
    ).double()
    sparsifier = Sparsifier(
        model,
        STEPS,
        nm="2:4",
        exclude=["4"],
        floor={"row": 0, "column": 0, "layer": 0},
        drop_fraction={"schedule": "constant", "initial": FRACTION},
        update={"every_n_steps": 5, "until": STEPS},
        **options,
    )
    reference = Reference(model[::2])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    sparsifier.attach(optimizer)
    updates: list[ModelUpdate] = []
    sparsifier.register_update_hook(lambda _, update: updates.append(update))
    exchanged, grown, pending = 0, 0, 0
    for number in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(24, sizes[0], generator=generator, dtype=torch.float64)
        y = torch.stack([x[:, i : i + 5].prod(1) + x[:, i] for i in range(8)], 1)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        n_updates = len(updates)
        optimizer.step()
        assert abs(loss.item() - reference.step(x, y)) <= 1e-10 * loss.item()
        for index, dense in zip(("0", "2"), reference.weights, strict=False):
            layer = model[int(index)]
            kept = layer.topology.unpack(torch.ones_like(layer.values.detach(), dtype=torch.bool))
            if len(updates) > n_updates:
                of_layer = updates[-1].layers[index]
                before = dense.kept
                assert dense.weight.grad is not None
                dense.update(
                    dense.weight.grad,
                    of_layer.n_after,
                    inner,
                    None if options["grow"] == "gradient" else layer.topology.mask,
                    kept,
                )
                exchanged += of_layer.new_weights
                grown += len(of_layer.grown)
                stayed = dense.whole(dense.by_block(before).any(-1) & layer.topology.mask)
                assert of_layer.new_weights == int((dense.kept & ~before & stayed).sum())
            assert torch.equal(dense.kept, kept)
            torch.testing.assert_close(
                layer.dense_weight(), dense.weight.detach(), rtol=1e-10, atol=1e-10
            )
            state = optimizer.state[layer.values]
            for key, expected in (("exp_avg", dense.m), ("exp_avg_sq", dense.v)):
                found = layer.topology.unpack(state[key])
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            pending += int(dense.pending.sum())
    assert len(updates) == 10 and grown > 5 and pending > 1000
    assert (exchanged > 1000) == inner
