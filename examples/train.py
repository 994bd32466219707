"""Train a small network whose layers are block-sparse, on real input that needs no download.

What to train:

    python examples/train.py                        # a GPT learns Python: 3 minutes on 2 CPU cores
    python examples/train.py model=medium           # the same as a real training, for a GPU
    python examples/train.py task=digits            # images: scikit-learn's digits, in seconds
    python examples/train.py task=fashion_mnist     # images: Debian's package dataset-fashion-mnist

How to train it:

    python examples/train.py callbacks.sparsity.density.final=0.1
    python examples/train.py callbacks/sparsity=rigl callbacks.sparsity.block_size=16
    python examples/train.py '~callbacks.sparsity'  # the dense network, to compare with
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
    """Build what the configuration names, fit it, and say what came of it."""
    L.seed_everything(config.seed, workers=True)
    model, data = instantiate(config.model), instantiate(config.data)
    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    trainer = instantiate(config.trainer)(callbacks=callbacks, logger=instantiate(config.logger))

    trainer.fit(model, data, ckpt_path=config.ckpt_path)
    metrics = trainer.validate(model, data, verbose=False)[0]
    if trainer.is_global_zero:
        report(trainer, model, metrics)


def report(trainer: L.Trainer, model: L.LightningModule, metrics: dict[str, float]) -> None:
    """Print text that the model writes, the metrics, the density and where everything lies."""
    if isinstance(model, GPT):
        model.to(trainer.strategy.root_device)  # the trainer has put it back on the CPU
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
    places = {"picture": "masks.png", "W&B run": "wandb/offline-run-*", "log": "*/*/metrics.csv"}
    for what, pattern in places.items():
        for path in Path(trainer.default_root_dir).glob(pattern):
            print(f"{what:<20} {path}")
    if sparsity:
        print(f"{'to look at it':<20} sparse-lightning report {trainer.default_root_dir}")


if __name__ == "__main__":
    main()
