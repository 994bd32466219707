"""The trainings of `bench quality`: a planted teacher, Fashion-MNIST, and a GPT."""

from __future__ import annotations

import copy
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lightning.bench.options import prepare
from sparse_lightning.bench.quality import EQUAL_FLOPS, SMALL_DENSE, Run
from sparse_lightning.bench.quality_fit import Batches, Supervised, fit, quiet
from sparse_lightning.observers.measures import count_parameters
from sparse_lightning.patching import sparsify
from sparse_lightning.policy.evolution import choose_blocks
from sparse_lightning.selection import sparse_layers

Metrics = dict[str, float]


def train(run: Run, device: torch.device, fashion_mnist: Path) -> tuple[Metrics, float]:
    """Make a run; return its metrics and the seconds that it took.

    Args:
        run: what to train.
        device: on a CPU one thread is used, so that results do not depend on the machine's load.
        fashion_mnist: folder of the data of `fashion`.
    """
    prepare(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    begin = time.perf_counter()
    with quiet():
        if run.task == "planted":
            metrics = planted(run, device)
        elif run.task == "fashion":
            metrics = fashion(run, device, fashion_mnist)
        else:
            metrics = gpt(run, device)
    return metrics, time.perf_counter() - begin


# -- planted ------------------------------------------------------------------------------------


class Teacher:
    """y = W x + noise, for x ~ N(0, I); W has random blocks, scaled so that y has variance 1.

    Each block row and column of W has a block.

    Args:
        features: in and out.
        block_size, density: of W.
        device: of all tensors.
    """

    noise = 0.1

    def __init__(
        self, features: int, block_size: int, density: float, device: torch.device
    ) -> None:
        blocks = features // block_size
        drawn = torch.rand(blocks, blocks)
        everywhere = torch.ones_like(drawn, dtype=torch.bool)
        # A student keeps a block in every row and column; it shall not have to waste one.
        self.mask = choose_blocks(drawn, everywhere, round(density * blocks**2), floor=(1, 1))
        there = self.mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        weight = there * torch.randn(features, features) / (density * features) ** 0.5
        self.weight = weight.to(device)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Return fresh inputs and targets, `[n, features]`."""
        x = torch.randn(n, self.weight.shape[1], device=self.weight.device)
        y = x @ self.weight.T
        return x, y + self.noise * torch.randn_like(y)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.sample(128)


def planted(run: Run, device: torch.device) -> Metrics:
    """Let one sparse layer look for the blocks of a teacher of the same density."""
    teacher = Teacher(512, run.block_size, run.density, device)
    model = Supervised(nn.Linear(512, 512, bias=False), F.mse_loss, lr=1e-2)
    fit(model, teacher, run, device)
    ((_, layer),) = sparse_layers(model)
    found = (layer.topology.mask.cpu() & teacher.mask).sum() / teacher.mask.sum()
    x, y = teacher.sample(8192)
    with torch.no_grad():
        loss = F.mse_loss(model.net(x), y)
    return {
        "found": 100 * float(found),
        "loss": float(loss) / teacher.noise**2,
        "parameters": count_parameters(model),
    }


# -- Fashion-MNIST ------------------------------------------------------------------------------


def fashion(run: Run, device: torch.device, folder: Path) -> Metrics:
    """Train the example's MLP for the test accuracy at the end.

    Blocks of 32 do not divide 784 pixels, so that a network of these sees 16 zeros more.
    """
    train_images, train_labels, test_images, test_labels = _fashion_mnist(folder, device)
    mlp, classes = example("mlp").MLP, 10
    pixels = train_images.shape[1]
    features = -(-pixels // run.block_size) * run.block_size
    net = mlp(features, hidden=512, classes=classes)
    if run.method == SMALL_DENSE:
        features = pixels
        hidden = nearest_width(
            lambda h: (features + 1) * h + (h + 1) * h + (h + 1) * classes,
            sparse_parameters(net, run),
        )
        net = mlp(features, hidden, classes)
    padding = (0, features - pixels)
    model = Supervised(net, F.cross_entropy)
    batches = Batches(F.pad(train_images, padding), train_labels, 128, run.seed)
    fit(model, batches, run, device)
    with torch.no_grad():
        right = net(F.pad(test_images, padding)).argmax(1) == test_labels
    return {"accuracy": 100 * float(right.float().mean()), "parameters": count_parameters(net)}


@functools.cache
def _fashion_mnist(folder: Path, device: torch.device) -> tuple[Tensor, ...]:
    images = example("data").FashionMNIST(batch_size=1, root=str(folder))
    return tuple(tensor.to(device) for tensor in images.load())


# -- GPT ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTSize:
    """The size of the example's GPT; `context` in bytes, `batch` in windows of these."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    windows: int  # held out

    def flops(self, density: float) -> float:
        """Return the forward FLOPs a byte with MLPs of a density; a training step has thrice these.

        Of matrix products: the attention's four (one of them three times as wide, so 4 width^2)
        and its causal scores and sums, the MLP's two, and the head's. The dense gradients that
        RigL reads at its updates, in 2 % of the steps, are not counted.

        >>> GPTSize(width=2, layers=1, heads=1, context=4, batch=1, windows=1).flops(0.5)
        1104.0
        """
        attention = 4 * self.width**2 + self.context * self.width
        mlp = 8 * self.width**2 * density
        return 2 * (self.layers * (attention + mlp) + 256 * self.width)

    def dense_steps(self, steps: int, density: float) -> int:
        """Return how many steps of the dense GPT cost the FLOPs of `steps` of a sparse one."""
        return max(1, round(steps * self.flops(density) / self.flops(1.0)))


GPT_SIZES = {
    "gpt": GPTSize(width=512, layers=8, heads=8, context=512, batch=16, windows=1024),
    "gpt-tiny": GPTSize(width=128, layers=2, heads=2, context=64, batch=8, windows=64),
}
_MLPS = ("blocks.*.mlp.*",)


def gpt(run: Run, device: torch.device) -> Metrics:
    """Train the example's GPT for the bits per byte of held-out files at the end."""
    size = GPT_SIZES[run.task]
    if run.method == EQUAL_FLOPS:
        run = replace(run, steps=size.dense_steps(run.steps, run.density))
    model = example("gpt").GPT(
        size.width, size.layers, size.heads, size.context, warmup_steps=max(1, run.steps // 20)
    )
    if run.method == SMALL_DENSE:
        shrink_mlps(model, run)
    data = example("data").StdlibBytes(
        size.context, size.batch, run.steps * size.batch, size.windows, run.seed
    )
    data.setup("fit")
    trainer = fit(
        model,
        data.train_dataloader(),
        run,
        device,
        include=_MLPS,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        gradient_clip_val=1.0,
    )
    (metrics,) = trainer.validate(model, data.val_dataloader(), verbose=False)
    return {
        "bits_per_byte": metrics["val/bits_per_byte"],
        "parameters": count_parameters(model),
    }


def shrink_mlps(model: Any, run: Run) -> None:
    """Make a dense GPT's MLPs as narrow as the parameters of the sparse one of a run allow."""
    mlps = [block.mlp for block in model.blocks]
    width = mlps[0][0].in_features
    rest = count_parameters(model) - sum(count_parameters(mlp) for mlp in mlps)
    hidden = nearest_width(
        lambda h: rest + len(mlps) * ((width + 1) * h + (h + 1) * width),
        sparse_parameters(model, run, _MLPS),
    )
    for mlp in mlps:
        for at, linear in ((0, nn.Linear(width, hidden)), (2, nn.Linear(hidden, width))):
            nn.init.normal_(linear.weight, std=float(mlp[at].weight.detach().std()))
            mlp[at] = linear


# -- what they share ----------------------------------------------------------------------------


def nearest_width(parameters: Callable[[int], int], target: int) -> int:
    """Return the width whose number of parameters is the nearest to a target.

    Args:
        parameters: of a width, and rising with it.
        target: number of parameters.

    >>> nearest_width(lambda width: width**2 + 10, 58)  # 59, where 6 would give 46
    7
    """
    width = 1
    while parameters(width) < target:
        width += 1
    return min(max(1, width - 1), width, key=lambda w: abs(parameters(w) - target))


def sparse_parameters(dense: nn.Module, run: Run, include: tuple[str, ...] = ("*",)) -> int:
    """Return how many parameters a dense model has once a sparse method has come to its density."""
    model = copy.deepcopy(dense)
    sparsify(model, block_size=run.block_size, density=run.density, include=include)
    return count_parameters(model)


EXAMPLES_FOLDER = Path(__file__).parents[2] / "examples"


@functools.cache
def example(name: str) -> ModuleType:
    """Import a file of the repository's examples."""
    spec = importlib.util.spec_from_file_location(
        f"examples_{name}", EXAMPLES_FOLDER / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
