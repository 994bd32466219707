"""Tasks, methods and trainings of `quality.py`: a planted teacher, images, GPTs, fine-tuning."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lightning import SparsityCallback, sparsify
from sparse_lightning.bench.environment import prepare_device
from sparse_lightning.nm_pattern import kept_share
from sparse_lightning.policy.updates import ModelUpdate, choose_blocks
from sparse_lightning.savings import count_parameters
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sparsifier import Sparsifier

EXAMPLES_FOLDER = Path(__file__).parents[1] / "examples"

Metrics = dict[str, float]

DENSE, SMALL_DENSE, EQUAL_FLOPS = "dense", "small dense", "dense, equal FLOPs"
COLD_START, LARGE_DROPS = "rigl, cold start", "rigl, drop .3"
STATIC_NM, WEIGHTS_NM = "static, 2:4", "static blocks, evolving 2:4"
BLOCKS_NM, RIGL_NM = "rigl, fixed 2:4", "rigl, evolving 2:4"

# Keywords of `SparsityCallback` for each sparse method; `callback_keywords` adds the shared ones.
_STATIC: dict[str, Any] = {
    "density": {"schedule": "constant"},
    "grow": "none",
    "drop_fraction": 0,
}
_RIGL: dict[str, Any] = {"density": {"schedule": "constant"}, "grow": "gradient"}
METHODS: dict[str, dict[str, Any]] = {
    "static": _STATIC,
    "set": {"density": {"schedule": "constant"}, "grow": "random"},
    "rigl": _RIGL,
    COLD_START: _RIGL,
    LARGE_DROPS: {
        **_RIGL,
        "drop_fraction": {"schedule": "cosine", "initial": 0.3, "final": 0.0},
    },
    "granet": {"density": {"schedule": "cubic", "initial": 0.5}, "grow": "gradient"},
    STATIC_NM: {**_STATIC, "nm": "2:4"},
    WEIGHTS_NM: {"density": {"schedule": "constant"}, "grow": "none", "nm": "2:4"},
    BLOCKS_NM: {**_RIGL, "nm": "2:4", "regrow_inner": False},
    RIGL_NM: {**_RIGL, "nm": "2:4"},
}
# The same for pretrained networks. "finetune" is the preset of that name.
RANDOM, LARGEST, FINETUNE = "random blocks", "largest blocks", "finetune"
FINETUNING: dict[str, dict[str, Any]] = {
    RANDOM: {"density": {"schedule": "constant"}},
    LARGEST: {"density": {"schedule": "constant"}, "init": "magnitude"},
    FINETUNE: {
        "density": {"schedule": "cubic", "initial": 1.0, "begin": 0, "until": 0.4},
        "drop": "saliency",
        "grow": "none",
        "init": "magnitude",
    },
}
_UPDATES = 15  # update intervals per training; updates end after three quarters of it


@dataclass(frozen=True)
class Task:
    """A training and the variants to compare.

    Attributes:
        description: one line for the help.
        methods: keys of `METHODS` and baselines; the rows of a table.
        sizes: (block size, share of weights) pairs of the sparse networks; the columns of a table.
            The share is the density, except for methods that keep half of the weights in blocks.
        steps: optimizer steps of a run.
        metrics: title and number of decimals of each metric; each metric has a table.
    """

    description: str
    methods: tuple[str, ...]
    sizes: tuple[tuple[int, float], ...]
    steps: int
    metrics: dict[str, tuple[str, int]]


_NM_METHODS = (DENSE, "static", "rigl", STATIC_NM, WEIGHTS_NM, BLOCKS_NM, RIGL_NM)
_FINETUNING_SIZES = ((16, 0.25), (16, 0.1))
_GPT = Task(
    description="a byte-level GPT, 512 wide, 8 layers, sparse MLPs, on Python's library; for a GPU",
    methods=(DENSE, SMALL_DENSE, EQUAL_FLOPS, "static", "set", "rigl", COLD_START, LARGE_DROPS),
    sizes=((32, 0.1), (64, 0.25)),
    steps=750,
    metrics={"bits_per_byte": ("held-out bits per byte", 3)},
)
_FASHION = Task(
    description="an MLP, 784-512-512-10, classifies Fashion-MNIST",
    methods=(DENSE, SMALL_DENSE, "static", "set", "rigl", "granet", LARGE_DROPS),
    sizes=tuple((b, d) for b in (16, 32) for d in (0.02, 0.05, 0.1, 0.25)),
    steps=6 * 469,  # epochs x batches of 128
    metrics={"accuracy": ("test accuracy, %", 2)},
)
TASKS = {
    "planted": Task(
        description="one layer learns a block-sparse teacher and has to find its blocks",
        methods=("static", "set", "rigl", LARGE_DROPS),
        sizes=((16, 0.1),),
        steps=1000,
        metrics={
            "found": ("planted blocks found, %", 1),
            "loss": ("held-out loss / that of the teacher", 2),
        },
    ),
    "fashion": _FASHION,
    "fashion-nm": replace(
        _FASHION,
        description="the same with 2:4 patterns within blocks, beside whole blocks",
        methods=_NM_METHODS,
        sizes=((16, 0.125), (16, 0.25)),
    ),
    "gpt": _GPT,
    "gpt-nm": replace(
        _GPT,
        description="the same with 2:4 patterns within blocks, beside whole blocks; for a GPU",
        methods=_NM_METHODS,
        sizes=((64, 0.125), (64, 0.25)),
    ),
    "gpt-tiny": replace(
        _GPT, description="the same, 128 wide, 2 layers, as a test; seconds on a CPU", steps=100
    ),
    "finetune-digits": Task(
        description="an MLP, 256-256-256-10, pretrained on digits; minutes on a CPU",
        methods=(DENSE, *FINETUNING),
        sizes=_FINETUNING_SIZES,
        steps=460,
        metrics={
            "before": ("held-out accuracy before the first step, %", 1),
            "after": ("held-out accuracy after fine-tuning, %", 1),
        },
    ),
    "finetune-gpt": Task(
        description="the GPT of gpt-tiny, pretrained; minutes on a CPU",
        methods=(DENSE, *FINETUNING),
        sizes=_FINETUNING_SIZES,
        steps=300,
        metrics={
            "before": ("held-out bits per byte before the first step", 3),
            "after": ("held-out bits per byte after fine-tuning", 3),
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """One training; the same run on the same device gives the same metrics.

    Attributes:
        task: a key of `TASKS`.
        method: one of the task's methods.
        block_size, density: block size, and share of the weights, of the sparse network or of the
            one that a baseline matches; both are 1 for `DENSE`, which matches none.
        seed: seed of the weights, the blocks and the order of the data.
        steps: number of optimizer steps.
    """

    task: str
    method: str
    block_size: int
    density: float
    seed: int
    steps: int

    def __str__(self) -> str:
        size = "" if self.method == DENSE else f", {size_label(self.block_size, self.density)}"
        return f"{self.task}, {self.method}{size}, seed {self.seed}"


def size_label(block_size: int, density: float) -> str:
    """Return the label of a block size and a density in tables."""
    return f"B={block_size}, d={f'{density:g}'.removeprefix('0')}"


def task_runs(name: str, seeds: Iterable[int], steps: int | None = None) -> list[Run]:
    """Return all runs of a task, one seed after the other.

    Args:
        name: a key of `TASKS`.
        seeds: each seed gives one run per method and size.
        steps: number of optimizer steps; the task's own if None.
    """
    task = TASKS[name]
    runs = [
        Run(name, method, *((1, 1.0) if method == DENSE else size), seed, steps or task.steps)
        for seed in seeds
        for size in task.sizes
        for method in task.methods
    ]
    return list(dict.fromkeys(runs))


def callback_keywords(run: Run) -> dict[str, Any]:
    """Return the keywords of `SparsityCallback` for a run of a sparse method.

    All methods share the update schedule and use the same density in every layer. They drop by
    magnitude, except for `FINETUNE`. The drop fraction starts at 0.1, except for `LARGE_DROPS`
    and "static".
    """
    method = {**METHODS, **FINETUNING}[run.method]
    return {
        "drop_fraction": {"schedule": "cosine", "initial": 0.1, "final": 0.0},
        "drop": "magnitude",
        **method,
        "density": {
            **method["density"],
            "final": run.density / kept_share(method.get("nm")),
        },
        "block_size": run.block_size,
        "distribution": "uniform",
        "update": {"every_n_steps": max(1, run.steps // _UPDATES), "until": 0.75},
        "seed": run.seed,
        "monitor": None,
    }


def train(run: Run, device: torch.device, fashion_mnist: Path) -> tuple[Metrics, float]:
    """Perform one training; return its metrics and the seconds it took.

    Args:
        run: the training to perform.
        device: the device to train on; a CPU uses one thread, so that results do not depend on the
            machine's load.
        fashion_mnist: folder with the data of the task `fashion`.
    """
    prepare_device(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    begin = time.perf_counter()
    with quiet():
        if run.task == "planted":
            metrics = train_planted(run, device)
        elif run.task.startswith("fashion"):
            metrics = train_fashion(run, device, fashion_mnist)
        elif run.task in _PRETRAINED:
            metrics = finetune(run, device)
        else:
            metrics = train_gpt(run, device)
    return metrics, time.perf_counter() - begin


# -- planted teacher ----------------------------------------------------------------------------


class Teacher:
    """y = W x + noise for x ~ N(0, I); W has random blocks, scaled so that y has variance 1.

    Args:
        features: number of inputs and outputs.
        block_size, density: block size and density of W, which has a block in every block row and
            block column.
        device: device of all tensors.
    """

    noise = 0.1

    def __init__(
        self, features: int, block_size: int, density: float, device: torch.device
    ) -> None:
        n = features // block_size
        scores = torch.rand(n, n)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        # The student's floor keeps a block in every row and column; none of these is wasted.
        self.mask = choose_blocks(scores, allowed, round(density * n**2), floor=(1, 1))
        mask = self.mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        weight = mask * torch.randn(features, features) / (density * features) ** 0.5
        self.weight = weight.to(device)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Return new inputs and targets, `[n, features]`."""
        x = torch.randn(n, self.weight.shape[1], device=self.weight.device)
        y = x @ self.weight.T
        return x, y + self.noise * torch.randn_like(y)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.sample(128)


