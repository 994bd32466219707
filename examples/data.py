"""Data that is already on the machine: Python's standard library, and two sets of small images."""

from __future__ import annotations

import gzip
import sysconfig
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Windows(Dataset):
    """Windows of `length` bytes of `text` (uint8 [bytes]), one at each of `starts` (int64 [n])."""

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        self.text, self.starts = text, starts
        self.offsets = torch.arange(length)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a whole batch, int64 [batch, length], by one indexing operation."""
        return self.text[self.starts[indices, None] + self.offsets].long()


class StdlibBytes(L.LightningDataModule):
    """The source of Python's standard library as bytes; whole files are held out.

    Args:
        context: context length of the model in bytes; a window has one more, the last target.
        batch_size: number of windows in a batch.
        train_windows: number of windows at random positions in an epoch.
        val_windows: number of held-out windows, evenly spaced, the same in every validation.
        seed: seed of the windows' positions and order.
    """

    def __init__(
        self,
        context: int,
        batch_size: int,
        train_windows: int = 200_000,
        val_windows: int = 1_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read all files and draw the positions of the windows."""
        root = Path(sysconfig.get_paths()["stdlib"])
        texts: dict[bool, list[bytes]] = {True: [], False: []}
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if "site-packages" not in name:
                # Splitting by a hash of the name keeps each file's split when Python gains files.
                held_out = zlib.crc32(name.encode()) % 20 == 0
                texts[held_out].append(path.read_bytes())
        train, val = (
            torch.frombuffer(bytearray(b"\0".join(texts[side])), dtype=torch.uint8)
            for side in (False, True)
        )
        length = self.hparams.context + 1
        generator = torch.Generator().manual_seed(self.hparams.seed)
        starts = torch.randint(
            len(train) - length, (self.hparams.train_windows,), generator=generator
        )
        tiles = torch.arange(0, len(val) - length, length)
        evenly = torch.linspace(0, len(tiles) - 1, min(len(tiles), self.hparams.val_windows)).long()
        self.train = Windows(train, starts, length)
        self.val = Windows(val, tiles[evenly], length)

    def train_dataloader(self) -> DataLoader:
        """Return the epoch's windows in random order."""
        # No workers: cutting a batch from memory takes less time than sending it between processes.
        return DataLoader(
            self.train,
            batch_size=self.hparams.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda batch: batch,
            generator=torch.Generator().manual_seed(self.hparams.seed),
        )

    def val_dataloader(self) -> DataLoader:
        """Return the held-out windows in order."""
        return DataLoader(
            self.val, batch_size=self.hparams.batch_size, collate_fn=lambda batch: batch
        )


class Images(L.LightningDataModule):
    """Flattened images in [0, 1] with their class; subclasses load them."""

    def __init__(self, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return training images (float32 [n, pixels]), labels (int64 [n]), then held-out ones."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load both splits into memory."""
        train_images, train_labels, val_images, val_labels = self.load()
        self.train = TensorDataset(train_images, train_labels)
        self.val = TensorDataset(val_images, val_labels)

    def train_dataloader(self) -> DataLoader:
        """Return the training images in random order."""
        generator = torch.Generator().manual_seed(self.hparams.seed)
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        """Return the held-out images in order."""
        return DataLoader(self.val, batch_size=1000)


class Digits(Images):
    """The 1797 handwritten digits that come with scikit-learn, every fifth of them held out."""

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the 8 x 8 images enlarged to 16 x 16 pixels, since 256 is a multiple of 16."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 16
        images = images.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        labels = torch.from_numpy(digits.target).long()
        held_out = torch.arange(len(labels)) % 5 == 0
        return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


class FashionMNIST(Images):
    """70,000 images of clothes, 28 x 28 pixels, from the Debian package."""

    def __init__(
        self, batch_size: int, seed: int = 0, root: str = "/usr/share/datasets/fashion-mnist"
    ) -> None:
        super().__init__(batch_size, seed)
        self.root = Path(root)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the 60,000 training and the 10,000 test images, 784 pixels each."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"Fashion-MNIST must be in '{self.root}'. Install the Debian package "
                "'dataset-fashion-mnist' (apt-get install dataset-fashion-mnist), or point "
                "data.root=... to a directory with its four .gz files."
            )
        splits = []
        for split in ("train", "t10k"):
            images = self._read(f"{split}-images-idx3-ubyte.gz", header=16)
            labels = self._read(f"{split}-labels-idx1-ubyte.gz", header=8)
            splits += [images.view(-1, 784).float() / 255, labels.long()]
        return tuple(splits)

    def _read(self, name: str, header: int) -> Tensor:
        """Return the data after the `header` bytes of an IDX file as flat uint8."""
        content = gzip.decompress((self.root / name).read_bytes())
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())
