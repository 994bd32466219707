"""Train a small network with block-sparse layers on real data that needs no download.

What to train:

    python examples/train.py                        # a GPT on Python code: 3 minutes on 2 CPU cores
    python examples/train.py model=medium           # a larger GPT, for a GPU
    python examples/train.py task=digits            # images: scikit-learn's digits, in seconds
    python examples/train.py task=fashion_mnist     # images: Debian's package dataset-fashion-mnist

How to train it:

    python examples/train.py callbacks.sparsity.density.final=0.1
    python examples/train.py callbacks/sparsity=rigl callbacks.sparsity.block_size=16
    python examples/train.py '~callbacks.sparsity'  # the dense network, for comparison
    python examples/train.py '+callbacks.masked_dense._target_=masked_dense.MaskedDense'
    python examples/train.py ckpt_path=outputs/.../checkpoints/last.ckpt
    python examples/train.py --multirun callbacks/sparsity=rigl,set
"""

from __future__ import annotations

from pathlib import Path

import hydra
import lightning as L
from gpt import GPT
from hydra.utils import instantiate
from omegaconf import DictConfig

from sparse_lightning import SparsityCallback


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    """Instantiate the configured model, data and trainer, train, and print the results."""
    L.seed_everything(config.seed, workers=True)
    model, data = instantiate(config.model), instantiate(config.data)
    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    trainer = instantiate(config.trainer)(callbacks=callbacks, logger=instantiate(config.logger))

    trainer.fit(model, data, ckpt_path=config.ckpt_path)
    metrics = trainer.validate(model, data, verbose=False)[0]
    if trainer.is_global_zero:
        print_results(trainer, model, metrics)


def print_results(trainer: L.Trainer, model: L.LightningModule, metrics: dict[str, float]) -> None:
    """Print generated text, the density, the metrics, and the paths of the run's files."""
    if isinstance(model, GPT):
        model.to(trainer.strategy.root_device)  # the trainer moves it to the CPU
        text = model.generate("class Parser:\n    def ", 500)
        print("\nGenerated text", "-" * 80, text, "-" * 80, sep="\n")
    sparsity = [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
    for summary in (callback.summary for callback in sparsity if callback.summary):
        print(f"{'density':<20} {summary.density:.3f} in {summary.layers} layers")
        sparse, dense = summary.nbytes / 1e6, summary.dense_nbytes / 1e6
        print(f"{'memory':<20} {sparse:.1f} MB, {sparse / dense:.1%} of {dense:.1f} MB dense")
    for name, value in metrics.items():
        print(f"{name.removeprefix('val/').replace('_', ' '):<20} {value:.3f} held out")
    print(f"{'checkpoint':<20} {trainer.checkpoint_callback.last_model_path}")
    outputs = {"W&B run": "wandb/offline-run-*", "log": "*/*/metrics.csv"}
    for name, glob in outputs.items():
        for path in Path(trainer.default_root_dir).glob(glob):
            print(f"{name:<20} {path}")
    if sparsity:
        report = f"sparse-lightning report {trainer.default_root_dir}"
        print(f"{'run page':<20} {report}")
        print(f"{'picture':<20} {report} --film masks.png")


if __name__ == "__main__":
    main()