def train_planted(run: Run, device: torch.device) -> Metrics:
    """Train one sparse layer on a teacher of the same density."""
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


def train_fashion(run: Run, device: torch.device, folder: Path) -> Metrics:
    """Train the example's MLP and return its test accuracy.

    784 pixels are not divisible by 32, so networks with blocks of 32 get 16 additional zeros.
    """
    train_images, train_labels, test_images, test_labels = _fashion_mnist(folder, device)
    mlp, classes = load_example("mlp").MLP, 10
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
        correct = net(F.pad(test_images, padding)).argmax(1) == test_labels
    return {"accuracy": 100 * float(correct.float().mean()), "parameters": count_parameters(net)}


@functools.cache
def _fashion_mnist(folder: Path, device: torch.device) -> tuple[Tensor, ...]:
    images = load_example("data").FashionMNIST(batch_size=1, root=str(folder))
    return tuple(tensor.to(device) for tensor in images.load())


# -- GPT ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTSize:
    """The size of the example's GPT; `context` in bytes, `batch` in windows."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    windows: int  # held-out windows

    def flops(self, density: float) -> float:
        """Return the forward FLOPs per byte at a density of the MLPs; a training step takes 3x.

        It counts the matrix products: the projections of the attention (4 width^2 in all), its
        causal scores and sums, the two layers of the MLP, and the head. The dense gradients that
        RigL needs at its updates, in 2 % of the steps, are not counted.

        >>> GPTSize(width=2, layers=1, heads=1, context=4, batch=1, windows=1).flops(0.5)
        1104.0
        """
        attention = 4 * self.width**2 + self.context * self.width
        mlp = 8 * self.width**2 * density
        return 2 * (self.layers * (attention + mlp) + 256 * self.width)

    def dense_steps(self, steps: int, density: float) -> int:
        """Return how many steps of the dense GPT take the FLOPs of `steps` of a sparse one."""
        return max(1, round(steps * self.flops(density) / self.flops(1.0)))


_GPT_SIZE = GPTSize(width=512, layers=8, heads=8, context=512, batch=16, windows=1024)
GPT_SIZES = {
    "gpt": _GPT_SIZE,
    "gpt-nm": _GPT_SIZE,
    "gpt-tiny": GPTSize(width=128, layers=2, heads=2, context=64, batch=8, windows=64),
}
_MLPS = ("blocks.*.mlp.*",)


def train_gpt(run: Run, device: torch.device) -> Metrics:
    """Train the example's GPT and return the bits per byte of held-out files."""
    size = GPT_SIZES[run.task]
    if run.method == EQUAL_FLOPS:
        run = replace(run, steps=size.dense_steps(run.steps, run.density))
    model = load_example("gpt").GPT(
        size.width, size.layers, size.heads, size.context, warmup_steps=max(1, run.steps // 20)
    )
    if run.method == SMALL_DENSE:
        shrink_mlps(model, run)
    data = load_example("data").StdlibBytes(
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
    """Narrow a dense GPT's MLPs until the model has about as many parameters as the sparse one."""
    mlps = [block.mlp for block in model.blocks]
    width = mlps[0][0].in_features
    rest = count_parameters(model) - sum(count_parameters(mlp) for mlp in mlps)
    hidden = nearest_width(
        lambda h: rest + len(mlps) * ((width + 1) * h + (h + 1) * width),
        sparse_parameters(model, run, _MLPS),
    )
    for mlp in mlps:
        for index, linear in ((0, nn.Linear(width, hidden)), (2, nn.Linear(hidden, width))):
            nn.init.normal_(linear.weight, std=float(mlp[index].weight.detach().std()))
            mlp[index] = linear


# -- fine-tuning of pretrained networks ---------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """A network that is trained dense first.

    Attributes:
        steps: optimizer steps of the dense training.
        build: function of the learning rate that returns the network.
        load: function of a number of steps and a seed that returns the batches.
        score: function that returns the held-out metric of the network.
        include: name patterns of the layers to make block-sparse.
    """

    steps: int
    build: Callable[[float], Any]
    load: Callable[[int, int], Iterable[Any]]
    score: Callable[[Any], float]
    include: tuple[str, ...]


def finetune(run: Run, device: torch.device) -> Metrics:
    """Make a pretrained network sparse, fine-tune it, and return its scores before and after."""
    task = _PRETRAINED[run.task]
    model = task.build(_FINETUNING_LR)
    model.load_state_dict(_pretrain(run.task, run.seed, device))
    model.to(device)
    swapped = copy.deepcopy(model)
    if run.method != DENSE:
        Sparsifier(swapped, **callback_keywords(run), include=task.include)
    before = task.score(swapped)
    fit(model, task.load(run.steps, run.seed + 1), run, device, include=task.include)
    return {"before": before, "after": task.score(model), "parameters": count_parameters(model)}


@functools.cache
def _pretrain(name: str, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return the weights of a task's network after its dense training."""
    task = _PRETRAINED[name]
    torch.manual_seed(seed)
    model = task.build(1e-3)
    fit(model, task.load(task.steps, seed), Run(name, DENSE, 1, 1.0, seed, task.steps), device)
    return {key: tensor.cpu() for key, tensor in model.state_dict().items()}


def _build_digits(lr: float) -> Any:
    return load_example("mlp").MLP(features=256, hidden=256, lr=lr)


def _load_digits(steps: int, seed: int) -> Iterable[Any]:
    digits = load_example("data").Digits(batch_size=64, seed=seed)
    digits.setup("fit")
    return digits.train_dataloader()  # type: ignore[no-any-return]


@torch.no_grad()
def _score_digits(model: Any) -> float:
    *_, images, labels = load_example("data").Digits(batch_size=64).load()
    correct = model(images.to(model.device)).argmax(1).cpu() == labels
    return 100 * float(correct.float().mean())


def _build_gpt(lr: float) -> Any:
    size = GPT_SIZES["gpt-tiny"]
    return load_example("gpt").GPT(size.width, size.layers, size.heads, size.context, lr=lr)


def _load_gpt(steps: int, seed: int) -> Iterable[Any]:
    return _gpt_data(steps, seed).train_dataloader()  # type: ignore[no-any-return]


@torch.no_grad()
def _score_gpt(model: Any) -> float:
    batches = _gpt_data(1, 0).val_dataloader()
    losses = [model.bits_per_byte(windows.to(model.device)) for windows in batches]
    return float(torch.stack(losses).mean())


def _gpt_data(steps: int, seed: int) -> Any:
    size = GPT_SIZES["gpt-tiny"]
    data = load_example("data").StdlibBytes(size.context, size.batch, steps * size.batch, 512, seed)
    data.setup("fit")
    return data


_FINETUNING_LR = 3e-4
_PRETRAINED = {
    "finetune-digits": Pretrained(460, _build_digits, _load_digits, _score_digits, ("*",)),
    "finetune-gpt": Pretrained(1000, _build_gpt, _load_gpt, _score_gpt, _MLPS),
}


# -- shared by the tasks ------------------------------------------------------------------------


class Supervised(pl.LightningModule):
    """A network and its loss, trained by AdamW with a cosine learning rate that ends at 0.

    Args:
        net: network that maps inputs to outputs.
        loss: scalar function of outputs and targets.
        lr: initial learning rate.
    """

    def __init__(
        self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], lr: float = 1e-3
    ) -> None:
        super().__init__()
        self.net, self.loss, self.lr = net, loss, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Batches:
    """Batches cut from tensors in memory, in a new random order in every epoch.

    Args:
        inputs, targets: tensors with the same first dimension.
        size: batch size; the last batch of an epoch may be smaller.
        seed: seed of the order.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, seed: int) -> None:
        self.inputs, self.targets, self.size = inputs, targets, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator)
        for rows in order.to(self.inputs.device).split(self.size):
            yield self.inputs[rows], self.targets[rows]


class ColdStart(SparsityCallback):
    """Ablation: the second moment of a grown block starts from zero, as its first moment does."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register a hook that makes every update forget which blocks it has grown."""
        super().on_train_start(trainer, pl_module)
        assert self.sparsifier is not None
        self.sparsifier.register_update_hook(_forget_grown)


def _forget_grown(sparsifier: Sparsifier, update: ModelUpdate) -> None:
    for tracked in sparsifier._tracked:
        tracked.pending.clear()


def fit(
    model: pl.LightningModule,
    batches: Iterable[Any],
    run: Run,
    device: torch.device,
    *,
    include: Sequence[str] = ("*",),
    **trainer_options: Any,
) -> pl.Trainer:
    """Train a model in place for the steps of a run, and leave it on the device.

    Args:
        model: dense model, which a sparse method makes sparse.
        batches: iterable of batches; every epoch iterates over it again.
        run: the run, whose method is used.
        device: device to train on.
        include: name patterns of the layers to make block-sparse.
        trainer_options: further options of the trainer.
    """
    on_cuda = device.type == "cuda"
    callbacks: list[pl.Callback] = []
    if run.method in (*METHODS, *FINETUNING):
        callback = ColdStart if run.method == COLD_START else SparsityCallback
        callbacks = [callback(include=include, **callback_keywords(run))]
    trainer = pl.Trainer(
        max_steps=run.steps,
        max_epochs=-1,
        accelerator="gpu" if on_cuda else "cpu",
        devices=[device.index or 0] if on_cuda else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(model, batches)
    model.to(device).eval()  # the trainer moves it to the CPU
    return trainer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, Lightning's log messages and the swap report."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def nearest_width(parameters: Callable[[int], int], target: int) -> int:
    """Return the width whose number of parameters is nearest to a target.

    Args:
        parameters: increasing function from a width to a number of parameters.
        target: number of parameters.

    >>> nearest_width(lambda width: width**2 + 10, 58)  # 59; a width of 6 gives 46
    7
    """
    width = 1
    while parameters(width) < target:
        width += 1
    return min(max(1, width - 1), width, key=lambda w: abs(parameters(w) - target))


def sparse_parameters(dense: nn.Module, run: Run, include: tuple[str, ...] = ("*",)) -> int:
    """Return the number of parameters of a dense model after sparsification for a run."""
    model = copy.deepcopy(dense)
    sparsify(model, block_size=run.block_size, density=run.density, include=include)
    return count_parameters(model)


@functools.cache
def load_example(name: str) -> ModuleType:
    """Import a module from the folder `examples/`."""
    spec = importlib.util.spec_from_file_location(
        f"examples_{name}", EXAMPLES_FOLDER / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
